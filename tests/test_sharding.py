"""One device against several, and one process against several, all in child processes."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from support import free_port
from support.processes import Forked, finish

from led_jax import sharding

pytestmark = pytest.mark.usefixtures("fast_compile")

DEVICES = Path(__file__).parent / "support" / "devices.py"


def launch(num_devices, num_processes=1, index=0, port=0):
    """What `support/devices.py` prints."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = finish(Forked("-c", code, DEVICES, num_devices, num_processes, index, port))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def eight_devices(fast_compile):
    return launch(8)


def assert_alike(found, expected):
    """Asserts equality up to the rounding of float32."""
    for name in ("train", "valid", "nll"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(found["params"], expected["params"], atol=2e-6)


@pytest.mark.slow
def test_one_device_learns(eight_devices):
    one = eight_devices["runs"]["1"]
    assert one["train"][1] > one["train"][0] and one["valid"][1] > one["valid"][0]


@pytest.mark.parametrize("name", ["2", "4", "8", "host"])
def test_several_devices_train_and_evaluate_as_one(eight_devices, name):
    """Also with data on the host, for four devices."""
    assert_alike(eight_devices["runs"][name], eight_devices["runs"]["1"])


def test_devices_share_gradients_alone(eight_devices):
    """Devices exchange nothing but sums over them: no rows, random numbers or parameters."""
    assert set(eight_devices["epoch_collectives"]) == {"all-reduce"}
    assert eight_devices["epoch_collectives"]["all-reduce"] <= 2


def test_the_nll_gathers_its_sums_alone(eight_devices):
    """One gather for each number of a row is the only communication."""
    assert set(eight_devices["nll_collectives"]) == {"all-gather"}
    assert eight_devices["nll_collectives"]["all-gather"] <= 4


def test_programs_are_compiled_once(eight_devices):
    assert eight_devices["compiled_by_a_second_epoch"] == 0
    assert eight_devices["compiled_by_a_second_nll"] == 0


def test_several_devices_go_on_bit_for_bit(eight_devices):
    assert eight_devices["resumed_bit_for_bit"]


def test_pmap_is_a_vmap_over_the_shards(eight_devices):
    """With the shard's number folded into its key."""
    runs = eight_devices["runs"]
    np.testing.assert_allclose(runs["pmap"]["params"], eight_devices["vmap"], atol=2e-6)
    # pmap draws other random numbers than one device.
    assert np.abs(np.subtract(runs["pmap"]["params"], runs["1"]["params"])).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 2), (4, 1)])
def test_several_processes_train_and_evaluate_as_one(eight_devices, num_processes, num_devices):
    port = free_port()
    with ThreadPoolExecutor(num_processes) as pool:
        first, *others = pool.map(
            lambda i: launch(num_devices, num_processes, i, port), range(num_processes)
        )
    runs = eight_devices["runs"]
    assert_alike(first["device"], runs["1"])
    assert_alike(first["host"], runs["1"])
    assert_alike(first["pmap"], runs["pmap"])  # Both have four devices.
    assert all(other == first for other in others)


def test_a_mesh_of_more_devices_than_there_are():
    available = jax.local_device_count()
    message = f"expected 1 to {available} .* devices .*, got num_devices={available + 1}"
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(available + 1)
    assert sharding.make_mesh(1).axis_names == (sharding.AXIS,)
