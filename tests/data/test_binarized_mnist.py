import gzip
import hashlib
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from led_jax.data import binarized_mnist, cast, load

SPLITS = ("train", "valid", "test")
CACHE = "binarized_mnist_packed.npz"


def read(directory):
    return load("binarized_mnist", data_dir=str(directory))


def amat_path(directory, split) -> Path:
    return Path(directory, f"binarized_mnist_{split}.amat")


def names(directory) -> set[str]:
    return set(os.listdir(directory))


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)


@pytest.fixture
def published(monkeypatch, tmp_path, write_amat):
    """Writes three small text files that pass for the published ones; returns their rows."""
    return publish(monkeypatch, tmp_path, write_amat, seed=0)


def publish(monkeypatch, directory, write_amat, seed, sizes=(5, 3, 2)):
    rng = np.random.default_rng(seed)
    rows, table = {}, {}
    for split, n in zip(SPLITS, sizes, strict=True):
        rows[split] = rng.integers(0, 2, (n, 784)).astype(np.uint8)
        content = write_amat(rows[split])
        amat_path(directory, split).write_bytes(content)
        table[split] = binarized_mnist.PUBLISHED[split]._replace(
            rows=n,
            sha256=hashlib.sha256(content).hexdigest(),
            packed_sha256=hashlib.sha256(np.packbits(rows[split], axis=1).tobytes()).hexdigest(),
        )
    monkeypatch.setattr(binarized_mnist, "PUBLISHED", table)
    return rows


def assert_holds(dataset, rows):
    assert dataset.name == "binarized_mnist" and dataset.image_shape == (28, 28)
    assert dataset.prepare is cast
    for split in SPLITS:
        assert getattr(dataset, split).dtype == np.uint8
        np.testing.assert_array_equal(getattr(dataset, split), rows[split])


def test_real_packed_file(real_dir, real_rows):
    dataset = read(real_dir)
    assert_holds(dataset, real_rows)
    assert [len(getattr(dataset, split)) for split in SPLITS] == [50_000, 10_000, 10_000]
    means = [getattr(dataset, split).mean() for split in SPLITS]
    np.testing.assert_allclose(means, [0.13056, 0.13113, 0.13251], atol=5e-6)


@pytest.mark.slow
def test_real_text_files_and_the_cache_written_from_them(real_amat_dir, real_rows):
    assert_holds(read(real_amat_dir), real_rows)
    assert names(real_amat_dir) == {amat_path("", split).name for split in SPLITS} | {CACHE}
    assert_holds(read(real_amat_dir), real_rows)


def test_cache_is_written_once_and_used(published, tmp_path):
    assert_holds(read(tmp_path), published)
    cache = tmp_path / CACHE
    before = cache.stat()
    for split in SPLITS:
        amat_path(tmp_path, split).unlink()
    assert_holds(read(tmp_path), published)
    after = cache.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert names(tmp_path) == {CACHE}


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 2**32), st.tuples(*[st.integers(1, 4)] * 3))
def test_text_and_cache_hold_any_rows(tmp_path_factory, write_amat, seed, sizes):
    directory = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as monkeypatch:
        rows = publish(monkeypatch, directory, write_amat, seed, sizes)
        assert_holds(read(directory), rows)  # from the text
        assert_holds(read(directory), rows)  # from the cache


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(SPLITS), st.integers(0, 2**20), st.booleans())
def test_any_damage_to_a_text_file_is_an_error_and_nothing_is_written(
    published, tmp_path, split, position, cut
):
    path = amat_path(tmp_path, split)
    content = path.read_bytes()
    position %= len(content)
    damaged = bytearray(content)
    if cut:
        del damaged[position:]
        message = f"size is {position} bytes, expected {len(content)}"
    else:
        damaged[position] ^= 1
        message = f"SHA-256 is {hashlib.sha256(damaged).hexdigest()}, expected "
    try:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path.name}: {message}"):
            read(tmp_path)
        assert names(tmp_path) == {amat_path("", split).name for split in SPLITS}
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "alter",
    [
        lambda text: text + b"0 1\n",
        lambda text: text + b"\n",
        lambda text: text.replace(b"\n", b"\r\n"),
        gzip.compress,
    ],
    ids=["another row", "a blank line", "CRLF", "gzip"],
)
def test_text_file_other_than_published(published, tmp_path, alter):
    path = amat_path(tmp_path, "test")
    altered = alter(path.read_bytes())
    path.write_bytes(altered)
    message = f"test.amat: size is {len(altered)} bytes, expected 3136: .* as it was published"
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_some_text_files_missing(published, tmp_path):
    amat_path(tmp_path, "valid").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks binarized_mnist_valid\.amat$"):
        read(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        read(tmp_path)
    message = str(raised.value)
    for part in (str(tmp_path), CACHE, "--data_dir", 'pip install "led_jax[tfds]"'):
        assert part in message
    for split in SPLITS:
        assert amat_path("", split).name in message
    assert names(tmp_path) == set()


def test_no_data_dir_and_no_tensorflow():
    with pytest.raises(FileNotFoundError, match=r"data_dir is not given.*led_jax\[tfds\]"):
        load("binarized_mnist")


def test_prepared_for_tensorflow_datasets_but_that_is_not_installed(tmp_path):
    info = tmp_path / "binarized_mnist" / "1.0.0" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    info.touch()
    with pytest.raises(FileNotFoundError, match=r"tensorflow.*led_jax\[tfds\]"):
        read(tmp_path)


class Hostile:
    """Ends the test process if it is unpickled."""

    def __reduce__(self):
        return sys.exit, ("a pickle was run",)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip_bit(path):
    rewrite(path, lambda arrays: arrays["valid"].__setitem__((0, 0), arrays["valid"][0, 0] ^ 1))


def other_keys(path):
    rewrite(path, lambda arrays: arrays.update(validation=arrays.pop("valid")))


def other_shape(path):
    rewrite(path, lambda arrays: arrays.update(test=arrays["test"].reshape(-1)))


def other_dtype(path):
    rewrite(path, lambda arrays: arrays.update(test=arrays["test"].astype(np.float32)))


def rewrite(path, change):
    with np.load(path) as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez_compressed(path, **arrays)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncate,
    "text": lambda path: path.write_bytes(b"not an archive"),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Hostile())),
    "object arrays": lambda path: rewrite(
        path, lambda arrays: arrays.update(train=np.array([Hostile()]))
    ),
    "npy": lambda path: np.save(path.open("wb"), np.zeros(3)),
    "bit": flip_bit,
    "keys": other_keys,
    "shape": other_shape,
    "dtype": other_dtype,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_bad_cache(damage, published, tmp_path, caplog):
    read(tmp_path)
    cache = tmp_path / CACHE
    damage(cache)
    assert_holds(read(tmp_path), published)  # from the text, which also repairs the cache
    assert str(cache) in caplog.text and ".amat files instead" in caplog.text
    caplog.clear()
    assert_holds(read(tmp_path), published)
    assert not caplog.text

    damage(cache)
    before = cache.read_bytes()
    amat_path(tmp_path, "train").unlink()
    with pytest.raises(ValueError, match=CACHE):
        read(tmp_path)
    assert cache.read_bytes() == before
    assert names(tmp_path) == {CACHE, amat_path("", "valid").name, amat_path("", "test").name}


@pytest.mark.parametrize("call", ["open", "savez", "replace"])
def test_directory_that_takes_no_file(call, published, tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        if call == "savez":
            args[0].write(b"the first half")
        raise PermissionError("read-only")

    target, attribute = {
        "open": (Path, "open"),
        "savez": (np, "savez_compressed"),
        "replace": (os, "replace"),
    }[call]
    monkeypatch.setattr(target, attribute, refuse)
    if call == "open":  # read_bytes opens its file through Path.open
        monkeypatch.setattr(Path, "read_bytes", lambda path: open(path, "rb").read())
    assert_holds(read(tmp_path), published)
    assert "no cache written: read-only" in caplog.text
    assert names(tmp_path) == {amat_path("", split).name for split in SPLITS}


def test_read_only_directory(published, tmp_path, caplog):
    tmp_path.chmod(0o555)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user, root perhaps, may write into read-only directories")
        assert_holds(read(tmp_path), published)
    finally:
        tmp_path.chmod(0o755)
    assert "no cache written" in caplog.text


def test_interrupted_write_leaves_nothing(published, tmp_path, monkeypatch):
    def interrupt(file, **_):
        file.write(b"the first half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path)
    assert names(tmp_path) == {amat_path("", split).name for split in SPLITS}
