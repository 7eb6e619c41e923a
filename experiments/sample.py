r"""Samples from a trained run's prior, or interpolates between draws from it.

    python -m experiments.sample --workdir=RUN --num=64 --output=samples.png
    python -m experiments.sample --workdir=RUN --num=8 --interpolate --output=paths.npz

The directory may be any that `led_jax.save` wrote; no data set is read. An .npz file holds `z`,
`mean`, which is E[x|z], and `x`, drawn from p(x|z). With --interpolate, it holds `mean_z`, the
means along straight lines between two draws of z, and `mean_z0`, those along straight lines between
the images of the two in the base of the prior's flow; `z` and `z0` are the points on these lines. A
.png shows the means. The last line on standard output is one JSON object.

For a model that is conditional on labels, there are --num samples of each class: the second axis of
`z`, `mean` and `x` is that of the classes, and a .png has a column for each class. With
--interpolate, the pairs take the classes in turn.
"""

import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import Array

import led_jax
from experiments import plots
from experiments.flags import (
    check_devices,
    errors_in_a_line,
    output_path,
    required_workdir,
    start,
)
from experiments.run import white_of
from experiments.workdir import read_json, whole
from led_jax.model import LED

flags.DEFINE_string("workdir", "", "Directory of the run.")
_NUM = flags.DEFINE_integer("num", 64, "Samples, or pairs of points to interpolate between.", 1)
_OUTPUT = flags.DEFINE_string("output", "", "File to write, .npz or .png.")
_INTERPOLATE = flags.DEFINE_bool("interpolate", False, "Interpolate between draws of z.")
_STEPS = flags.DEFINE_integer("steps", 10, "Points of an interpolation, both ends included.", 2)
_IMAGE_SHAPE = flags.DEFINE_list(
    "image_shape", [], "H,W of a .png's images, or H,W,3; by default what the run has on record."
)
_LABELS = flags.DEFINE_list("labels", [], "Numbers of the classes to sample; by default all.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.", 0)


def main(argv: list[str]) -> None:
    """Writes what the flags ask for."""
    start(argv)
    workdir = required_workdir()
    with errors_in_a_line():
        check_devices()
        output = output_path(_OUTPUT.value, (".npz", ".png"))
        led, params = led_jax.load(workdir)
        key, context = jax.random.key(_SEED.value), classes(workdir)
        if _INTERPOLATE.value:
            if context is not None:
                context = context[jnp.arange(_NUM.value) % len(context)]
            arrays = interpolate(led, params, key, _NUM.value, _STEPS.value, context)
        else:
            arrays = sample(led, params, key, _NUM.value, context)
        size = arrays["mean_z" if _INTERPOLATE.value else "mean"].shape[-1]
        shape = image_shape(workdir, size, required=output.suffix == ".png")
        arrays = {
            name: array.reshape(*array.shape[:-1], *shape) if name[0] in "mx" else array
            for name, array in jax.device_get(arrays).items()
        }
        with whole(output) as temporary:
            if output.suffix == ".png":
                draw(temporary, arrays, shape, white_of(led))
            else:
                with temporary.open("wb") as file:
                    np.savez(file, **arrays)
    shapes = {name: array.shape for name, array in arrays.items()}
    print(json.dumps({"output": str(output), "seed": _SEED.value, "arrays": shapes}))


def classes(workdir: pathlib.Path) -> Array | None:
    """The contexts of the classes that --labels names; None for a model without a context.

    Raises:
      ValueError: if the run does not have these classes, or is conditional on covariates.
    """
    record = read_json(workdir / "result.json") or {}
    number = record.get("num_classes", 0)
    if record.get("num_covariates"):
        raise ValueError(
            f"{workdir} is conditional on covariates: led_jax.load it, and call its sample(params, "
            "key, context=...)"
        )
    labels = [int(text) if text.strip().isdecimal() else -1 for text in _LABELS.value]
    if not all(0 <= label < number for label in labels):
        raise ValueError(
            f"--labels must be numbers of the run's {number} classes, 0 up to {number - 1}, got "
            f"{','.join(_LABELS.value)!r}"
            if number
            else "--labels go with a run of --condition=labels"
        )
    return jnp.eye(number)[jnp.array(labels or range(number))] if number else None


def sample(
    led: LED, params: Any, key: Array, num: int, context: Array | None = None
) -> dict[str, Array]:
    """Draws z ~ p(z), the means of p(x|z) and draws x ~ p(x|z), one a row.

    The arrays are `[num, ...]`; with contexts `[K, C]`, `[num, K, ...]`.
    """
    z_key, x_key = jax.random.split(key)
    z, _ = led.prior_sample_and_log_prob(params, z_key, (num,), context)
    x = led.decode_sample(params, x_key, z, context)
    if led.decoder.values == "scaled_levels":
        x = jnp.round(255 * x).astype(jnp.uint8)
    return {"z": z, "mean": led.decode(params, z, context), "x": x}


def interpolate(
    led: LED,
    params: Any,
    key: Array,
    num: int,
    steps: int,
    context: Array | None = None,
) -> dict[str, Array]:
    """The means of p(x|z) along straight lines between pairs of draws from the prior.

    `context` is `[num, C]`, one for each pair.

    Returns:
      "z" `[num, steps, *latent_shape]` and "mean_z" `[num, steps, D]`; and if the prior has a
      flow, "z0" and "mean_z0", for the lines between the same ends in the flow's base.
    """
    num_draws = (2, num) if context is None else (2,)
    z, _ = led.prior_sample_and_log_prob(params, key, num_draws, context)
    paths = {"z": _line(z, steps)}
    along = None if context is None else context[:, None]
    paths["mean_z"] = led.decode(params, paths["z"], along)
    if led_jax.descriptions.arguments(led.prior)[0] == "transformed":
        z0, _ = led.prior_inverse(params, z, context)
        paths["z0"] = _line(z0, steps)
        paths["mean_z0"] = led.decode(params, led.prior_apply(params, paths["z0"], along)[0], along)
    return paths


def _line(ends: Array, steps: int) -> Array:
    """Points `[n, steps, ...]` between ends `[2, n, ...]`."""
    return jnp.linspace(ends[0], ends[1], steps, axis=1)


def image_shape(workdir: pathlib.Path, size: int, *, required: bool) -> tuple[int, ...]:
    """The shape of the images: the flag's, else the recorded one, else (size,).

    Raises:
      ValueError: if it does not have `size` entries, or `required` is true and it is not that of an
        image.
    """
    given = _IMAGE_SHAPE.value
    if given and not all(text.strip().isdecimal() for text in given):
        raise ValueError(f"--image_shape must be H,W or H,W,3, got {','.join(given)!r}")
    recorded = (read_json(workdir / "result.json") or {}).get("image_shape", [size])
    shape = tuple(map(int, given)) or tuple(recorded)
    if math.prod(shape) != size:
        source = "--image_shape" if given else f"the image_shape of {workdir / 'result.json'}"
        raise ValueError(f"{source} is {shape}, but the model's x has {size} entries")
    if required and not plots.is_image(shape):
        raise ValueError(
            f"a .png needs images, and x has shape {shape}: give --image_shape=H,W or H,W,3, or "
            "an .npz as --output"
        )
    return shape


def draw(
    path: pathlib.Path, arrays: dict[str, np.ndarray], shape: tuple[int, ...], white: int
) -> None:
    """Draws the arrays of `sample` or of `interpolate`.

    A row has ten means, or one of each class; or it is a line in z, above the one in z0.
    """
    if "mean" in arrays:
        means = arrays["mean"]
        columns = 10 if means.ndim == len(shape) + 1 else means.shape[1]
        plots.image_grid(path, means.reshape(-1, *shape), columns, white=white)
        return
    lines = np.stack([arrays[name] for name in ("mean_z", "mean_z0") if name in arrays], 1)
    plots.image_grid(path, lines.reshape(-1, *shape), lines.shape[2], white=white)


if __name__ == "__main__":
    app.run(main)
