import numpy as np
import pytest

from led_jax import data

pytest.importorskip("grain")


def test_blocks_come_in_their_order_and_whole(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (500, 7), np.uint8)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    blocks = [rng.permutation(500)[:n].reshape(-1, 5) for n in (200, 200, 35)] * 5
    for source in (rows, mapped):
        found = list(data.gather(blocks, lambda block, rows=source: rows[block]))
        assert len(found) == 15
        for x, block in zip(found, blocks, strict=True):
            np.testing.assert_array_equal(x, rows[block])
    assert list(data.gather([], lambda block: rows[block])) == []
