"""Binary image data: embedded, from files, and from tensorflow-datasets."""

from led_jax.data.dataset import Dataset, binarize, cast, fingerprint, from_arrays
from led_jax.data.loading import load
from led_jax.data.pipeline import gather

__all__ = ["Dataset", "binarize", "cast", "fingerprint", "from_arrays", "gather", "load"]
