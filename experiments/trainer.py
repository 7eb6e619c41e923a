"""Training of one run: `training.epochs` with files and a progress bar around it."""

import contextlib
import json
import pathlib
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

import led_jax
from experiments.config import Config
from experiments.models import (
    build_led,
    decoder_values,
    make_flows,
    make_objective,
    make_optimizer,
)
from experiments.signals import Stop, Stopped
from experiments.workdir import naming
from led_jax import Objective, checkpoints, data, descriptions, sharding, training
from led_jax.data import Dataset
from led_jax.model import LED
from led_jax.sharding import Placement
from led_jax.training import Progress, TrainState

CHECKPOINTS = "checkpoints"

Log = dict[str, Any]


class Task(NamedTuple):
    """A configuration with its data (and their fingerprint), model, optimizer and objective."""

    config: Config
    dataset: Dataset
    led: LED
    optimizer: optax.GradientTransformation
    objective: Objective
    fingerprint: str

    def state_shape(self) -> TrainState:
        """Shapes and dtypes of the run's states."""
        rows, *context = (a[: training.INIT_ROWS] for a in self.dataset.rows("train"))
        x = jax.eval_shape(self.dataset.prepare, jax.random.key(0), rows)
        some = [jax.ShapeDtypeStruct(c.shape, x.dtype) for c in context]
        return training.state_shape(self.led, self.optimizer, x, self.objective, *some)


def make_task(config: Config) -> Task:
    """Loads the data and builds the model.

    Raises:
      ValueError: if a flag does not name what it should, or the data are invalid or too few for a
        batch.
    """
    values = decoder_values(config)
    # Invalid flags are refused before the data are loaded. The number of steps does not matter yet.
    make_flows(config)
    make_optimizer(config, 1000)
    make_objective(config, 1000)
    dataset = data.load(
        config.dataset,
        data_dir=config.data_dir or None,
        binarize=config.binarize,
        seed=config.data_seed,
        split=config.split_parts,
        values=values,
        condition=config.condition,
    )
    steps_per_epoch = len(dataset.train) // config.batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"--batch_size={config.batch_size} is more than {config.dataset}'s "
            f"{len(dataset.train)} training rows"
        )
    num_steps = config.num_epochs * steps_per_epoch
    led = build_led(config, dataset)
    return Task(
        config,
        dataset,
        led,
        make_optimizer(config, num_steps),
        make_objective(config, num_steps),
        data.fingerprint(dataset),
    )


def make_placement(config: Config) -> Placement:
    """The devices of a configuration.

    Raises:
      ValueError: if there are fewer, or a batch does not divide over them.
    """
    try:
        mesh = sharding.make_mesh(config.devices)
    except ValueError as error:
        raise ValueError(f"--devices: {error}") from error
    if config.batch_size % mesh.size:
        raise ValueError(
            f"--batch_size={config.batch_size} does not divide over {mesh.size} devices; change "
            "it, or --devices"
        )
    return Placement(mesh)


def stream(config: Config, name: str) -> Array:
    """A PRNG key for a part of the run outside training, another one for each name."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))


def restore(task: Task, workdir: pathlib.Path) -> tuple[Progress, Log] | None:
    """The progress and the log of a run on disk; None before the first checkpoint.

    Raises:
      ValueError: if the checkpoint belongs to another configuration or data set.
    """
    if not (workdir / CHECKPOINTS).exists():
        return None
    like = task.state_shape()
    found = checkpoints.restore(
        workdir / CHECKPOINTS, {"last": like, "best": like}, descriptions.to_json(task.led)
    )
    if found is None:
        return None
    log = found.meta
    differing = task.config.differing(log.get("config", {}))
    if differing:
        raise ValueError(
            f"checkpoint {found.path} is of another configuration: {differing}. Give the run back "
            "its config.json, or start again in a new --workdir"
        )
    if log["fingerprint"] != task.fingerprint:
        raise ValueError(
            f"{workdir} was trained on other data (SHA-256 {log['fingerprint'][:12]}...) "
            f"than --dataset and --data_dir now give ({task.fingerprint[:12]}...); files and "
            "tensorflow-datasets hold binarized_mnist in different orders"
        )
    return training.from_record(found.trees, log), log


def fit(
    task: Task,
    placement: Placement,
    workdir: pathlib.Path,
    restored: tuple[Progress, Log] | None,
    check_held: Callable[[], None],
    stop: Stop,
) -> tuple[TrainState, Log]:
    """Trains from a checkpoint, or from scratch.

    The first process alone keeps the log and writes to `workdir`.

    Args:
      task: what to train.
      placement: the devices to train on.
      workdir: directory of the run.
      restored: what `restore` found there.
      check_held: called before files are written; raises if they would be at the wrong place.
      stop: how a signal ends the run, between epochs or within one.

    Returns:
      The state with the best validation ELBO, and the log: what `training.to_record` gives of the
      last progress, "epoch_seconds" and "seconds_train".

    Raises:
      FloatingPointError: if too many updates, or the validation's bound, are not finite.
      Stopped: after saving, if several processes are to stop.
    """
    config = task.config
    resume, log = restored or (_start(task), _new_log(task))
    resume = _share(task, resume)
    ends = (config.num_epochs, config.patience or None)
    if resume is not None and training.is_finished(resume, *ends):
        return resume.best, log
    progress = resume
    with contextlib.ExitStack() as stack:
        observe = None
        if jax.process_index() == 0:
            observe = stack.enter_context(_observer(task, workdir, log, check_held, stop))
        try:
            for progress in training.epochs(
                task.led,
                task.optimizer,
                task.dataset,
                jax.random.key(config.seed),
                objective=task.objective,
                batch_size=config.batch_size,
                valid_every=min(
                    max(1, config.num_epochs // 100), config.patience or config.num_epochs
                ),
                num_epochs=config.num_epochs,
                patience=config.patience or None,
                placement=placement,
                on_host=config.data_placement == "host",
                method=config.parallel,
                max_skipped=config.max_skipped,
                resume=resume,
            ):
                finished = training.is_finished(progress, *ends)
                leave = stop.agreed() and not finished
                if observe is not None:
                    observe(progress, leave or finished)
                if leave:
                    raise Stopped(f"stopped after epoch {progress.epoch} of {config.num_epochs}")
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. {_last_good(workdir, log)}") from error
    assert progress is not None  # A configuration has an epoch or more.
    return progress.best, log


def _start(task: Task) -> Progress | None:
    """The progress that a new run starts from; None if it starts from scratch."""
    given = given_parts(task)
    if given is None:
        return None
    key = jax.random.key(task.config.seed)
    return training.begin(task.led, task.optimizer, task.dataset, key, task.objective, given=given)


def given_parts(task: Task) -> dict[str, Any] | None:
    """The parameters of all parts but the prior, from the run of --prior_from; None without it.

    Raises:
      ValueError: if that run's model differs in more than its prior.
    """
    config, led = task.config, task.led
    if not config.prior_from:
        return None
    there, params = led_jax.load(pathlib.Path(config.prior_from).expanduser())
    if not isinstance(there, LED) or there._replace(prior=led.prior) != led:
        raise ValueError(
            f"--prior_from={config.prior_from} is another model but for its prior: {there!r}; this "
            f"run's flags make {led!r}"
        )
    return led.all_but_prior(params)


def _new_log(task: Task) -> Log:
    return {
        "history": (),
        "epoch_seconds": [],
        "compile_seconds": 0.0,
        "seconds_train": 0.0,
        "saved_epoch": None,
        "fingerprint": task.fingerprint,
        "model": descriptions.to_json(task.led),
        "config": task.config.fixed(),
    }


def _share(task: Task, progress: Progress | None) -> Progress | None:
    """Gives every process the progress that the first one restored."""
    if not sharding.broadcast(np.array(progress is not None)):
        return None
    if progress is None:  # In other processes only the structure counts, not the values.
        state = jax.tree.map(_zeros, task.state_shape())
        progress = Progress(state, state)
    state, best, score, skipped = sharding.broadcast(
        (progress.state, progress.best, np.float32(progress.best_score), np.int32(progress.skipped))
    )
    return progress._replace(state=state, best=best, best_score=float(score), skipped=int(skipped))


def _zeros(like: jax.ShapeDtypeStruct) -> Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.zeros(like.shape, like.dtype)


@contextlib.contextmanager
def _observer(
    task: Task,
    workdir: pathlib.Path,
    log: Log,
    check_held: Callable[[], None],
    stop: Stop,
) -> Iterator[Callable[[Progress, bool], None]]:
    """Yields what the first process calls after every epoch, to keep the log, show it and save."""
    config = task.config
    first_epoch = len(log["epoch_seconds"])
    seconds_before, started = log["seconds_train"], time.perf_counter()
    saved, last = started, None

    with naming(workdir), contextlib.ExitStack() as files:
        metrics = files.enter_context((workdir / "metrics.jsonl").open("w"))
        board = files.enter_context(
            tensorboardX.SummaryWriter(str(workdir), purge_step=first_epoch + 1)
        )
        bar = files.enter_context(
            tqdm.tqdm(total=config.num_epochs, initial=first_epoch, unit="epoch", desc="train")
        )
        write_checkpoint = files.enter_context(
            checkpoints.saver(workdir / CHECKPOINTS, config.checkpoints_kept)
        )
        metrics.writelines(json.dumps(record) + "\n" for record in log["history"])

        def write(record: dict[str, float]) -> None:
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            for name, value in record.items():
                board.add_scalar(name, value, int(record["epoch"]))
            shown = [name for name in ("train_elbo", "valid_elbo") if name in record]
            bar.set_postfix({name: f"{record[name]:.2f}" for name in shown})

        def save(progress: Progress) -> None:
            log["saved_epoch"] = progress.epoch
            write_checkpoint(progress.epoch, _local(training.to_record(progress)[0]), log)

        def observe(progress: Progress, is_last: bool) -> None:
            nonlocal saved, last
            epoch, now = progress.epoch, time.perf_counter()
            bar.update()
            for record in progress.history[len(log["history"]) :]:
                write(record)
            compile_seconds = log["compile_seconds"] + progress.compile_seconds
            log.update(training.to_record(progress)[1], compile_seconds=compile_seconds)
            log["epoch_seconds"].append(progress.seconds)
            log["seconds_train"] = seconds_before + now - started
            due = now - saved > 60 * config.checkpoint_minutes
            if config.checkpoint_epochs:
                due |= epoch % config.checkpoint_epochs == 0
            if due or is_last:
                save(progress)
                saved = now
            last = progress

        def observe_alone(progress: Progress, is_last: bool) -> None:
            check_held()
            with stop.files:
                observe(progress, is_last)

        def finish() -> str:
            check_held()
            if last is not None and log["saved_epoch"] != last.epoch:
                save(last)
            files.close()
            return f"stopped after epoch {len(log['epoch_seconds'])} of {config.num_epochs}"

        stop.save = finish
        try:
            yield observe_alone
        finally:
            with stop.files:  # Waits until the last checkpoint is on disk.
                files.close()


def _local(tree: Any) -> Any:
    """Replicated arrays as this process's first device holds them."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def _last_good(workdir: pathlib.Path, log: Log) -> str:
    epoch = log["saved_epoch"]
    if epoch is None:
        return "There is no checkpoint; start again in a new --workdir"
    path = workdir / CHECKPOINTS / str(epoch)
    return f"The last good checkpoint is {path}; start again in a new --workdir"
