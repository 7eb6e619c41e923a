"""Prefetching of rows of data that stay in the host's memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

INSTALL = 'pip install "led_jax[experiments]"'

Block = TypeVar("Block")
Rows = TypeVar("Rows")


def gather(
    blocks: Sequence[Block],
    read: Callable[[Block], Rows],
    *,
    num_threads: int = 2,
    num_ahead: int = 2,
) -> Iterator[Rows]:
    """Yields `read(block)` for every block, in their order; threads of grain read ahead.

    Args:
        blocks: descriptions of what to read, such as arrays of indices into rows.
        read: turns a block into rows; a memory-mapped array is read block by block.
        num_threads: number of threads that read.
        num_ahead: number of blocks that are read in advance.

    Raises:
        ValueError: grain is not installed.
    """
    try:
        # Imported here: it takes seconds, which data on the device need not wait for.
        import grain  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"data on the host need grain: {INSTALL} ({error})") from error
    dataset = grain.MapDataset.source(blocks).map(read)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_ahead)
    yield from dataset.to_iter_dataset(options)
