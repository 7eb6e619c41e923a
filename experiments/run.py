"""One run, from a configuration to a result: training, selection, evaluation and pictures."""

import json
import pathlib
import statistics
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorboardX
import tqdm
from jax import Array

from experiments import provenance
from experiments.config import Config, build_led, check_workdir, read_json, write_json
from led_jax import checkpoints, data, objectives, plots, training
from led_jax.data import Dataset
from led_jax.model import LED
from led_jax.training import TrainState

_SAVE_SECONDS = 60.0


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains one configuration, or goes on where it stopped, and evaluates its best state.

    Args:
      config: the run.
      workdir: directory of the run; a finished one is not run again.

    Returns:
      The run's result, as in `workdir / "result.json"`.

    Raises:
      ValueError: if `workdir` or the data do not belong to this configuration.
      FloatingPointError: if the bound is no longer finite.
    """
    check_workdir(config, workdir)
    result_path = workdir / "result.json"
    result = read_json(result_path)
    if result is not None and result["nll_samples"] == config.nll_samples:
        return result
    dataset = load_data(config)
    led = build_led(config, dataset)
    optimizer = make_optimizer(config, dataset)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", vars(config))

    best, log = fit(config, led, optimizer, dataset, workdir)
    best_record = max(log["history"], key=lambda record: record["valid_elbo"])
    estimate = estimate_nll(led, best.params, dataset.test, config)
    draw_pictures(config, led, best.params, dataset, log["history"], workdir)
    seconds = log["epoch_seconds"]
    result = {
        "dataset": config.dataset,
        "network": config.network,
        "latent_dim": config.latent_dim,
        "prior": config.prior,
        "prior_depth": config.prior_depth,
        "posterior": config.posterior,
        "posterior_depth": config.posterior_depth,
        "seed": config.seed,
        "epochs": config.epochs,
        "best_epoch": best_record["epoch"],
        "valid_elbo": best_record["valid_elbo"],
        "test_elbo": estimate.elbo,
        "nll": estimate.nll,
        "nll_se": estimate.standard_error,
        "nll_monte_carlo_se": estimate.monte_carlo_error,
        "nll_samples": config.nll_samples,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(best.params)),
        "compile_seconds": log["compile_seconds"],
        "seconds_per_epoch": statistics.median(seconds[1:] or seconds),
        "seconds_train": log["seconds_train"],
        **provenance.origin(config.to_command()),
    }
    write_json(result_path, result)
    return result


def load_data(config: Config) -> Dataset:
    """The data set of a configuration."""
    return data.load(config.dataset, data_dir=config.data_dir or None, binarize=config.binarize)


def fit(
    config: Config,
    led: LED,
    optimizer: optax.GradientTransformation,
    dataset: Dataset,
    workdir: pathlib.Path,
) -> tuple[TrainState, dict[str, Any]]:
    """Trains from the newest checkpoint in `workdir`, or from scratch.

    Returns:
      The state with the best validation ELBO, and the log: "history" (a record an evaluation),
      "epoch_seconds", "compile_seconds" and "seconds_train".
    """
    train_rows, valid_rows = jnp.asarray(dataset.train), jnp.asarray(dataset.valid)
    key = jax.random.key(config.seed)
    fingerprint = data.fingerprint(dataset)

    def fresh_state() -> TrainState:
        return training.init_state(led, optimizer, key, train_rows[: config.batch_size])

    directory = workdir / "checkpoints"
    restored = checkpoints.restore(directory, jax.eval_shape(fresh_state))
    if restored is None:
        state = best = fresh_state()
        log: dict[str, Any] = {
            "history": [],
            "epoch_seconds": [],
            "seconds_train": 0.0,
            "fingerprint": fingerprint,
        }
    else:
        state, best, log = restored
        _check_fingerprint(log, fingerprint, workdir)
        state, best = jax.device_put((state, best))
    first_epoch = int(state.epoch)
    if first_epoch == config.epochs:
        return best, log

    start = time.perf_counter()
    train_epoch = (
        training.make_epoch(
            led,
            optimizer,
            config.batch_size,
            dynamic=dataset.dynamic,
            kl_warmup=config.kl_warmup * config.epochs,
        )
        .lower(state, train_rows)
        .compile()
    )
    evaluate = training.make_evaluate(led)
    log["compile_seconds"] = time.perf_counter() - start
    # Epochs are donated their state, so the best one needs buffers of its own.
    best = jax.tree.map(jnp.copy, best)
    best_elbo = max((r["valid_elbo"] for r in log["history"]), default=-np.inf)
    eval_every = max(1, config.epochs // 100)
    metrics = (workdir / "metrics.jsonl").open("w")
    metrics.writelines(json.dumps(record) + "\n" for record in log["history"])
    started = saved = time.perf_counter()
    seconds_before = log["seconds_train"]
    with (
        metrics,
        tensorboardX.SummaryWriter(str(workdir), purge_step=first_epoch + 1) as board,
        tqdm.tqdm(total=config.epochs, initial=first_epoch, unit="epoch", desc="train") as bar,
    ):
        for epoch in range(first_epoch + 1, config.epochs + 1):
            epoch_start = time.perf_counter()
            state, train_terms = train_epoch(state, train_rows)
            train_elbo = float(train_terms.bound)
            log["epoch_seconds"].append(time.perf_counter() - epoch_start)
            bar.update()
            _check_finite("training", train_elbo, epoch)
            if epoch % eval_every and epoch != config.epochs:
                continue
            valid_key = jax.random.fold_in(stream(config, "validation"), epoch)
            terms = evaluate(state.params, valid_key, valid_rows)
            record = {
                "epoch": epoch,
                "train_elbo": train_elbo,
                "valid_elbo": float(terms.bound),
                **{name: float(value) for name, value in terms._asdict().items()},
            }
            _check_finite("validation", record["valid_elbo"], epoch)
            log["history"].append(record)
            if record["valid_elbo"] > best_elbo:
                best_elbo, best = record["valid_elbo"], jax.tree.map(jnp.copy, state)
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            for name, value in record.items():
                board.add_scalar(name, value, epoch)
            bar.set_postfix(train=f"{train_elbo:.2f}", valid=f"{record['valid_elbo']:.2f}")
            now = time.perf_counter()
            log["seconds_train"] = seconds_before + now - started
            if now - saved > _SAVE_SECONDS or epoch == config.epochs:
                checkpoints.save(directory, state, best, log)
                saved = now
    return best, log


def stream(config: Config, name: str) -> Array:
    """The key of a run's randomness outside training, one for each name."""
    return jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))


def _check_fingerprint(log: dict[str, Any], fingerprint: str, workdir: pathlib.Path) -> None:
    if log["fingerprint"] != fingerprint:
        raise ValueError(
            f"{workdir} was trained on other data than --dataset and --data_dir now give; files "
            "and tensorflow-datasets hold binarized_mnist in different orders"
        )


def _check_finite(split: str, elbo: float, epoch: int) -> None:
    if not np.isfinite(elbo):
        raise FloatingPointError(
            f"the {split} ELBO is {elbo} in epoch {epoch}. Start again in a new --workdir with a "
            "lower --learning_rate, or with --clip_norm"
        )


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
        config.epochs * steps_per_epoch,
        warmup_steps=round(config.warmup * config.epochs * steps_per_epoch),
        clip_norm=config.clip_norm or None,
    )


def load_run(config: Config, workdir: pathlib.Path) -> tuple[LED, Dataset, TrainState]:
    """The model, the data and the best state of a run on disk.

    Raises:
      ValueError: if there is no checkpoint, or it belongs to another configuration.
    """
    dataset = load_data(config)
    led = build_led(config, dataset)
    like = jax.eval_shape(
        lambda: training.init_state(
            led,
            make_optimizer(config, dataset),
            jax.random.key(config.seed),
            jnp.asarray(dataset.train[: config.batch_size]),
        )
    )
    restored = checkpoints.restore(workdir / "checkpoints", like)
    if restored is None:
        raise ValueError(f"{workdir} has no checkpoint yet")
    _check_fingerprint(restored[2], data.fingerprint(dataset), workdir)
    return led, dataset, jax.device_put(restored[1])


def estimate_nll(led: LED, params: Any, split: np.ndarray, config: Config) -> objectives.NLL:
    """The importance-sampled NLL of a split, with a progress bar."""
    with tqdm.tqdm(total=len(split), unit="image", desc="nll") as bar:
        return objectives.nll(
            led,
            params,
            stream(config, "nll"),
            split,
            config.nll_samples,
            progress=bar.update,
        )


def draw_pictures(
    config: Config,
    led: LED,
    params: Any,
    dataset: Dataset,
    history: list[dict[str, float]],
    workdir: pathlib.Path,
) -> None:
    """Writes samples.png, reconstructions.png and curves.png."""
    z_key, reconstruct_key = jax.random.split(stream(config, "pictures"))
    z, _ = led.prior.sample_and_log_prob(params["prior"], z_key, (100,))
    samples = led.decoder.mean(params["decoder"], z)
    images = jnp.asarray(dataset.valid[:50], jnp.float32)
    reconstructions = led.reconstruct(params, reconstruct_key, images)
    # Rows of ten images, each row above its reconstructions.
    blank = jnp.zeros((-len(images) % 10, images.shape[1]))
    rows = (jnp.concatenate([half, blank]) for half in (images, reconstructions))
    pairs = jnp.stack([half.reshape(-1, 10, images.shape[1]) for half in rows], 1)
    for name, pixels in (("samples", samples), ("reconstructions", pairs)):
        plots.image_grid(
            workdir / f"{name}.png", np.asarray(pixels.reshape(-1, *dataset.image_shape)), 10
        )
    plots.curves(workdir / "curves.png", history)
