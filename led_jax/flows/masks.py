"""Binary masks for coupling layers and degrees for autoregressive networks.

A mask is a boolean array of the event's shape; True marks the entries that a coupling layer leaves
unchanged and conditions on. All are NumPy constants made from static arguments.
"""

import numpy as np

from led_jax.checks import checked


@checked
def random_half(event_shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A mask of D // 2 entries drawn at random from the event's D.

    >>> int(random_half((2, 3), seed=0).sum())
    3

    Args:
      event_shape: shape of the event.
      seed: seed of NumPy's default generator; the same seed gives the same mask in every process.
    """
    size = int(np.prod(event_shape))
    mask = np.zeros(size, bool)
    mask[np.random.default_rng(seed).permutation(size)[: size // 2]] = True
    return mask.reshape(event_shape)


@checked
def checkerboard(event_shape: tuple[int, ...]) -> np.ndarray:
    """A mask that alternates along the rows and columns of an `[H, W, C]` or `[H, W]` event.

    Dinh, Sohl-Dickstein and Bengio (2016), figure 3 left, https://arxiv.org/abs/1605.08803.
    Entry (0, 0) is False, so that the mask never has more than half of the positions.

    >>> checkerboard((2, 3, 1))[..., 0].astype(int).tolist()
    [[0, 1, 0], [1, 0, 1]]

    Raises:
      ValueError: if the event has neither two nor three axes.
    """
    if len(event_shape) not in (2, 3):
        raise ValueError(
            f"checkerboard: expected an event_shape [H, W] or [H, W, C], got {event_shape}"
        )
    rows, columns = np.indices(event_shape[:2])
    mask = (rows + columns) % 2 == 1
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(event_shape) - 2)), event_shape)


@checked
def channel(event_shape: tuple[int, ...]) -> np.ndarray:
    """A mask of the first half of the last axis.

    Dinh, Sohl-Dickstein and Bengio (2016), figure 3 right, https://arxiv.org/abs/1605.08803.

    >>> channel((1, 1, 4))[0, 0].astype(int).tolist()
    [1, 1, 0, 0]

    Raises:
      ValueError: if the event has no axis.
    """
    if not event_shape:
        raise ValueError("channel: event_shape must have one axis or more, got ()")
    return np.broadcast_to(np.arange(event_shape[-1]) < event_shape[-1] // 2, event_shape)


def hidden_degrees(size: int, event_size: int, *, lowest: int = 1) -> np.ndarray:
    """Degrees of a MADE's hidden layer, in ascending order.

    A unit of degree m sees the inputs 1..m. Germain et al. (2015), eq. 8,
    https://arxiv.org/abs/1502.03509, with the degrees spread evenly rather than drawn. If there are
    two units or more for each degree, half of the units have degrees in the lower half of the
    range and the other half in the upper half, so that a masked product splits into two blocks of
    equal width.

    >>> hidden_degrees(4, 5).tolist()
    [1, 2, 3, 4]

    Args:
      size: number of hidden units.
      event_size: number D of inputs.
      lowest: smallest degree; units of degree 0 see no input, only the context.

    Returns:
      Integers `[size]` between min(lowest, D - 1) and D - 1.
    """
    degrees = np.arange(min(lowest, event_size - 1), event_size)
    if size < 2 * len(degrees) or len(degrees) == 1:
        return _spread(degrees, size)
    low, high = np.array_split(degrees, 2)
    return np.concatenate([_spread(low, size // 2), _spread(high, size - size // 2)])


def _spread(degrees: np.ndarray, size: int) -> np.ndarray:
    return degrees[np.arange(size) * len(degrees) // size]
