"""Rows of data that stay on the host, gathered ahead of their use."""

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
        blocks: say arrays of indices into rows.
        read: what turns a block into rows; a memory-mapped array is read block by block.
        num_threads: threads that read.
        num_ahead: blocks that are held ready.

    Raises:
        ValueError: grain is not installed.
    """
    try:
        # Imported here: it takes seconds that data on the device need not pay.
        import grain  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"data on the host need grain: {INSTALL} ({error})") from error
    dataset = grain.MapDataset.source(blocks).map(read)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_ahead)
    yield from dataset.to_iter_dataset(options)
