"""Data sets: embedded, from arrays and files, and from tensorflow-datasets."""

from led_jax.data.arrays import from_arrays
from led_jax.data.dataset import Dataset, binarize, cast, fingerprint
from led_jax.data.loading import load
from led_jax.data.npz import names_of, read_npz
from led_jax.data.pipeline import gather
from led_jax.data.rows import check_rows

__all__ = [
    "Dataset",
    "binarize",
    "cast",
    "check_rows",
    "fingerprint",
    "from_arrays",
    "gather",
    "load",
    "names_of",
    "read_npz",
]
