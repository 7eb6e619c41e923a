import ast
import sys
from pathlib import Path

import pytest

import led_jax.data
from led_jax.data import load


@pytest.fixture
def no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)


@pytest.mark.parametrize("binarize", ["", "Static", "both", None])
def test_unknown_binarize(binarize):
    with pytest.raises(ValueError, match=f"binarize is {binarize!r}, expected 'static' or 'dyn"):
        load(binarize=binarize)


def test_negative_seed():
    with pytest.raises(ValueError, match="seed is -1, expected 0 or more"):
        load(seed=-1)


@pytest.mark.parametrize("name", ["digits", "binarized_mnist", "mnist"])
def test_missing_data_dir(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="data_dir .*nowhere' is not an existing directory"):
        load(name, data_dir=str(tmp_path / "nowhere"))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileNotFoundError, match="not an existing directory"):
        load(name, data_dir=str(file))
    with pytest.raises(FileNotFoundError, match="data_dir '' is not"):
        load(name, data_dir="")


def test_data_dir_may_start_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(data_dir="~").name == "digits"


@pytest.mark.parametrize("name", ["mnist", "no_such_set", ""])
def test_other_names_need_tensorflow_datasets(name, no_tensorflow):
    expected = rf"data set '{name}': expected digits, binarized_mnist.*FILE.npz.*led_jax\[tfds\]"
    with pytest.raises(ValueError, match=expected):
        load(name)


def test_binarized_mnist_cannot_be_dynamic():
    with pytest.raises(ValueError, match="binarized_mnist is already binary"):
        load("binarized_mnist", binarize="dynamic")


def test_data_import_nothing_else_of_the_library_and_heavy_packages_only_when_used():
    for path in Path(led_jax.data.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        top = {module for node in tree.body for module in imported(node)}
        anywhere = {module for node in ast.walk(tree) for module in imported(node)}
        assert not [m for m in anywhere if m.split(".")[0] in ("flax", "optax", "distrax")]
        assert all(m.startswith("led_jax.data") for m in anywhere if m.startswith("led_jax"))
        assert not [m for m in top if m.startswith(("tensorflow", "sklearn"))]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []
