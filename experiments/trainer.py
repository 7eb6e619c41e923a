"""Training of one run: from a configuration or a checkpoint to the state of its best epoch."""

import contextlib
import functools
import json
import pathlib
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorboardX
import tqdm
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from experiments.config import Config
from experiments.models import build_led
from led_jax import checkpoints, data, parallel, training
from led_jax.data import Dataset
from led_jax.model import LED
from led_jax.training import Steps, TrainState

CHECKPOINTS = "checkpoints"

BLOCK_STEPS = 100
"""Steps whose rows are gathered and sent to the device together, where data stay on the host."""

Log = dict[str, Any]


_copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))


class Stopped(Exception):
    """A signal asked the run to stop; all that it needs to go on is on disk."""


class Task(NamedTuple):
    """What a configuration stands for."""

    config: Config
    dataset: Dataset
    led: LED
    optimizer: optax.GradientTransformation
    fingerprint: str

    def fresh_state(self) -> TrainState:
        """The state that training starts from."""
        rows = jnp.asarray(self.dataset.train[: self.config.batch_size])
        return training.init_state(self.led, self.optimizer, jax.random.key(self.config.seed), rows)


def make_task(config: Config) -> Task:
    """Loads the data and builds the model.

    Raises:
      ValueError: if the data are not what they should be, or too few for a batch.
    """
    dataset = data.load(config.dataset, data_dir=config.data_dir or None, binarize=config.binarize)
    optimizer = make_optimizer(config, dataset)
    return Task(config, dataset, build_led(config, dataset), optimizer, data.fingerprint(dataset))


def make_optimizer(config: Config, dataset: Dataset) -> optax.GradientTransformation:
    """The optimizer of a configuration."""
    steps_per_epoch = len(dataset.train) // config.batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"--batch_size={config.batch_size} is more than {config.dataset}'s "
            f"{len(dataset.train)} training rows"
        )
    return training.adam(
        config.learning_rate,
        config.num_epochs * steps_per_epoch,
        warmup_steps=round(config.warmup * config.num_epochs * steps_per_epoch),
        clip_norm=config.clip_norm or None,
    )


def make_mesh(config: Config) -> Mesh:
    """The devices of a configuration.

    Raises:
      ValueError: if there are not as many, or a batch does not divide over them.
    """
    try:
        mesh = parallel.make_mesh(config.devices)
    except ValueError as error:
        raise ValueError(f"--devices: {error}") from error
    if config.batch_size % mesh.size:
        raise ValueError(
            f"--batch_size={config.batch_size} does not divide over {mesh.size} devices; change "
            "it, or --devices"
        )
    return mesh


def stream(config: Config, name: str) -> Array:
    """The key of a run's randomness outside training, one for each name."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))


def restore(task: Task, workdir: pathlib.Path) -> tuple[TrainState, TrainState, Log] | None:
    """The last and the best state of a run on disk, and its log; None before the first checkpoint.

    Raises:
      ValueError: if the checkpoint belongs to another model, optimizer or data set.
    """
    like = jax.eval_shape(task.fresh_state)
    found = checkpoints.restore(workdir / CHECKPOINTS, {"last": like, "best": like})
    if found is None:
        return None
    if found.meta["fingerprint"] != task.fingerprint:
        raise ValueError(
            f"{workdir} was trained on other data (SHA-256 {found.meta['fingerprint'][:12]}...) "
            f"than --dataset and --data_dir now give ({task.fingerprint[:12]}...); files and "
            "tensorflow-datasets hold binarized_mnist in different orders"
        )
    return found.trees["last"], found.trees["best"], found.meta


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM or SIGINT has come to any of the processes.

    The first signal only leaves a note; the second one is as deadly as ever. All processes must
    call the function alike.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        for handled, handler in previous.items():
            signal.signal(handled, handler)
        print("stopping as soon as the state is saved", file=sys.stderr, flush=True)

    def stopped() -> bool:
        if jax.process_count() == 1:
            return bool(received)
        return bool(multihost_utils.process_allgather(np.array(bool(received))).any())

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def fit(
    task: Task,
    mesh: Mesh,
    workdir: pathlib.Path,
    restored: tuple[TrainState, TrainState, Log] | None,
    stopped: Callable[[], bool],
) -> tuple[TrainState, Log]:
    """Trains from a checkpoint, or from scratch.

    The first process alone validates, keeps the log and writes to `workdir`.

    Args:
      task: what to train.
      mesh: the devices to train on.
      workdir: directory of the run.
      restored: what `restore` found there.
      stopped: whether to stop after the epoch at hand.

    Returns:
      The state with the best validation ELBO, and the log: "history" (a record an evaluation),
      "epoch_seconds", "compile_seconds", "seconds_train" and "skipped", the number of updates that
      were not finite.

    Raises:
      FloatingPointError: if too many updates, or the validation's bound, are not finite.
      Stopped: after saving, if it is to stop.
    """
    config, writes = task.config, jax.process_index() == 0
    log: Log = {
        "history": [],
        "epoch_seconds": [],
        "seconds_train": 0.0,
        "skipped": 0,
        "saved_epoch": None,
        "fingerprint": task.fingerprint,
    }
    if restored is None:
        state = best = task.fresh_state()
    else:
        state, best, log = restored
        state, best = jax.device_put((state, best))
    state, skipped = parallel.broadcast((state, log["skipped"]))
    log["skipped"] = int(skipped)
    first_epoch = int(state.epoch)
    if first_epoch == config.num_epochs:
        return parallel.broadcast(best), log

    start = time.perf_counter()
    if mesh.size > 1:
        state = parallel.replicate(mesh, state)
    train_epoch = make_epoch(task, mesh, state)
    log["compile_seconds"] = time.perf_counter() - start
    with contextlib.ExitStack() as stack:
        if writes:
            observe = stack.enter_context(_observer(task, workdir, best, log))
        for epoch in range(first_epoch + 1, config.num_epochs + 1):
            epoch_start = time.perf_counter()
            state, steps = train_epoch(state)
            log["epoch_seconds"].append(time.perf_counter() - epoch_start)
            _count_skipped(config, workdir, epoch, steps, log)
            leave = epoch < config.num_epochs and stopped()
            if writes:
                best = observe(epoch, parallel.local(state), float(steps.mean().bound), leave)
            if leave:
                raise Stopped(f"stopped after epoch {epoch} of {config.num_epochs}")
    return parallel.broadcast(best), log


@contextlib.contextmanager
def _observer(
    task: Task, workdir: pathlib.Path, best: TrainState, log: Log
) -> Iterator[Callable[[int, TrainState, float, bool], TrainState]]:
    """What the first process does after every epoch: it validates, records, selects and saves."""
    config = task.config
    evaluate, valid_rows = training.make_evaluate(task.led), jnp.asarray(task.dataset.valid)
    # Epochs are donated their state, so the best one needs buffers of its own.
    best = _copy(best)
    best_elbo = max((r["valid_elbo"] for r in log["history"]), default=-np.inf)
    eval_every = max(1, config.num_epochs // 100)
    first_epoch = len(log["epoch_seconds"])
    seconds_before, started = log["seconds_train"], time.perf_counter()
    saved = started

    with (
        (workdir / "metrics.jsonl").open("w") as metrics,
        tensorboardX.SummaryWriter(str(workdir), purge_step=first_epoch + 1) as board,
        tqdm.tqdm(total=config.num_epochs, initial=first_epoch, unit="epoch", desc="train") as bar,
        checkpoints.saver(workdir / CHECKPOINTS, config.checkpoints_kept) as save,
    ):
        metrics.writelines(json.dumps(record) + "\n" for record in log["history"])

        def validate(epoch: int, state: TrainState, train_elbo: float) -> dict[str, float]:
            key = jax.random.fold_in(stream(config, "validation"), epoch)
            terms = evaluate(state.params, key, valid_rows)
            if not np.isfinite(terms.bound):
                raise FloatingPointError(
                    f"the validation ELBO is {terms.bound} in epoch {epoch}. "
                    f"{_advice(workdir, log)}"
                )
            record = {
                "epoch": epoch,
                "train_elbo": train_elbo,
                "valid_elbo": float(terms.bound),
                **{name: float(value) for name, value in terms._asdict().items()},
            }
            log["history"].append(record)
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            for name, value in record.items():
                board.add_scalar(name, value, epoch)
            bar.set_postfix(train=f"{train_elbo:.2f}", valid=f"{record['valid_elbo']:.2f}")
            return record

        def observe(epoch: int, state: TrainState, train_elbo: float, leave: bool) -> TrainState:
            nonlocal best, best_elbo, saved
            bar.update()
            if epoch % eval_every == 0 or epoch == config.num_epochs:
                record = validate(epoch, state, train_elbo)
                if record["valid_elbo"] > best_elbo:
                    best_elbo, best = record["valid_elbo"], _copy(state)
            now = time.perf_counter()
            log["seconds_train"] = seconds_before + now - started
            due = now - saved > 60 * config.checkpoint_minutes
            if config.checkpoint_epochs:
                due |= epoch % config.checkpoint_epochs == 0
            if due or leave or epoch == config.num_epochs:
                log["saved_epoch"] = epoch
                save(epoch, {"last": state, "best": best}, log)
                saved = now
            return best

        yield observe


def _count_skipped(
    config: Config, workdir: pathlib.Path, epoch: int, steps: Steps, log: Log
) -> None:
    skipped = np.flatnonzero(~np.asarray(steps.updated))
    left = config.max_skipped - log["skipped"]
    log["skipped"] += len(skipped)
    if len(skipped) > left:
        raise FloatingPointError(
            f"the ELBO or its gradient is not finite in step {skipped[left] + 1} of epoch {epoch}: "
            f"{log['skipped']} updates were skipped for that so far, more than "
            f"--max_skipped={config.max_skipped}. {_advice(workdir, log)}"
        )


def _advice(workdir: pathlib.Path, log: Log) -> str:
    epoch = log["saved_epoch"]
    good = (
        "There is no checkpoint"
        if epoch is None
        else (f"The last good checkpoint is {workdir / CHECKPOINTS / str(epoch)}")
    )
    return f"{good}. Start again in a new --workdir with a lower --learning_rate, or --clip_norm"


def make_epoch(
    task: Task, mesh: Mesh, state: TrainState
) -> Callable[[TrainState], tuple[TrainState, Steps]]:
    """The function that trains for one epoch, compiled for such a state.

    One device runs the plain step, without the mapped axis. An epoch that ends in numbers that are
    not finite is gone through once more, with every step checked.
    """
    on_device = task.config.data_placement == "device"
    rows = jnp.asarray(task.dataset.train) if on_device else task.dataset.train
    if on_device and mesh.size > 1:
        rows = parallel.replicate(mesh, rows)
    build: Callable[..., Any] = _device_epoch if on_device else _host_epoch
    compiled = {False: build(task, mesh, state, rows, skip_nonfinite=False)}

    def epoch(state: TrainState) -> tuple[TrainState, Steps]:
        before = _copy(state)
        state, steps = compiled[False](state)
        if not training.is_finite((state, steps)):
            if True not in compiled:
                compiled[True] = build(task, mesh, before, rows, skip_nonfinite=True)
            state, steps = compiled[True](before)
        return state, jax.device_get(steps)

    return epoch


def _device_epoch(task: Task, mesh: Mesh, state: TrainState, rows: Any, *, skip_nonfinite: bool):
    config = task.config
    epoch = training.make_epoch(
        task.led,
        task.optimizer,
        config.batch_size,
        dynamic=task.dataset.dynamic,
        kl_warmup=config.kl_warmup * config.num_epochs,
        axis_name=parallel.AXIS if mesh.size > 1 else None,
        skip_nonfinite=skip_nonfinite,
    )
    if mesh.size > 1:
        compiled = parallel.compile(
            epoch, mesh, state, rows, donate_args=[0], method=config.parallel
        )
    else:
        compiled = epoch.lower(state, rows).compile()  # pyright: ignore[reportFunctionMemberAccess]
    return lambda state: compiled(state, rows)


def _host_epoch(
    task: Task, mesh: Mesh, state: TrainState, rows: np.ndarray, *, skip_nonfinite: bool
):
    config, sharded = task.config, mesh.size > 1
    num_steps = len(rows) // config.batch_size
    steps = training.make_steps(
        task.led,
        task.optimizer,
        num_steps,
        dynamic=task.dataset.dynamic,
        kl_warmup=config.kl_warmup * config.num_epochs,
        axis_name=parallel.AXIS if sharded else None,
        skip_nonfinite=skip_nonfinite,
    )
    order = jax.jit(training.epoch_rows, static_argnums=(1, 2))
    firsts = range(0, num_steps, BLOCK_STEPS)
    compiled: dict[int, Callable[..., Any]] = {}

    def compile_for(*args: Any) -> Callable[..., Any]:
        """One program for whole blocks of steps, one for the rest."""
        length = args[2].shape[1 if sharded else 0]
        if length not in compiled:
            compiled[length] = (
                parallel.compile(
                    steps, mesh, *args, split_args=[2], donate_args=[0], method=config.parallel
                )
                if sharded
                else steps.lower(*args).compile()  # pyright: ignore[reportFunctionMemberAccess]
            )
        return compiled[length]

    def epoch(state: TrainState) -> tuple[TrainState, Steps]:
        indices = np.asarray(order(state, len(rows), config.batch_size))
        if sharded:  # [this process's devices, steps, rows of a device]
            parts = indices.reshape(num_steps, mesh.size, -1)
            indices = parts[:, parallel.local_positions(mesh)].swapaxes(0, 1)
        blocks = np.split(indices, firsts[1:], axis=1 if sharded else 0)
        results = []
        for first, x in zip(firsts, data.gather(rows, blocks), strict=True):
            number = jnp.asarray(first, jnp.int32)
            args = (
                (parallel.replicate(mesh, number), parallel.split(mesh, x))
                if sharded
                else (number, jnp.asarray(x))
            )
            state, result = compile_for(state, *args)(state, *args)
            results.append(result)
        results = jax.device_get(results)
        return state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)

    return epoch
