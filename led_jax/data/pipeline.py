"""Rows of data that stay on the host, gathered ahead of their use."""

from collections.abc import Iterator, Sequence

import numpy as np

INSTALL = 'pip install "led_jax[experiments]"'


def gather(
    rows: np.ndarray, blocks: Sequence[np.ndarray], *, num_threads: int = 2, num_ahead: int = 2
) -> Iterator[np.ndarray]:
    """Yields `rows[block]` for every block, in their order; threads of grain read ahead.

    Args:
        rows: `[n, ...]`; a memory-mapped array is read block by block.
        blocks: arrays of indices into `rows`.
        num_threads: threads that gather.
        num_ahead: blocks that are held ready.

    Raises:
        ValueError: grain is not installed.
    """
    try:
        # Imported here: it takes seconds that data on the device need not pay.
        import grain  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"data on the host need grain: {INSTALL} ({error})") from error
    dataset = grain.MapDataset.source(blocks).map(lambda block: rows[block])
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_ahead)
    yield from dataset.to_iter_dataset(options)
