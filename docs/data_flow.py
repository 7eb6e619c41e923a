"""Draws how a LED is put together: `python docs/data_flow.py` writes docs/data_flow.png."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

NETWORK, FLOW = ("#dbe9f6", "#2b5c8a"), ("#fde6cf", "#b3661a")


def main() -> None:
    """Draws the picture."""
    figure = plt.figure(figsize=(8.6, 3.1))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 860), ylim=(310, 0))
    axes.set_axis_off()

    def box(x: float, y: float, name: str, kind: str, colours: tuple[str, str]) -> None:
        face, edge = colours
        style = "round,pad=0,rounding_size=6"
        axes.add_patch(FancyBboxPatch((x, y), 150, 60, boxstyle=style, fc=face, ec=edge, lw=1.5))
        axes.text(x + 75, y + 24, name, ha="center", va="center", size=11)
        axes.text(x + 75, y + 44, kind, ha="center", va="center", size=8.5)

    def arrow(*points: tuple[float, float], style: str = "-|>", line: str = "-") -> None:
        for start, end in zip(points, points[1:], strict=False):
            last = end == points[-1]
            axes.annotate(
                "",
                end,
                start,
                arrowprops={
                    "arrowstyle": style if last else "-",
                    "lw": 1.5,
                    "ls": line,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )

    def note(x: float, y: float, text: str) -> None:
        axes.text(x, y, text, ha="center", va="center", size=9, color="#444444")

    box(80, 75, "encoder", "mean, scale, context", NETWORK)
    box(340, 75, "posterior flow g", "inverse autoregressive", FLOW)
    box(625, 75, "decoder", "network and likelihood", NETWORK)
    box(340, 205, "prior flow h", "Real NVP", FLOW)
    for x, y, name in (
        (30, 105, "$x$"),
        (283, 105, "$z'$"),
        (562, 105, "$z$"),
        (283, 235, "$z_0$"),
        (832, 105, "$p(x|z)$"),
    ):
        axes.text(x, y, name, ha="center", va="center", size=13)
    arrow((45, 105), (80, 105))
    arrow((230, 105), (268, 105))
    arrow((300, 105), (340, 105))
    arrow((490, 105), (547, 105))
    arrow((577, 105), (625, 105))
    arrow((775, 105), (800, 105))
    arrow((300, 235), (340, 235), style="<|-|>")
    arrow((562, 235), (490, 235))
    arrow((562, 235), (562, 122))
    arrow((490, 58), (340, 58), line=(0, (3, 2)))
    note(415, 40, "back: a pass for each entry; the ELBO asks for it under a VampPrior alone")
    note(155, 155, "$z' \\sim N(mean, scale^2)$")
    note(415, 155, "$z = g(z')$: one pass")
    note(150, 235, "$z_0 \\sim N(0, I)$, or any density")
    note(415, 290, "$z = h(z_0)$ to sample, $z_0 = h^{-1}(z)$ to score: one pass each")
    note(715, 195, "ELBO $= \\log p(x|z) + \\log p(z) - \\log q(z|x)$")
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
