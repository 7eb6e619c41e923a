import io
import zipfile

import numpy as np
import pytest

from led_jax.data import names_of, read_npz

ARRAYS = {"a": np.arange(6).reshape(2, 3), "b": np.ones(4, bool), "c": np.eye(3, dtype="f4")}


@pytest.fixture(params=[np.savez, np.savez_compressed])
def path(request, tmp_path):
    request.param(tmp_path / "x.npz", **ARRAYS)
    return tmp_path / "x.npz"


def test_reads_what_numpy_writes(path):
    assert names_of(path) == list(ARRAYS)
    for name, array in read_npz(path, ["c", "a"]).items():
        np.testing.assert_array_equal(array, ARRAYS[name])
        assert array.dtype == ARRAYS[name].dtype
    np.savez(path, f=np.asfortranarray(ARRAYS["a"]))
    np.testing.assert_array_equal(read_npz(path, ["f"])["f"], ARRAYS["a"])


def test_only_numbers_that_are_there(tmp_path, path):
    with pytest.raises(ValueError, match=r"x.npz: no array z; it has a, b, c"):
        read_npz(path, ["a", "z"])
    with pytest.raises(FileNotFoundError, match="is not an existing file"):
        read_npz(tmp_path, ["a"])
    objects = {"object": np.array([{}]), "text": np.array(["a"]), "complex": np.zeros(1, complex)}
    np.savez(path, **objects)
    for name, holds in {"object": "Python objects, which are never", "text": "<U1"}.items():
        with pytest.raises(ValueError, match=f"{name} holds {holds}"):
            read_npz(path, [name])
    with pytest.raises(ValueError, match="holds complex128"):
        read_npz(path, ["complex"])


def test_a_bomb_is_refused_by_its_headers(tmp_path):
    """A small file that unpacks to 20 MB, as its headers say."""
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros((20_000, 1000), np.uint8))
    assert path.stat().st_size < 50_000
    with pytest.raises(ValueError, match="unpacks to 20000000 bytes, expected at most 1000000"):
        read_npz(path, ["x"], max_bytes=10**6)
    assert read_npz(path, ["x"])["x"].shape == (20_000, 1000)
    # The limit never refuses a file without compression.
    np.savez(path, x=np.zeros((20, 1000), np.uint8))
    assert read_npz(path, ["x"], max_bytes=10)["x"].shape == (20, 1000)


@pytest.mark.parametrize("shape", ["(10000000000000, 100)", "(2, 4)", "(-2, -3)"])
def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path, shape):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(6)
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(ValueError, match="x is uint8 .*damaged"):
        read_npz(tmp_path / "lie.npz", ["x"])


def test_damage_is_a_value_error_wherever_it_is(tmp_path):
    """Changes each byte and cuts at every seventh: the array read is equal, or it is an error."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(50, dtype=np.uint8))
    whole, path = buffer.getvalue(), tmp_path / "x.npz"
    damaged = [whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :] for i in range(len(whole))]
    refused = 0
    for content in [*damaged, *(whole[:i] for i in range(0, len(whole), 7))]:
        path.write_bytes(content)
        try:
            np.testing.assert_array_equal(read_npz(path, ["x"])["x"], np.arange(50))
        except ValueError:
            refused += 1
    assert refused > len(whole) // 2
