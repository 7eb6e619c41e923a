"""Seeded draws of black and white pixels from grey levels."""

import numpy as np


def random_words(seed: int, stream: int, size: int) -> np.ndarray:
    """Returns uint64 `[size]`, the raw output of PCG64 for this seed and stream.

    NumPy guarantees that raw words never change between versions. It does not guarantee this for
    the methods of `np.random.Generator`.
    """
    # The stream comes first: a seed may take several 32-bit words of entropy, the stream takes one.
    return np.random.PCG64([stream, seed]).random_raw(size)


def check_seed(seed: int) -> None:
    """Raises a ValueError unless the seed is a whole number of 0 or more."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed is {seed!r}, expected 0 or more")


def bernoulli(levels: np.ndarray, top: int, *, seed: int, stream: int) -> np.ndarray:
    """Draws each pixel independently with P(1) = level / top.

    The draw has 16 bits: probabilities are exact for the levels 0 and `top`, and for all levels if
    `top` is a power of two; else they are within 2**-17.

    Args:
        levels: unsigned integers 0..top, of any shape.
        top: the level that is always 1, from 1 to 255.
        seed: non-negative.
        stream: non-negative; streams of one seed are independent.

    Returns:
        uint8 0/1 of the shape of `levels`.
    """
    thresholds = np.rint(np.arange(top + 1) * (65536 / top)).astype(np.uint32)
    words = random_words(seed, stream, -(-levels.size // 4)).astype("<u8", copy=False)
    draws = words.view("<u2")[: levels.size].reshape(levels.shape)
    return (draws < thresholds[levels]).view(np.uint8)
