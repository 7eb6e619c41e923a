"""One device against several, and one process against several: in processes of their own."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import free_port, run_python

pytestmark = pytest.mark.usefixtures("fast_compile")

TRAIN = """
import json, os, sys
num_devices, num_processes, index, port = map(int, sys.argv[1:])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"
import jax, jax.numpy as jnp, numpy as np
if num_processes > 1:
    jax.distributed.initialize(f"localhost:{port}", num_processes, index)
from led_jax import LED, data, densities, flows, networks, objectives, parallel, training

rows = data.load("digits", binarize="dynamic").train[:200]
led = LED(
    networks.mlp_encoder(2, (8,)),
    flows.chain(),
    densities.transformed(densities.standard_normal((2,)), flows.real_nvp((2,), 2, hidden=(4,))),
    networks.mlp_decoder(64, (8,)),
)
optimizer = training.adam(1e-2, 100)

def train(method, size):
    options = {"dynamic": True, "kl_warmup": 2.0}
    state = training.init_state(led, optimizer, jax.random.key(0), jnp.asarray(rows[:40]))
    x, mesh, bounds = jnp.asarray(rows), None, []
    if method == "jit":
        epoch = training.make_epoch(led, optimizer, 40, **options)
    else:
        mesh = parallel.make_mesh(size)
        state, x = parallel.replicate(mesh, (state, x))
        epoch = training.make_epoch(led, optimizer, 40, axis_name=parallel.AXIS, **options)
        epoch = parallel.compile(epoch, mesh, state, x, donate_args=[0], method=method)
    for _ in range(3):
        state, steps = epoch(state, x)
        bounds.append(float(steps.mean().bound))
    params = parallel.local(state).params
    method = "pmap" if method == "jit" else method
    nll = objectives.nll(
        led, params, jax.random.key(1), rows[:50] // 128, 7, batch_size=8, mesh=mesh, method=method
    )
    return bounds + [nll.nll, nll.elbo, nll.monte_carlo_error]

sizes = [2, 4, 8] if num_processes == 1 else [num_devices]
results = {f"{method} {size}": train(method, size) for size in sizes for method in parallel.METHODS}
if index == 0:
    results["jit 1"] = train("jit", 1)
print(json.dumps(results))
"""


def assert_all_alike(results):
    expected = results.pop("jit 1")
    assert len(set(expected[:3])) == 3
    for name, found in results.items():
        np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=name)


def test_two_four_and_eight_devices_train_and_evaluate_as_one():
    results = json.loads(run_python(TRAIN, 8, 1, 0, 0).splitlines()[-1])
    assert len(results) == 7
    assert_all_alike(results)


@pytest.mark.parametrize(("num_processes", "num_devices"), [(2, 2), (4, 1)])
def test_several_processes_train_and_evaluate_as_one(num_processes, num_devices):
    port = free_port()
    with ThreadPoolExecutor(num_processes) as pool:
        outputs = pool.map(
            lambda i: run_python(TRAIN, num_devices, num_processes, i, port), range(num_processes)
        )
        first, *others = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert_all_alike(first)
    assert len(first) == 2 and all(result == first for result in others)


def test_errors_name_what_there_is():
    code = """
import jax, jax.numpy as jnp
from led_jax import parallel, numerics
def said(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError as error:
        print(error)
said(parallel.make_mesh, 3)
mesh = parallel.make_mesh(1)
said(parallel.compile, lambda x: x, mesh, jnp.ones(2), method="pjit")
x = jnp.ones(3)
def part(x):
    return numerics.device_part(x, "a")
said(jax.vmap(part, axis_name="a"), jnp.ones((2, 3)))
"""
    lines = run_python(code).splitlines()
    assert "expected 1 to 1 cpu devices (0 takes all), got 3" in lines[0]
    assert lines[1] == "method must be one of pmap, shard_map, got 'pjit'"
    assert lines[2] == "device_part: 3 rows do not divide over 2 devices"
