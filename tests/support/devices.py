"""What the tests of several devices and of several processes run in child processes.

As a script it prints one line of JSON. All programs here are of one small model that trains for
two epochs of four steps.
"""

import json
import os
import sys
from typing import Any

BATCH = 40


def main(num_devices: int, num_processes: int, index: int, port: int) -> None:
    os.environ["XLA_FLAGS"] = with_devices(num_devices)
    import jax

    if num_processes > 1:
        jax.distributed.initialize(f"localhost:{port}", num_processes, index)
        from led_jax.sharding import Placement, make_mesh

        placement = Placement(make_mesh())
        ways = {"device": {}, "host": {"on_host": True}, "pmap": {"method": "pmap"}}
        progress = start()
        found = {
            name: train(placement, resume=progress, **options) for name, options in ways.items()
        }
    else:
        found = one_process()
    print(json.dumps(found))


def with_devices(num_devices: int) -> str:
    """XLA's flags for this number of CPU devices."""
    count = f"--xla_force_host_platform_device_count={num_devices}"
    return " ".join([os.environ.get("XLA_FLAGS", ""), count])


def setup():
    import numpy as np

    from led_jax import LED, decoders, densities, encoders, flows, training
    from led_jax.data.dataset import Dataset, binarize

    rows = np.random.default_rng(0).integers(0, 256, (170, 8), np.uint8)
    valid = rows[:50] // 128
    led = LED(
        encoders.mlp_encoder(2, (4,)),
        flows.chain(),
        densities.transformed(
            densities.standard_normal((2,)), flows.real_nvp((2,), 1, hidden=(4,))
        ),
        decoders.mlp_decoder(8, ()),
    )
    dataset = Dataset("rows", (2, 4), rows, valid, valid, binarize)
    return led, dataset, training.adam(1e-2, 100, clip_norm=1.0)


def start():
    """The progress from which all runs start."""
    import jax
    import jax.numpy as jnp

    from led_jax import training

    led, dataset, optimizer = setup()
    x = jnp.asarray(dataset.valid, float)
    state = training.init_state(led, optimizer, jax.random.key(0), x)
    return training.Progress(state, state)


def train(placement, **options):
    """The means of two epochs, the parameters after them, and the NLL."""
    import jax

    from led_jax import estimators, training

    led, dataset, optimizer = setup()
    key = jax.random.key(0)
    options = {"batch_size": BATCH, "num_epochs": 2, "placement": placement} | options
    records = list(training.epochs(led, optimizer, dataset, key, **options))
    end = records[-1]
    nll = estimators.nll(
        led, end.params, key, dataset.test, 7, batch_size=8, samples_per_chunk=5,
        placement=placement,
    )  # fmt: skip
    return {
        "train": [record.train["elbo"] for record in records],
        "valid": [record["valid_elbo"] for record in end.history],
        "params": flat(end.params),
        "nll": [nll.nll, nll.elbo, nll.monte_carlo_error, *nll.per_example.tolist()],
    }


def one_process():
    import jax
    import jax.numpy as jnp

    from led_jax import estimators, sharding, training

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **kwargs: (
            compiled.append(event)
            if event == "/jax/core/compile/backend_compile_duration"
            else None
        )
    )
    placements = {size: sharding.Placement(sharding.make_mesh(size)) for size in (1, 2, 4, 8)}
    led, dataset, optimizer = setup()
    key = jax.random.key(0)
    progress = start()
    runs = {str(size): train(placements[size], resume=progress) for size in placements}
    runs["host"] = train(placements[4], resume=progress, on_host=True)
    runs["pmap"] = train(placements[4], resume=progress, method="pmap")
    found: dict[str, Any] = {"runs": runs}

    # Only programs of epochs are compiled ahead of time.
    programs, compile = [], jax.stages.Lowered.compile
    jax.stages.Lowered.compile = lambda self, *args, **kwargs: (
        programs.append(compile(self, *args, **kwargs)) or programs[-1]
    )
    options = {"batch_size": BATCH, "placement": placements[4]}
    epochs = training.epochs(led, optimizer, dataset, key, resume=progress, **options)
    first = next(epochs)
    found["epoch_collectives"] = collectives(programs[-1].as_text())
    del compiled[:]
    second = next(epochs)
    found["compiled_by_a_second_epoch"] = len(compiled)
    resumed = training.epochs(led, optimizer, dataset, key, resume=first, **options)
    same = jax.tree.map(
        lambda a, b: bool(jnp.all(a == b)), next(resumed).state.params, second.state.params
    )
    found["resumed_bit_for_bit"] = all(jax.tree.leaves(same))

    calls, sum_batches = [], estimators._sum_batches
    estimators._sum_batches = lambda *args: calls.append(args) or sum_batches(*args)
    nll = lambda params: estimators.nll(  # noqa: E731
        led, params, key, dataset.test, 7, batch_size=8, samples_per_chunk=5,
        placement=placements[4],
    )  # fmt: skip
    nll(first.params)
    del compiled[:]
    nll(second.params)
    nll(jax.device_get(second.params))
    found["compiled_by_a_second_nll"] = len(compiled)
    found["nll_collectives"] = collectives(sum_batches.lower(*calls[-1]).compile().as_text())

    found["vmap"] = flat(by_vmap(progress.state, 4))
    return found


def by_vmap(state, size):
    """Parameters after two epochs in which each shard of a batch has its own key."""
    import jax
    import jax.numpy as jnp
    import optax

    from led_jax import objectives, training

    led, dataset, optimizer = setup()
    data, loss = jnp.asarray(dataset.train), objectives.elbo().loss

    @jax.jit
    def step(params, opt_state, step_key, i, rows):
        def gradient(shard, rows):
            key = jax.random.fold_in(jax.random.fold_in(step_key, i), shard)
            loss_key, prepare_key = jax.random.split(key)
            x = dataset.prepare(prepare_key, data[rows])
            return jax.grad(lambda params: loss(led, params, (), loss_key, x, i)[0])(params)

        shards = jax.vmap(gradient)(jnp.arange(size), rows.reshape(size, -1))
        mean = jax.tree.map(lambda leaf: leaf.mean(0), shards)
        updates, opt_state = optimizer.update((mean, ()), opt_state, (params, ()))
        return optax.apply_updates(params, updates[0]), opt_state

    params, opt_state = state.params, state.opt_state
    for epoch in range(2):
        order = training.epoch_rows(state._replace(epoch=jnp.int32(epoch)), len(data), BATCH)
        step_key = jax.random.split(jax.random.fold_in(state.key, epoch))[1]
        for i, rows in enumerate(order):
            params, opt_state = step(params, opt_state, step_key, i, rows)
    return params


def flat(tree):
    """All numbers of a tree."""
    import jax
    import numpy as np

    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).tolist()


def collectives(hlo):
    """The number of collective operations of each kind in an optimized program."""
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    counts = {name: hlo.count(f" {name}(") + hlo.count(f" {name}-start(") for name in names}
    return {name: count for name, count in counts.items() if count}


if __name__ == "__main__":
    main(*map(int, sys.argv[-4:]))
