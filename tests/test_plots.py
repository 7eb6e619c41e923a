import matplotlib.pyplot as plt
import numpy as np
import pytest

from led_jax import plots

pytestmark = pytest.mark.filterwarnings("error")

HISTORY = [
    {
        "epoch": epoch,
        "train_elbo": -100 + epoch,
        "valid_elbo": -101 + epoch,
        "log_likelihood": -80 + epoch,
        "log_prior": -70.0,
        "log_posterior": -50.0,
    }
    for epoch in range(1, 30)
]


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    assert plt.get_fignums() == []


def test_image_grid_puts_each_image_in_its_place(tmp_path):
    images = np.zeros((5, 8, 6))
    images[1, 2, 3] = 1
    images[4, 7, 0] = 0.5
    plots.image_grid(tmp_path / "grid.png", images, columns=3)
    pixels = plt.imread(tmp_path / "grid.png")[..., 0]
    scale = 56 // 8
    assert pixels.shape == ((2 * 9 + 1) * scale, (3 * 7 + 1) * scale)
    cells = pixels[scale // 2 :: scale, scale // 2 :: scale]
    dark = np.argwhere(cells < 0.99).tolist()
    assert dark == [[1 + 2, 1 + 7 + 3], [1 + 9 + 7, 1 + 7]]
    assert cells[3, 11] == 0  # Black is 1, white is 0.
    assert cells[17, 8] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("n,columns,rows", [(1, 1, 1), (4, 2, 2), (3, 5, 1), (10, 4, 3)])
def test_image_grid_shape(tmp_path, n, columns, rows):
    plots.image_grid(tmp_path / "grid.png", np.ones((n, 28, 28)), columns)
    height, width = plt.imread(tmp_path / "grid.png").shape[:2]
    assert (height, width) == ((rows * 29 + 1) * 2, (columns * 29 + 1) * 2)


@pytest.mark.parametrize("length", [1, 2, 29])
def test_curves(tmp_path, length):
    plots.curves(tmp_path / "curves.png", HISTORY[:length])
    pixels = plt.imread(tmp_path / "curves.png")
    assert pixels.ndim == 3 and len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 10


def test_curves_drawn_are_the_records(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save_figure", lambda path, figure: figures.append(figure))
    plots.curves(tmp_path / "curves.png", HISTORY)
    left, right = figures[0].axes
    for axes, names in (
        (left, ("train_elbo", "valid_elbo")),
        (right, ("log_likelihood", "log_prior", "log_posterior")),
    ):
        assert len(axes.lines) == len(names)
        for line, name in zip(axes.lines, names, strict=True):
            assert line.get_label() == name.replace("_", " ")
            np.testing.assert_array_equal(line.get_xdata(), [r["epoch"] for r in HISTORY])
            np.testing.assert_array_equal(line.get_ydata(), [r[name] for r in HISTORY])
    plt.close(figures[0])


def test_depth_curves(tmp_path):
    columns = {
        "prior": ([0, 4, 8], [90.0, 88.0, 87.0], [0.1, 0.1, 0.1], [90.8, 88.1, 87.5]),
        "posterior": ([4], [88.5], [0.2], [88.9]),
    }
    plots.depth_curves(str(tmp_path / "table.png"), columns)
    assert plt.imread(tmp_path / "table.png").shape[0] > 100
