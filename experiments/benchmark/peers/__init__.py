"""The same models in other libraries, for `experiments.benchmark` to compare with.

For the suite `training`, a peer is a module `<name>_led` with a function `make_epochs(config,
data)`. It returns the variants worth trying, by name: functions that train for one epoch on data
`[n, 784]` of uint8. Each keeps the bound's three terms of every step, as ours does, and returns
minus the epoch's mean bound when everything is computed. Only the fastest variant counts.

For the suite `flows`, it is a module `<name>_flows` with a function `make_log_prob(stack, key)`. It
returns parameters and a function `(params, x) -> [n]`, the log-density of x `[n, SIZE]` under the
stack's flow of a standard normal; or None, if the library has no such layer.

For the suite `inference`, it is a module `<name>_inference` with a function `make_fit(guide, steps,
batch, learning_rate)`. It returns a function of a key, which fits a new guide and returns the
losses, one for each step or for each hundred steps.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import Array

SIDE = 28  # of an image
PIXELS = SIDE**2
HIDDEN = (200, 200)  # of the fully connected encoder and decoder
FEATURES = (16, 32, 32)  # of the convolutional encoder's blocks
RESCONV_HIDDEN = 450

SIZE = 50  # entries of an event, in the suite `flows`
BINS = 8  # of a spline

LogProb = tuple[Any, Callable[[Any, Array], Array]]
Fit = Callable[[Array], Sequence[float]]


class Stack(NamedTuple):
    """A stack of flow layers in the suite `flows`.

    Attributes:
      layer: "coupling" or "made".
      depth: number of layers.
      transformer: "affine" or "spline" (rational-quadratic).
      sequential: whether scoring takes MADE's sequential direction.
    """

    layer: str
    depth: int
    transformer: str = "affine"
    sequential: bool = False

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of each layer's network."""
        return (100,) if self.layer == "coupling" else (512, 512)


class Guide(NamedTuple):
    """A density to fit in the suite `inference`.

    Attributes:
      kind: "mean_field", "full_rank" or "iaf".
      depth: number of flow layers.
      hidden: widths of each layer's network.
    """

    kind: str
    depth: int = 0
    hidden: tuple[int, ...] = (64, 64)
