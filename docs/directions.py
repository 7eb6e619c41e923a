"""Draws the directions of the two flows: `python docs/directions.py` writes docs/directions.png."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CHEAP, DEAR = "#2b5c8a", "#b3661a"

# Use of the flow; the direction that training uses; what it and the other direction are used for;
# flows that fit.
ROWS = (
    (
        "posterior $q(z|x)$",
        "apply",
        "draws and scores them",
        "not asked for",
        "iaf, planar, Sylvester, real_nvp",
    ),
    (
        "prior $p(z)$",
        "inverse",
        "scores every draw of z",
        "samples, afterwards",
        "real_nvp, invert(iaf)",
    ),
    (
        "density of data",
        "inverse",
        "scores every row",
        "samples, afterwards",
        "real_nvp, invert(iaf)",
    ),
    ("reverse KL fit", "apply", "draws and scores them", "not asked for", "iaf, real_nvp"),
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
    for i, (name, trained, training, otherwise, fits) in enumerate(ROWS):
        y = 75 + 75 * i
        axes.text(75, y, name, ha="center", va="center", size=10.5)
        for x in (200, 520):
            axes.plot(x, y, "o", ms=9, color="#444444")
        for direction, start, end, height in (("apply", 212, 508, -8), ("inverse", 508, 212, 20)):
            asked = direction == trained
            text = f"{direction}: {training if asked else otherwise}"
            arrow(start, end, y + height, asked, text)
        axes.text(705, y, fits, ha="center", va="center", size=9.5, family="monospace")
        axes.plot((20, 840), (y + 36, y + 36), color="#dddddd", lw=0.8)
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
