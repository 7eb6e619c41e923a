"""The real binarized MNIST, where LED_JAX_DATA_DIR names a directory that holds it."""

import os
from pathlib import Path

import numpy as np
import pytest


def amat(rows: np.ndarray) -> bytes:
    """The published text format: one line of `0 1 ... 0` per image."""
    text = np.full((rows.shape[0], 2 * rows.shape[1]), ord(" "), np.uint8)
    text[:, ::2] = rows + ord("0")
    text[:, -1] = ord("\n")
    return text.tobytes()


@pytest.fixture(scope="session")
def write_amat():
    return amat


@pytest.fixture(scope="session")
def real_dir() -> str:
    data_dir = os.environ.get("LED_JAX_DATA_DIR", "")
    if not Path(data_dir, "binarized_mnist_packed.npz").is_file():
        pytest.skip("LED_JAX_DATA_DIR names no directory with binarized_mnist_packed.npz")
    return data_dir


@pytest.fixture(scope="session")
def real_rows(real_dir) -> dict[str, np.ndarray]:
    with np.load(Path(real_dir, "binarized_mnist_packed.npz"), allow_pickle=False) as packed:
        return {split: np.unpackbits(packed[split], axis=1) for split in packed.files}


@pytest.fixture(scope="session")
def real_amat_dir(real_rows, tmp_path_factory) -> Path:
    """The three published files, written once for all tests (110 MB)."""
    directory = tmp_path_factory.mktemp("amat")
    for split, rows in real_rows.items():
        (directory / f"binarized_mnist_{split}.amat").write_bytes(amat(rows))
    return directory
