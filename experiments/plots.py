"""Pictures of runs. Every function writes one PNG."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402


def is_image(shape: Sequence[int]) -> bool:
    """Whether `image_grid` takes images of this shape."""
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))


def image_grid(
    path: str | os.PathLike, images: np.ndarray, columns: int, *, white: int = 0
) -> None:
    """Tiles images.

    Args:
      path: file to write.
      images: `[n, H, W]` or `[n, H, W, 1]` with values between 0 and 1, or `[n, H, W, 3]` in
        colour.
      columns: images in a row; the last row is filled up with white.
      white: the value of white: 0 for drawings, whose ink is 1, or 1 for grey photographs. In
        colour it is 1.
    """
    n, height, width, *colours = images.shape
    if colours == [1]:
        images, colours = images[..., 0], []
    rows = -(-n // columns)
    if colours:
        white = 1
    canvas = np.full((rows * columns, height + 1, width + 1, *colours), float(white))
    canvas[:n, :height, :width] = np.clip(images, 0, 1)
    canvas = canvas.reshape(rows, columns, height + 1, width + 1, *colours).swapaxes(1, 2)
    canvas = canvas.reshape(rows * (height + 1), columns * (width + 1), *colours)
    scale = max(1, 56 // height)
    frame = [(1, 0), (1, 0), *[(0, 0)] * len(colours)]
    canvas = np.pad(canvas, frame, constant_values=white)
    canvas = canvas.repeat(scale, 0).repeat(scale, 1)
    _save_image(path, canvas if colours or not white else 1 - canvas)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture that a function of this module wrote, in red, green and blue: `[H, W, 3]`."""
    return plt.imread(os.fspath(path))[..., :3]


def curves(path: str | os.PathLike, history: Sequence[dict[str, float]]) -> None:
    """The bound and its three terms over training.

    Args:
      path: file to write.
      history: one record an evaluation, with "epoch", "train_elbo", "valid_elbo" and
        the validation's terms "valid_log_likelihood", "valid_log_prior", "valid_log_posterior".
    """
    epochs = [record["epoch"] for record in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name in ("train_elbo", "valid_elbo"):  # Not every objective reports "elbo".
        values = [record.get(name, math.nan) for record in history]
        left.plot(epochs, values, label=name.replace("_", " "))
    settled = [record["valid_elbo"] for record in history[len(history) // 20 :]]
    top = max(*settled, history[-1].get("train_elbo", settled[-1]))
    left.set_ylim(min(settled), top + 0.05 * (top - min(settled)) + 1e-3)
    left.set(xlabel="epoch", ylabel="nats", title="evidence lower bound")
    for name in ("log_likelihood", "log_prior", "log_posterior"):
        right.plot(
            epochs, [record[f"valid_{name}"] for record in history], label=name.replace("_", " ")
        )
    right.set(xlabel="epoch", title="its terms on the validation split")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    _save_figure(path, figure)


def depth_curves(
    path: str | os.PathLike,
    columns: Mapping[
        str,
        tuple[Sequence[int], Sequence[float], Sequence[float], Sequence[float], Sequence[int]],
    ],
) -> None:
    """Test NLL against depth, ours and the paper's, a pair of lines for each column of a table.

    Models trained for different numbers of epochs are not comparable: if the numbers differ within
    a column, no line joins our points, and each is labelled with its number.

    Args:
      path: file to write.
      columns: title -> (depths, our NLLs, their standard errors over seeds or test points, the
        paper's NLLs, our numbers of epochs).
    """
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for i, (title, (depths, ours, errors, paper, epochs)) in enumerate(columns.items()):
        color, joined = f"C{i}", len(set(epochs)) == 1
        axes.errorbar(
            depths,
            ours,
            errors,
            marker="o",
            ls="-" if joined else "none",
            color=color,
            label=f"{title}, led_jax",
        )
        for depth, nll, number in () if joined else zip(depths, ours, epochs, strict=True):
            axes.annotate(
                f"{number} epochs",
                (depth, nll),
                (5, -9),
                textcoords="offset points",
                fontsize="x-small",
                color=color,
            )
        axes.plot(depths, paper, marker="x", ls="--", color=color, label=f"{title}, paper")
    axes.set(xlabel="number of flow layers", ylabel="test NLL (nats, lower is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.17)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    _save_figure(path, figure)


def nats(
    path: str | os.PathLike,
    models: Mapping[str, Sequence[tuple[float, Mapping[str, float]]]],
) -> None:
    """The parts of each model's negative bound as stacked bars, and its NLL as a mark.

    The part of a bar beyond the mark is the gap between bound and NLL. Marks and bars are means
    over seeds; error bars are standard errors over seeds, if there are two or more. A bar of more
    than 1.5 times the median is cut off, and says how long it is.

    Args:
      path: file to write.
      models: title -> for each seed (test NLL, the nats of each part by its name).
    """
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.32 * len(models)), layout="constrained")
    names = dict.fromkeys(name for seeds in models.values() for _, parts in seeds for name in parts)
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    bounds = [float(np.mean([sum(parts.values()) for _, parts in m])) for m in models.values()]
    limit = 1.5 * float(np.median(bounds))
    for row, seeds in enumerate(models.values()):
        left = 0.0
        for name in names:
            values = [parts[name] for _, parts in seeds if name in parts]
            if values:
                width, error = _mean_and_error(values)
                axes.barh(row, width, 0.7, left, xerr=error, color=colors[name], ecolor="0.4")
                left += width
        nll, error = _mean_and_error([nll for nll, _ in seeds])
        axes.errorbar(nll, row, xerr=error, marker="|", ms=14, mew=2, color="black")
    if max(bounds) > limit:
        axes.set_xlim(0, limit)
    for row, bound in enumerate(bounds):
        if bound > limit:
            text = f"{bound:.0f} \u2192"
            axes.text(0.99 * limit, row, text, ha="right", va="center", color="white")
    mark = Line2D([], [], marker="|", ms=10, mew=2, ls="none", color="black")
    handles = [*(Rectangle((0, 0), 1, 1, color=color) for color in colors.values()), mark]
    axes.set_yticks(range(len(models)), list(models))
    axes.invert_yaxis()
    axes.set_xlabel("nats of the test split")
    figure.legend(handles, [*names, "NLL"], loc="outside upper center", ncols=len(names) + 1)
    _save_figure(path, figure)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over seeds and its standard error, None for one seed."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / n**0.5) if n > 1 else None


def grid_lines(
    path: str | os.PathLike,
    flag: str,
    values: Sequence[str],
    lines: Mapping[str, Sequence[tuple[str, float, float]]],
) -> None:
    """Test NLL against the values of a flag, a line for each combination of the other flags.

    Args:
      path: file to write.
      flag: its name.
      values: its values, at equal distances.
      lines: label -> (value, NLL, standard error over seeds or 0).
    """
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for label, points in lines.items():
        places = [values.index(value) for value, _, _ in points]
        nlls, errors = ([point[i] for point in points] for i in (1, 2))
        axes.errorbar(places, nlls, errors, marker="o", capsize=3, label=label)
    axes.set_xticks(range(len(values)), values)
    axes.set(xlabel=flag, ylabel="test NLL (nats, lower is better)")
    axes.grid(alpha=0.3)
    if any(lines):
        figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    _save_figure(path, figure)


def gains(
    path: str | os.PathLike, models: Mapping[str, Mapping[str, tuple[float, float]]], label: str
) -> None:
    """The gain of each model over a reference model, with a panel for each problem.

    Args:
      path: file to write.
      models: model -> problem -> (gain, standard error).
      label: what the gain is, with its unit.
    """
    problems = list(dict.fromkeys(problem for points in models.values() for problem in points))
    figure, panels = plt.subplots(
        1,
        len(problems),
        figsize=(2.4 * len(problems) + 1, 3.2),
        layout="constrained",
        squeeze=False,
    )
    for axes, problem in zip(panels[0], problems, strict=True):
        for i, points in enumerate(models.values()):
            gain, error = points[problem]
            axes.errorbar([gain], [-i], xerr=[error], marker="o", capsize=3)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_yticks([-i for i in range(len(models))], models if axes is panels[0][0] else [])
        axes.set_title(problem, fontsize="medium")
        axes.set_ylim(0.5 - len(models), 0.5)
        axes.grid(alpha=0.3)
    figure.supxlabel(label, fontsize="medium")
    _save_figure(path, figure)


def errors(
    path: str | os.PathLike,
    problems: Mapping[str, Mapping[str, tuple[float, bool]]],
    label: str,
    limit: float,
) -> None:
    """The error of each model, with a row for each problem.

    Args:
      path: file to write.
      problems: problem -> model -> (error, whether the model's own diagnostic trusts it; else its
        marker is hollow).
      label: what the error is, with its unit.
      limit: a small error to compare with, drawn as a line.
    """
    models = list(dict.fromkeys(model for points in problems.values() for model in points))
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(problems) + 1.6), layout="constrained")
    for i, model in enumerate(models):
        for row, points in enumerate(problems.values()):
            if model in points:
                error, trusted = points[model]
                height = row + 0.6 * ((i + 0.5) / len(models) - 0.5)
                fill = f"C{i}" if trusted else "none"
                axes.plot(error, height, "o", color=f"C{i}", markerfacecolor=fill)
    for row in range(1, len(problems)):
        axes.axhline(row - 0.5, color="0.85", linewidth=0.8)
    axes.axvline(limit, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel=label, ylim=(len(problems) - 0.5, -0.5))
    axes.set_yticks(range(len(problems)), list(problems))
    handles = [Line2D([], [], marker="o", ls="none", color=f"C{i}") for i in range(len(models))]
    figure.legend(handles, models, loc="outside upper center", ncols=3, fontsize="small")
    _save_figure(path, figure)


class Panel(NamedTuple):
    """A density over a part of the plane.

    Attributes:
      title: what stands above it.
      density: `[H, W]`, from the bottom row to the top one.
      extent: (left, right, bottom, top).
      contours: `[H, W]`, a second density, drawn as lines; None for none.
    """

    title: str
    density: np.ndarray
    extent: tuple[float, float, float, float]
    contours: np.ndarray | None = None


def density_maps(path: str | os.PathLike, rows: Sequence[Sequence[Panel]]) -> None:
    """Densities over the plane, each on a color scale of its own from 0 to its maximum.

    Args:
      path: file to write.
      rows: panels, rows from top to bottom, all of one length.
    """
    shape = len(rows), len(rows[0])
    size = (2.1 * shape[1], 2.3 * shape[0])
    colors = plt.get_cmap("Blues", 32)  # Few enough that the file stays small.
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for panels, axes_row in zip(rows, grid, strict=True):
        for panel, axes in zip(panels, axes_row, strict=True):
            axes.imshow(
                panel.density,
                extent=panel.extent,
                origin="lower",
                cmap=colors,
                vmin=0,
                interpolation="bilinear",
                interpolation_stage="data",
            )
            if panel.contours is not None:
                levels = panel.contours.max() * np.array([0.05, 0.3, 0.8])
                axes.contour(
                    panel.contours,
                    levels,
                    extent=panel.extent,
                    colors="C1",
                    linewidths=1,
                )
            axes.set_title(panel.title, fontsize=9)
            axes.tick_params(labelsize=7)
    _save_figure(path, figure)


def marginal_matching(
    path: str | os.PathLike,
    depths: Sequence[int],
    terms: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    samples: Mapping[str, np.ndarray],
) -> None:
    """Parts of the KL against the prior's depth, and rows of images for each depth.

    Args:
      path: file to write.
      depths: number of prior layers of each run.
      terms: label -> (values in nats, standard errors), one a run.
      samples: title -> images `[runs, columns, H, W]` between 0 (white) and 1 (black).
    """
    ratios = [1.4, *(1 for _ in samples)]
    figure, axes = plt.subplots(
        1, len(ratios), figsize=(11, 3.4), width_ratios=ratios, layout="constrained"
    )
    for label, (values, errors) in terms.items():
        axes[0].errorbar(depths, values, errors, marker="o", label=label)
    axes[0].set(xlabel="number of prior layers", ylabel="nats", ylim=(0, None))
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    for side, (title, images) in zip(axes[1:], samples.items(), strict=True):
        rows, columns, height, width = images.shape
        canvas = images.swapaxes(1, 2).reshape(rows * height, columns * width)
        side.imshow(canvas, cmap="gray_r", vmin=0, vmax=1)
        side.set_yticks((np.arange(rows) + 0.5) * height, [f"{d} layers" for d in depths])
        side.set_xticks([])
        side.set_title(title)
    _save_figure(path, figure)


def fits(
    path: str | os.PathLike,
    pictures: dict[str, np.ndarray],
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
) -> None:
    """Densities fitted to targets, and their divergences against the capacity of the fits.

    Args:
      path: file to write.
      pictures: row -> densities `[targets, H, W]`; a target's pictures share their grey levels.
      curves: title -> label -> KL in nats and its standard error, by growing capacity. The first
        titles are those of the pictures' targets. Labels are "name, direction"; those of one name
        share a colour.
    """
    columns, rows = len(curves), len(pictures)
    figure, axes = plt.subplots(
        rows + 1,
        columns,
        figsize=(1.9 * columns, 1.75 * rows + 2.9),
        height_ratios=[1] * rows + [1.6],
        layout="constrained",
        squeeze=False,
    )
    brightest = next(iter(pictures.values())).max((1, 2))
    for row, (name, images) in zip(axes, pictures.items(), strict=False):
        row[0].set_ylabel(name.replace("_", " "))
        for image_axes, image, level in zip(row, images, brightest, strict=False):
            image_axes.imshow(image, origin="lower", cmap="gray_r", vmin=0, vmax=level)
            image_axes.set(xticks=[], yticks=[])
        for empty in row[len(images) :]:
            empty.axis("off")
    names = list(dict.fromkeys(label.split(", ")[0] for part in curves.values() for label in part))
    for bottom, (title, lines) in zip(axes[-1], curves.items(), strict=True):
        for label, points in lines.items():
            name, direction = label.split(", ")
            values, errors = np.array(points).T
            bottom.errorbar(
                np.arange(1, len(points) + 1),
                np.maximum(values, 1e-4),  # An estimate may fall below zero.
                errors,
                marker="o",
                markersize=3,
                color=f"C{names.index(name)}",
                linestyle="-" if direction == "forward" else "--",
                label=label.replace("_", " "),
            )
        bottom.axhline(0.01, color="grey", linewidth=0.8, linestyle=":")
        bottom.set(yscale="log", ylim=(5e-5, 5), xlabel="capacity")
        bottom.set(xticks=range(1, max(map(len, lines.values())) + 1))
        bottom.set_title(title, fontsize="medium")
        bottom.grid(alpha=0.3)
    axes[-1, 0].set_ylabel("KL (nats)")
    figure.legend(*axes[-1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _save_figure(path, figure)


def _save_image(path: str | os.PathLike, canvas: np.ndarray) -> None:
    plt.imsave(path, canvas, cmap="gray_r", vmin=0, vmax=1, format="png")


def _save_figure(path: str | os.PathLike, figure: Figure) -> None:
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
