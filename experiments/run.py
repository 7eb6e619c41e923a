"""One run, from a configuration to a result: training, selection, evaluation and pictures."""

import contextlib
import math
import pathlib
import statistics
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
import tqdm
from jax import Array

import led_jax
from experiments import plots, provenance
from experiments.config import Config
from experiments.flags import to_command
from experiments.signals import Stop, Stopped
from experiments.trainer import (
    CHECKPOINTS,
    Log,
    Task,
    fit,
    given_parts,
    make_placement,
    make_task,
    restore,
    stream,
)
from experiments.workdir import check_workdir, defined, hold, read_json, write_config, write_json
from led_jax import estimators, sharding
from led_jax.data import Dataset
from led_jax.model import LED
from led_jax.sharding import Placement
from led_jax.training import TrainState


def run(config: Config, workdir: pathlib.Path, stop: Stop | None = None) -> dict[str, Any]:
    """Trains one configuration, or continues where it stopped, and evaluates its best state.

    Args:
      config: the run.
      workdir: directory of the run. A run that is finished, with this configuration's numbers
        of samples, is not run again. Of several processes, only the first reads and writes the
        directory's files.
      stop: how the run ends at a signal, from `stop_on_signal`; None leaves signals as they are.

    Returns:
      The run's result, as in `workdir / "result.json"`; empty in processes other than the first.

    Raises:
      ValueError: if `workdir`, the data or the devices do not fit this configuration, another of
        the run's processes has other flags or data, or another run is writing to `workdir`.
      FileNotFoundError: if `workdir` is removed, renamed or replaced during the run.
      FloatingPointError: if too many updates, or the validation's bound, are not finite.
      Stopped: if a signal came to one of several processes. The state is saved.
    """
    stop = stop or Stop()
    stop.save = lambda: "stopped before training"
    command = to_command(config)
    if sharding.broadcast(_digest(command)) != _digest(command):
        raise ValueError(
            f"process {jax.process_index()} has other flags than the first one, namely {command}; "
            "give all of them to each process, also to go on where they do not share --workdir"
        )
    writes = jax.process_index() == 0
    result_path = workdir / "result.json"
    result = None
    if writes:
        check_workdir(config, workdir)
        result = read_result(config, workdir)
    if sharding.broadcast(result is not None and config.has_samples(result)):
        return result or {}
    origin = provenance.origin(command)  # Now: others may commit during the run.
    placement, task = make_placement(config), make_task(config)
    if sharding.broadcast(_digest(task.fingerprint)) != _digest(task.fingerprint):
        raise ValueError(
            f"process {jax.process_index()} has other data than the first one: --dataset="
            f"{config.dataset} has the SHA-256 {task.fingerprint[:12]}... there"
        )
    if not (workdir / CHECKPOINTS).exists():
        given_parts(task)  # Refuses a wrong --prior_from before anything is written.
    with hold(workdir) if writes else contextlib.nullcontext(lambda: None) as check_held:
        restored = None
        if writes:
            check_workdir(config, workdir)  # Again: others may have written before the lock.
            restored = restore(task, workdir)
            write_config(config, workdir)
        best, log = fit(task, placement, workdir, restored, check_held, stop)
        trained = "stopped after training, in the estimation of the NLL"
        stop.save = lambda: trained

        def between_batches() -> None:
            check_held()
            if stop.agreed():
                raise Stopped(trained)

        estimate = estimate_nll(task, placement, best.eval_params, "test", between_batches)
        if not writes:
            return {}
        check_held()
        led_jax.save(workdir, task.led, jax.device_get(best.eval_params))
        draw_pictures(config, task.led, best.eval_params, task.dataset, log["history"], workdir)
        measured = _measured(task, placement, best.eval_params, log, estimate)
        write_json(result_path, config.report() | measured._asdict() | origin)
        return read_result(config, workdir) or {}  # As of a finished run: JSON has no tuples.


_ACTIVE = 0.01  # Units with a larger variance are active: Burda et al. (2016), section 5.3.


class Measured(NamedTuple):
    """The measurements of a result, which also has its configuration and its origin.

    `test_kl` is the KL of the test split's bound. `mutual_information` and `marginal_kl` estimate
    the two terms whose sum it is, for the aggregated posterior of that split
    (`estimators.MarginalMatching`). They are None for no draws (`Config.num_matching_samples`), if
    the posterior's flow has no inverse, and for p(x|c). `active_units` is None for p(x|c) and for a
    split of one row.
    """

    model: str
    image_shape: tuple[int, ...]
    num_classes: int
    num_covariates: int
    best_epoch: int
    valid_elbo: float
    test_elbo: float
    nll: float
    nll_se: float | None
    nll_monte_carlo_se: float | None
    nll_bits_per_dim: float
    test_kl: float
    mutual_information: float | None
    mutual_information_se: float | None
    marginal_kl: float | None
    marginal_kl_se: float | None
    active_units: int | None
    num_params: int
    skipped: int
    devices: int
    processes: int
    compile_seconds: float
    seconds_per_epoch: float
    seconds_train: float


def _measured(
    task: Task, placement: Placement, params: Any, log: Log, estimate: estimators.NLL
) -> Measured:
    context = task.dataset.context
    width = 0 if context is None else context["train"].shape[1]
    is_one_hot = context is not None and context["train"].dtype == np.uint8
    best = max(log["history"], key=lambda record: record["valid_elbo"])
    seconds = log["epoch_seconds"]
    test = task.dataset.test
    kl_key, activity_key, matching_key = jax.random.split(stream(task.config, "measures"), 3)
    active_units = None  # One row has no variance, and contexts would vary, too.
    if len(test) > 1 and context is None:
        activity = estimators.activity(task.led, params, activity_key, jnp.asarray(test))
        active_units = int((activity > _ACTIVE).sum())
    matching = _matching(task, params, matching_key)
    return Measured(
        model=repr(task.led),
        image_shape=task.dataset.image_shape,
        num_classes=width if is_one_hot else 0,
        num_covariates=0 if is_one_hot else width,
        best_epoch=best["epoch"],
        valid_elbo=best["valid_elbo"],
        test_elbo=estimate.elbo,
        nll=estimate.nll,
        nll_se=defined(estimate.standard_error),
        nll_monte_carlo_se=defined(estimate.monte_carlo_error),
        nll_bits_per_dim=estimate.nll / math.log(2) / test.shape[1],
        test_kl=float(
            _mean_kl(task.led, params, kl_key, jax.device_put(task.dataset.rows("test")))
        ),
        mutual_information=matching["mutual_information"][0],
        mutual_information_se=matching["mutual_information"][1],
        marginal_kl=matching["marginal_kl"][0],
        marginal_kl_se=matching["marginal_kl"][1],
        active_units=active_units,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        skipped=log["skipped"],
        devices=placement.mesh.size,
        processes=jax.process_count(),
        compile_seconds=log["compile_seconds"],
        seconds_per_epoch=statistics.median(seconds[1:] or seconds),
        seconds_train=log["seconds_train"],
    )


@partial(jax.jit, static_argnums=0)
def _mean_kl(led: LED, params: Any, key: Array, rows: tuple[Array, ...]) -> Array:
    """The mean of log q(z|x) - log p(z) over the result of `Dataset.rows`, one draw of z a row."""

    def kl(number_and_row: tuple[Array, ...]) -> Array:
        number, x, *context = number_and_row
        x, *context = (a.astype(jnp.float32) for a in (x, *context))
        key_of_row = jax.random.fold_in(key, number)
        terms = led.elbo(params, key_of_row, x, context=context[0] if context else None)
        return terms.log_posterior - terms.log_prior

    return jax.lax.map(kl, (jnp.arange(len(rows[0])), *rows), batch_size=1000).mean()


def _matching(task: Task, params: Any, key: Array) -> dict[str, tuple[float | None, float | None]]:
    """Mean and standard error of each part of the KL on the test split."""
    names, test = ("mutual_information", "marginal_kl"), task.dataset.test
    num_samples = task.config.num_matching_samples
    # The aggregated posterior of p(x|c) depends on c.
    if task.dataset.context is not None or not num_samples:
        return dict.fromkeys(names, (None, None))
    encoding = jax.eval_shape(task.led.encoding, params, jnp.asarray(test[:1], jnp.float32))
    try:  # A user's flow may have no inverse, and raises this.
        jax.eval_shape(lambda e: task.led.posterior_mixture(params, e)(e.mean), encoding)
    except ValueError:
        return dict.fromkeys(names, (None, None))
    draws = estimators.marginal_matching(task.led, params, key, test, num_samples)
    values = {name: np.asarray(getattr(draws, name), np.float64) for name in names}
    # The error of a single draw is None, as in the NLL.
    errors = {n: v.std() / math.sqrt(num_samples) for n, v in values.items() if num_samples > 1}
    return {
        name: (float(v.mean()), defined(float(errors.get(name, math.nan))))
        for name, v in values.items()
    }


def read_result(config: Config, workdir: pathlib.Path) -> dict[str, Any] | None:
    """The result in a run's directory, or None if there is none.

    Raises:
      ValueError: if it is incomplete, or of another configuration. Only the fields that are free
        may have other values.
    """
    path = workdir / "result.json"
    delete = f"The run makes it again from its checkpoints where {path} is deleted"
    try:
        result = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}. {delete}") from error
    if result is None:
        return None
    expected = (*config.report(), *Measured._fields, *provenance.FIELDS)
    missing = [name for name in expected if name not in result]
    if missing:
        raise ValueError(f"{path} is not a whole result: it has no {missing[0]}. {delete}")
    differing = config.differing(result)
    if differing:
        raise ValueError(f"{path} is of another configuration: {differing}. {delete}")
    return result


def _digest(text: str) -> np.uint32:
    return np.uint32(zlib.crc32(text.encode()))


def load_run(config: Config, workdir: pathlib.Path) -> tuple[Task, TrainState]:
    """The task of a run on disk, and its best state.

    Raises:
      ValueError: if there is no checkpoint, or it belongs to another configuration.
    """
    task = make_task(config)
    restored = restore(task, workdir)
    if restored is None:
        raise ValueError(f"{workdir} has no checkpoint yet")
    progress, _ = restored
    return task, jax.device_put(progress.best)


def estimate_nll(
    task: Task,
    placement: Placement,
    params: Any,
    split: str,
    between_batches: Callable[[], None] = lambda: None,
) -> estimators.NLL:
    """The importance-sampled NLL of a split, with a progress bar.

    It calls `between_batches` after each batch of rows.
    """
    config, writes = task.config, jax.process_index() == 0
    x, *context = task.dataset.rows(split)
    with tqdm.tqdm(total=len(x), unit="image", desc="nll", disable=not writes) as bar:

        def progress(rows: int) -> None:
            bar.update(rows)
            between_batches()

        return estimators.nll(
            task.led,
            params,
            stream(config, "nll"),
            x,
            config.nll_samples,
            samples_per_chunk=samples_per_chunk(config),
            progress=progress,
            placement=placement,
            context=context[0] if context else None,
        )


def bayes_accuracy(task: Task, placement: Placement, params: Any, split: str) -> float:
    """The fraction of a split's rows whose own class is the most probable by Bayes's rule.

    p(c) is the frequency of a class in the training split; p(x|c) is estimated from as many samples
    as the NLL.
    """
    x, context = task.dataset.rows(split)
    log_posterior = estimators.class_log_posterior(
        task.led,
        params,
        stream(task.config, "classes"),
        x,
        np.eye(context.shape[1], dtype=np.uint8),
        task.config.nll_samples,
        class_probs=task.dataset.rows("train")[1].mean(0),
        samples_per_chunk=samples_per_chunk(task.config),
        placement=placement,
    )
    return float((log_posterior.argmax(1) == context.argmax(1)).mean())


def samples_per_chunk(config: Config) -> int:
    """Samples at a time in the estimation of the NLL: what was fastest on a CPU."""
    return 5 if config.network == "resconv" and jax.default_backend() == "cpu" else 50


def white_of(led: LED) -> int:
    """The value of white in a model's images: 1 for grey levels, which photographs have, else 0."""
    return int(led.decoder.values == "scaled_levels")


@partial(jax.jit, static_argnums=0)
def _pictures(
    led: LED,
    params: Any,
    key: Array,
    images: Array,
    of_samples: Array | None,
    of_images: Array | None,
) -> tuple[Array, Array]:
    """A hundred samples, and rows of ten images, each row above its reconstructions."""
    z_key, reconstruct_key = jax.random.split(key)
    num_draws = (100,) if of_samples is None else ()
    z, _ = led.prior_sample_and_log_prob(params, z_key, num_draws, of_samples)
    samples = led.decode(params, z, of_samples)
    reconstructions = led.reconstruct(params, reconstruct_key, images, of_images)
    blank = jnp.zeros((-len(images) % 10, images.shape[1]))
    rows = (jnp.concatenate([half, blank]) for half in (images, reconstructions))
    return samples, jnp.stack([half.reshape(-1, 10, images.shape[1]) for half in rows], 1)


def draw_pictures(
    config: Config,
    led: LED,
    params: Any,
    dataset: Dataset,
    history: list[dict[str, float]],
    workdir: pathlib.Path,
) -> None:
    """Writes curves.png and, for images, samples.png and reconstructions.png.

    The latter two are also written for TensorBoard. In samples.png of a conditional model, each row
    has one of ten contexts of the validation split; if these are labels, one of ten classes.
    """
    plots.curves(workdir / "curves.png", history)
    x, *contexts = dataset.rows("valid")
    of_samples = of_images = None
    if contexts:
        # np.unique sorts one-hot rows from the last class to the first; this reverses them.
        distinct = jnp.asarray(np.unique(contexts[0], axis=0)[:-11:-1], jnp.float32)
        of_samples = distinct[np.arange(100) // 10 % len(distinct)]
        of_images = jnp.asarray(contexts[0][:50], jnp.float32)
    if not plots.is_image(dataset.image_shape):
        return
    images = jnp.asarray(x[:50], jnp.float32)
    samples, pairs = _pictures(
        led, params, stream(config, "pictures"), images, of_samples, of_images
    )
    with tensorboardX.SummaryWriter(str(workdir)) as board:
        for name, pixels in (("samples", samples), ("reconstructions", pairs)):
            path = workdir / f"{name}.png"
            images = np.asarray(pixels.reshape(-1, *dataset.image_shape))
            plots.image_grid(path, images, 10, white=white_of(led))
            epoch = int(history[-1]["epoch"])
            board.add_image(name, plots.read_image(path), epoch, dataformats="HWC")
