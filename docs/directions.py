"""Draws the directions of the two flows: `python docs/directions.py` writes docs/directions.png."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CHEAP, DEAR = "#2b5c8a", "#b3661a"

# Use of the flow; what is asked of `apply` and of `inverse` while training; what fits.
ROWS = (
    (
        "posterior $q(z|x)$",
        "draws and scores them",
        "not asked for",
        "iaf, planar, Sylvester, real_nvp",
    ),
    ("prior $p(z)$", "samples, afterwards", "scores every draw of z", "real_nvp, invert(iaf)"),
    ("density of data", "samples, afterwards", "scores every row", "real_nvp, invert(iaf)"),
    ("reverse KL fit", "draws and scores them", "not asked for", "iaf, real_nvp"),
)


def main() -> None:
    """Draws the picture."""
    figure = plt.figure(figsize=(8.6, 3.6))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 860), ylim=(360, 0))
    axes.set_axis_off()

    def arrow(start: float, end: float, y: float, asked: bool, text: str) -> None:
        colour = CHEAP if asked else DEAR
        style = {
            "arrowstyle": "-|>",
            "lw": 1.6,
            "color": colour,
            "ls": "-" if asked else (0, (3, 2)),
        }
        axes.annotate("", (end, y), (start, y), arrowprops=style)
        axes.text((start + end) / 2, y - 9, text, ha="center", va="center", size=9, color=colour)

    for x, text in (
        (75, "flow of the"),
        (360, "base and target"),
        (705, "cheap the way it trains"),
    ):
        axes.text(x, 25, text, ha="center", va="center", size=10.5, weight="bold")
    for i, (name, apply, inverse, fits) in enumerate(ROWS):
        y = 75 + 75 * i
        trains_by_apply = inverse == "not asked for"
        axes.text(75, y, name, ha="center", va="center", size=10.5)
        for x in (200, 520):
            axes.plot(x, y, "o", ms=9, color="#444444")
        arrow(212, 508, y - 8, trains_by_apply, f"apply: {apply}")
        arrow(508, 212, y + 20, not trains_by_apply, f"inverse: {inverse}")
        axes.text(705, y, fits, ha="center", va="center", size=9.5, family="monospace")
        axes.plot((20, 840), (y + 36, y + 36), color="#dddddd", lw=0.8)
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
