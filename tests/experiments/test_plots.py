import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import plots

pytestmark = pytest.mark.filterwarnings("error")

HISTORY = [
    {
        "epoch": epoch,
        "train_elbo": -100 + epoch,
        "valid_elbo": -101 + epoch,
        "valid_log_likelihood": -80 + epoch,
        "valid_log_prior": -70.0,
        "valid_log_posterior": -50.0,
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


@pytest.mark.slow
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
    for axes, names, prefix in (
        (left, ("train_elbo", "valid_elbo"), ""),
        (right, ("log_likelihood", "log_prior", "log_posterior"), "valid_"),
    ):
        assert len(axes.lines) == len(names)
        for line, name in zip(axes.lines, names, strict=True):
            assert line.get_label() == name.replace("_", " ")
            np.testing.assert_array_equal(line.get_xdata(), [r["epoch"] for r in HISTORY])
            np.testing.assert_array_equal(line.get_ydata(), [r[prefix + name] for r in HISTORY])
    plt.close(figures[0])


def drawn(monkeypatch, draw, *args):
    figures = []
    monkeypatch.setattr(plots, "_save_figure", lambda path, figure: figures.append(figure))
    draw("unused.png", *args)
    plt.close(figures[0])
    return figures[0]


def test_depth_curves_join_what_was_trained_alike(tmp_path, monkeypatch):
    columns = {
        "prior": ([0, 4], [90.0, 88.0], [0.1, 0.1], [90.8, 88.1], [60, 60]),
        "posterior": ([0, 4], [89.5, 88.5], [0.2, 0.2], [90.0, 88.9], [8, 200]),
    }
    plots.depth_curves(str(tmp_path / "table.png"), columns)
    assert plt.imread(tmp_path / "table.png").shape[0] > 100
    (axes,) = drawn(monkeypatch, plots.depth_curves, columns).axes
    ours = [container.lines[0] for container in axes.containers]
    assert [line.get_linestyle() for line in ours] == ["-", "None"]
    for line, (depths, nlls, *_) in zip(ours, columns.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.transpose([depths, nlls]))
    assert [text.get_text() for text in axes.texts] == ["8 epochs", "200 epochs"]


def test_nats_are_stacked_up_to_the_bound(tmp_path, monkeypatch):
    models = {
        "a": [(88.0, {"x": 60.0, "y": 30.0}), (90.0, {"x": 64.0, "y": 30.0})],
        "b": [(80.0, {"x": 70.0, "z": 15.0})],
    }
    plots.nats(tmp_path / "nats.png", models)
    assert plt.imread(tmp_path / "nats.png").shape[0] > 100
    (axes,) = drawn(monkeypatch, plots.nats, models).axes
    bars = [(b.get_y() + b.get_height() / 2, b.get_x(), b.get_width()) for b in axes.patches]
    expected = [(0, 0, 62), (0, 62, 30), (1, 0, 70), (1, 70, 15)]
    np.testing.assert_allclose(bars, expected, atol=1e-9)
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"]
    assert {89.0, 80.0} <= set(marks)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert not axes.texts
    (axes,) = drawn(monkeypatch, plots.nats, models | {"far": [(500.0, {"x": 600.0})]}).axes
    assert axes.get_xlim() == (0, 1.5 * 92)  # The median of 92, 85 and 600.
    assert [text.get_text() for text in axes.texts] == ["600 \u2192"]


def test_density_maps_put_each_panel_in_its_place(tmp_path, monkeypatch):
    values = np.arange(12.0).reshape(3, 4)
    plain = plots.Panel("plain", values, (0, 4, -1, 2))
    lines = plots.Panel("lines", values + 1, (0, 4, -1, 2), values)
    figure = drawn(monkeypatch, plots.density_maps, [[plain, lines], [lines, plain]])
    assert [axes.get_title() for axes in figure.axes] == ["plain", "lines", "lines", "plain"]
    for axes, contours in zip(figure.axes, (0, 1, 1, 0), strict=True):
        image = axes.images[0]
        np.testing.assert_array_equal(image.get_array(), values + contours)
        assert image.origin == "lower" and image.get_clim()[0] == 0
        assert tuple(image.get_extent()) == (0, 4, -1, 2)
        assert len(axes.collections) == contours
    monkeypatch.undo()
    plots.density_maps(tmp_path / "maps.png", [[plain]])
    assert plt.imread(tmp_path / "maps.png").ndim == 3


def test_marginal_matching_draws_terms_and_images(monkeypatch):
    images = np.zeros((2, 3, 4, 5))
    images[1, 2] = 1
    terms = {"first": ([1.0, 2.0], [0.1, 0.1]), "second": ([3.0, 2.5], [0.2, 0.2])}
    samples = {"left": images, "right": 1 - images}
    figure = drawn(monkeypatch, plots.marginal_matching, [0, 4], terms, samples)
    curves, left, right = figure.axes
    for container, (values, _) in zip(curves.containers, terms.values(), strict=True):
        np.testing.assert_array_equal(
            container.lines[0].get_xydata(), np.stack([[0, 4], values], 1)
        )
    canvas = np.zeros((8, 15))
    canvas[4:, 10:] = 1
    np.testing.assert_array_equal(left.images[0].get_array(), canvas)
    np.testing.assert_array_equal(right.images[0].get_array(), 1 - canvas)
    assert left.get_title() == "left" and right.get_title() == "right"


def test_errors_are_drawn_where_they_lie_and_filled_where_trusted(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save_figure", lambda path, figure: figures.append(figure))
    problems = {"a": {"one": (0.5, True), "two": (0.01, False)}, "b": {"two": (2.0, True)}}
    plots.errors(tmp_path / "e.png", problems, "error", 0.1)
    (axes,) = figures[0].axes
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [float(line.get_xdata()[0]) for line in points] == [0.5, 0.01, 2.0]
    assert [round(float(line.get_ydata()[0])) for line in points] == [0, 0, 1]
    assert [line.get_markerfacecolor() == "none" for line in points] == [False, True, False]
    plt.close(figures[0])
