import pydoc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import normal

from led_jax import flows
from led_jax.flows.transformers import (
    additive,
    affine,
    deep_sigmoid,
    gate,
    gated,
    rational_quadratic,
    scaled,
    sigmoid_mixture,
    spline,
)

BOX = spline(5, bound=None)
TRANSFORMERS = {
    "additive": additive,
    "affine": affine,
    "gated": gated,
    "gate": gate(-0.7),
    "rational_quadratic": rational_quadratic,
    "box": BOX,
    "scaled": scaled(0.5),
    "circular": spline(4, 1.5, periodic=True),
    "deep_sigmoid": deep_sigmoid,
}

each_transformer = pytest.mark.parametrize("transformer", TRANSFORMERS.values(), ids=TRANSFORMERS)
FLEXIBLE = {name: TRANSFORMERS[name] for name in list(TRANSFORMERS)[4:]}
each_flexible = pytest.mark.parametrize("transformer", FLEXIBLE.values(), ids=FLEXIBLE)


pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def numbers(shape, seed=1):
    """As `normal`, but of NumPy, whose arithmetic compiles nothing."""
    return np.asarray(normal(shape, seed))


def test_every_public_transformer_is_tested():
    public = {n for n in flows.__all__ if isinstance(getattr(flows, n), flows.Transformer)}
    assert public <= set(TRANSFORMERS)


@pytest.mark.slow
@each_transformer
def test_derivatives_and_inverse(x64, transformer):
    raw, x = 3 * numbers((40, transformer.num_params, 5)), 4 * numbers((40, 5), seed=2)
    x[:20] *= 0.1  # Many in BOX's interval.

    @jax.jit
    def both_ways(raw, x):
        forward = transformer.apply(raw, x)
        return (
            *forward,
            *transformer.inverse(raw, forward[0]),
            jax.grad(lambda x: transformer.apply(raw, x)[0].sum())(x),
            jax.grad(lambda y: transformer.inverse(raw, y)[0].sum())(forward[0]),
        )

    y, log_det, again, log_det_back, slope, slope_back = both_ways(raw, x)
    assert y.shape == log_det.shape == again.shape == log_det_back.shape == x.shape
    # A spline has slopes down to 1e-6, where the inverse loses as many digits.
    np.testing.assert_allclose(again, x, rtol=1e-8, atol=1e-8)
    assert np.all(slope > 0)
    np.testing.assert_allclose(log_det, np.log(slope), atol=1e-10)
    np.testing.assert_allclose(log_det_back, np.log(slope_back), atol=1e-10)
    np.testing.assert_allclose(log_det_back, -log_det, atol=1e-7)


def test_values(x64):
    raw, x = np.array([[0.5, -2.0], [1.5, -15.0]]), np.array([2.0, 3.0])

    @jax.jit
    def results(raw, x):
        others = (affine, scaled(0.5), gated, gate(-0.7))
        return additive.apply(raw[:1], x), *(other.apply(raw, x) for other in others)

    of_additive, of_affine, of_scaled, *of_gates = results(raw, x)
    np.testing.assert_allclose(of_additive[0], [2.5, 1.0])
    scale = np.exp(3 * np.tanh([0.5, -15 / 3]))
    np.testing.assert_allclose(of_affine[0], scale * x + raw[0])
    bound = np.exp([0.5 * np.tanh(1.5 / 0.5), -0.5])  # At -15 the bound is reached.
    np.testing.assert_allclose(of_scaled[0], bound * x + raw[0])
    for (y, log_det), bias in zip(of_gates, (1.5, -0.7), strict=True):
        share = 1 / (1 + np.exp(-np.maximum(raw[1] + bias, -20)))
        np.testing.assert_allclose(y, share * x + (1 - share) * raw[0])
        np.testing.assert_allclose(log_det, np.log(share))


@pytest.mark.parametrize("bound", [0, -1.0, float("inf"), float("nan")])
def test_scaled_needs_a_bound(bound):
    with pytest.raises(ValueError, match="max_log_scale must be a positive number"):
        scaled(bound)


@pytest.mark.slow
@each_transformer
def test_zero_parameters_are_the_identity_or_a_gate_or_close(transformer):
    x = np.linspace(-100, 100, 5) if transformer is deep_sigmoid else numbers((5,))
    raw = np.zeros((transformer.num_params, 5))
    y, log_det = map(np.asarray, jax.jit(transformer.apply)(raw, x))
    if transformer is deep_sigmoid:
        assert np.all(np.abs(y - x) < 0.2) and np.all((-0.1 < log_det) & (log_det < 1e-6))
        return
    expected = {gated: 1 / (1 + np.exp(-1.5)), TRANSFORMERS["gate"]: 1 / (1 + np.exp(0.7))}
    np.testing.assert_allclose(y, expected.get(transformer, 1) * x, rtol=1e-5)
    np.testing.assert_allclose(log_det, np.log(expected.get(transformer, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@each_transformer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("direction", ["apply", "inverse"])
def test_finite_whatever_the_network_emits_and_wherever_x_is(transformer, dtype, direction):
    """Forward and backward, at numbers up to 1e6 in every combination of size and sign."""
    sizes = np.array([0, 1e-3, 1, 5, 30, 1e3, 1e6])
    rng = np.random.default_rng(0)
    raw, x = (
        (rng.choice([-1, 1], shape) * rng.choice(sizes, shape)).astype(dtype)
        for shape in [(3000, transformer.num_params, 1), (3000, 1)]
    )

    @jax.jit
    def values_and_gradients(raw, x):
        outputs, pullback = jax.vjp(getattr(transformer, direction), raw, x)
        return outputs, pullback(outputs), pullback(jax.tree.map(jnp.ones_like, outputs))

    for leaf in jax.tree.leaves(values_and_gradients(raw, x)):
        assert leaf.dtype == dtype
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


@pytest.mark.slow
@each_transformer
def test_parameters_broadcast_against_samples(transformer):
    raw, x = normal((transformer.num_params, 5)), normal((6, 5))

    @jax.jit
    def results(raw, x):
        return transformer.apply(raw, x), transformer.inverse(raw, x)

    results = [jax.tree.leaves(results(raw, x)) for raw in (np.stack([raw] * 6), raw)]
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape == (6, 5)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@each_flexible
def test_derivatives_of_the_inverse_in_both_modes_and_of_second_order(x64, transformer):
    raw, y = normal((transformer.num_params, 3)), np.array([-0.4, 0.3, 0.7])

    def along(t):  # Derivatives along this curve need those with respect to raw and y.
        x, log_det = transformer.inverse(raw * (1 + t), y + 0.1 * t)
        return jnp.stack([x, log_det])

    @jax.jit
    def derivatives(t):
        return along(t), jax.jacfwd(along)(t), jax.jacrev(jax.jacrev(along))(t)

    h = 1e-4
    values, first, second = map(np.asarray, zip(*map(derivatives, (-h, 0.0, h)), strict=True))
    expected = (values[2] - values[0]) / (2 * h)
    np.testing.assert_allclose(first[1], expected, rtol=1e-5, atol=1e-5)
    expected = (values[2] - 2 * values[1] + values[0]) / h**2
    np.testing.assert_allclose(second[1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@each_flexible
def test_float32_inverse_is_one_to_rounding(transformer):
    """Steep, flat and nearly flat places alike: what comes back is the y that was given."""
    raw = 5 * numbers((2000, transformer.num_params, 1))
    y = 3 * numbers((2000, 1), seed=2)
    x, log_det = map(np.asarray, jax.jit(transformer.inverse)(raw, y))
    again, log_slope = map(np.asarray, jax.jit(transformer.apply)(raw, x))
    # One rounding of x moves y by the slope's multiple of it.
    rounding = 1e-6 * (1 + np.abs(y) + np.abs(x) * np.exp(log_slope))
    assert np.all(np.abs(again - y) < 20 * rounding)
    assert np.all(np.isfinite(log_det))


@pytest.mark.slow
def test_spline_equals_distrax(x64):
    distrax = pytest.importorskip("distrax")
    raw, x = 2 * numbers((50, 23, 4)), 4 * numbers((50, 4), seed=2)

    def theirs(raw):
        ends = jnp.zeros((50, 1, 4))
        params = jnp.concatenate([raw[:, :16], ends, raw[:, 16:], ends], 1)
        return distrax.RationalQuadraticSpline(
            jnp.moveaxis(params, 1, -1),
            range_min=-5.0,
            range_max=5.0,
            boundary_slopes="identity",
            min_bin_size=10 * 1e-3,
            min_knot_slope=1e-3,
        )

    for ours, expected in [
        (rational_quadratic.apply, lambda raw, x: theirs(raw).forward_and_log_det(x)),
        (rational_quadratic.inverse, lambda raw, x: theirs(raw).inverse_and_log_det(x)),
    ]:
        both = []
        for function in (ours, expected):

            def loss(raw, f=function):
                y, log_det = f(raw, x)
                return jnp.sum(y**2) + jnp.sum(log_det**2), (y, log_det)

            gradient, values = jax.jit(jax.grad(loss, has_aux=True))(raw)
            both.append((*values, gradient))
        for a, b in zip(*both, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_spline_maps_its_interval_to_itself_and_is_the_identity_outside():
    for transformer, low, high in ((spline(3, 2.0), -2, 2), (BOX, 0, 1)):
        raw = 3 * numbers((transformer.num_params, 200))
        x = np.linspace(low, high, 202)[1:-1]
        y = np.asarray(jax.jit(transformer.apply)(raw, x)[0])
        assert np.all((low < y) & (y < high)) and np.abs(y - x).max() > 0.1 * (high - low)
        away = np.linspace(0, 9, 100, dtype=np.float32)
        outside = np.concatenate([low - away, high + away])
        y, log_det = jax.jit(transformer.apply)(raw, outside)
        np.testing.assert_array_equal(y, outside)
        np.testing.assert_array_equal(log_det, 0)


def test_tails_meet_the_spline_smoothly_and_the_boxs_ends_are_free(x64):
    edge = np.array([-5 + 1e-9, 5 - 1e-9])
    _, log_det = jax.jit(rational_quadratic.apply)(3 * numbers((23, 2)), edge)
    np.testing.assert_allclose(log_det, 0, atol=1e-6)
    _, log_det = jax.jit(BOX.apply)(3 * numbers((16, 2)), np.array([1e-9, 1 - 1e-9]))
    assert np.all(np.abs(log_det) > 0.01)


@pytest.mark.slow
def test_a_circular_spline_goes_on_after_a_turn_with_the_same_slope(x64):
    for bound, low in ((2.0, -2.0), (None, 0.0)):
        transformer, turn = spline(3, bound, periodic=True), 4.0 if bound else 1.0
        raw = normal((transformer.num_params, 50))
        x = low + turn * np.linspace(0, 1, 50)
        circle, edges = jax.jit(transformer.apply), np.full(50, low)
        y, log_det = circle(raw, x)
        for turns in (-7, 1):
            moved, moved_log_det = map(np.asarray, circle(raw, x + turns * turn))
            np.testing.assert_allclose(moved - turns * turn, y, atol=1e-12)
            np.testing.assert_allclose(moved_log_det, log_det, atol=1e-12)
        np.testing.assert_allclose(circle(raw, edges)[0], low, atol=1e-12)
        before, after = (circle(raw, edges + step)[1] for step in (-1e-12, 1e-12))
        np.testing.assert_allclose(before, after, atol=1e-6)
        assert np.abs(after).max() > 0.3


def test_sigmoid_mixture_is_its_formula(x64):
    raw, x = 2 * numbers((9, 50)), 3 * numbers((50,), seed=2)
    logits, log_scale, shift = raw.reshape(3, 3, 50)
    shift = shift + np.array([[-2 / 3], [0], [2 / 3]])
    weights = np.exp(logits) / np.exp(logits).sum(0)
    units = 1 / (1 + np.exp(-(np.exp(3 * np.tanh(log_scale / 3)) * x + shift)))
    total = (weights * units).sum(0)
    y, _ = jax.jit(sigmoid_mixture(3).apply)(raw, x)
    np.testing.assert_allclose(y, np.log(total / (1 - total)), rtol=1e-9)


def test_sigmoid_mixtures_log_slope_does_not_cancel_far_out():
    """Beyond all units the map is linear with the slope of the flattest one."""
    raw = np.zeros((9, 1))
    raw[3:6, 0] = [0.5, -0.4, 1.0]
    expected = 3 * np.tanh(-0.4 / 3)
    x = np.array([-1e6, -1e3, 1e3, 1e6])
    _, log_det = jax.jit(sigmoid_mixture(3).apply)(raw, x)
    np.testing.assert_allclose(log_det, expected, rtol=1e-6)


@pytest.mark.parametrize("num_bins", [0, -1, 1000])
def test_spline_needs_bins_that_fit(num_bins):
    with pytest.raises(ValueError, match=f"num_bins must be 1 to 999, got {num_bins}"):
        spline(num_bins)


@pytest.mark.parametrize("bound", [0, -1.0, np.inf, np.nan])
def test_spline_needs_a_positive_bound(bound):
    with pytest.raises(ValueError, match=r"bound must be positive, or None .*, got"):
        spline(bound=bound)


def test_sigmoid_mixture_needs_units():
    with pytest.raises(ValueError, match="num_units must be positive, got 0"):
        sigmoid_mixture(0)


def test_the_cheap_direction_is_the_one_that_searches_for_no_root():
    """A root search is a while loop; `cheap` names the direction without one."""
    for transformer in TRANSFORMERS.values():
        raw, x = np.zeros((transformer.num_params, 3)), np.zeros(3)
        cheap = [
            name
            for name in ("apply", "inverse")
            if "while" not in str(jax.make_jaxpr(getattr(transformer, name))(raw, x))
        ]
        assert transformer.cheap == ("both" if len(cheap) == 2 else cheap[0])


@pytest.mark.parametrize(
    "name,text",
    [
        ("additive", "y = x + t"),
        ("affine", "y = x e^s + t"),
        ("gated", "bias of 1.5"),
        ("rational_quadratic", "8 bins"),
        ("deep_sigmoid", "8 units"),
    ],
)
def test_help_shows_the_documentation_of_a_constant(name, text):
    assert text in pydoc.render_doc(getattr(flows, name))


def test_integers_are_the_floats_that_they_stand_for():
    raw = normal((flows.rational_quadratic.num_params, 3))

    @jax.jit
    def results(raw):
        both = (flows.rational_quadratic.apply, flows.rational_quadratic.inverse)
        numbers = (np.array([0, 1, -2]), jnp.array([0.0, 1, -2]))
        return [[function(raw, x) for function in both] for x in numbers]

    for found, wanted in zip(*map(jax.tree.leaves, results(raw)), strict=True):
        np.testing.assert_array_equal(found, wanted)
