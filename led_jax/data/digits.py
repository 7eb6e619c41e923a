"""scikit-learn's 8 x 8 digits: the data set that needs no download."""

import numpy as np

from led_jax.data.contexts import make_context
from led_jax.data.dataset import SPLITS, Dataset, binarize, from_rows
from led_jax.data.draws import bernoulli, random_words

_TOP = 16
_TRAIN, _VALID = 1297, 250
_ORDER_STREAM = 3  # streams 0, 1, 2 draw the pixels of train, valid, test


def load_digits(*, dynamic: bool = False, seed: int = 0, condition: str = "") -> Dataset:
    """Loads scikit-learn's `load_digits`, 1,797 images of 8 x 8 pixels with levels 0..16.

    The split is the same for every seed (1,297 / 250 / 250, in a fixed shuffled order): no seed
    ever trains on another's test images.

    Args:
        dynamic: keep `train` as grey levels, scaled to 0..255.
        seed: seed of the binarization draw, with P(1) = level / 16.
        condition: "labels" makes the digits the context of a conditional model.

    Returns:
        The data set `digits`, with rows of 64 pixels.
    """
    # Imported here: it takes a second, which other data sets need not wait for.
    from sklearn import datasets

    levels, labels = (np.asarray(a, np.uint8) for a in datasets.load_digits(return_X_y=True))
    order = np.argsort(random_words(0, _ORDER_STREAM, len(levels)), kind="stable")
    splits, labels = (np.split(a[order], [_TRAIN, _TRAIN + _VALID]) for a in (levels, labels))
    train, valid, test = (
        bernoulli(split, _TOP, seed=seed, stream=stream) for stream, split in enumerate(splits)
    )
    dataset = from_rows("digits", (8, 8), train, valid, test)
    if dynamic:
        train = (splits[0].astype(np.uint16) * 255 + _TOP // 2) // _TOP
        dataset = from_rows("digits", (8, 8), train, valid, test, prepare=binarize, top=255)
    if condition:
        sizes = {key: len(dataset.rows(key)[0]) for key in SPLITS}
        context = make_context("digits", dict(zip(SPLITS, labels, strict=True)), sizes)
        dataset = dataset._replace(context=context)
    return dataset
