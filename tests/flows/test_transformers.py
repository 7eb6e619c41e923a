import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import normal

from led_jax import flows
from led_jax.flows.transformers import additive, affine, gate, gated

TRANSFORMERS = {"additive": additive, "affine": affine, "gated": gated, "gate": gate(-0.7)}

each_transformer = pytest.mark.parametrize("transformer", TRANSFORMERS.values(), ids=TRANSFORMERS)

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def test_every_public_transformer_is_tested():
    public = {n for n in flows.__all__ if isinstance(getattr(flows, n), flows.Transformer)}
    assert public <= set(TRANSFORMERS)


@each_transformer
def test_derivatives_and_inverse(x64, transformer):
    raw, x = 3 * normal((40, transformer.num_params, 5)), 4 * normal((40, 5), seed=2)
    y, log_det = transformer.apply(raw, x)
    again, log_det_back = transformer.inverse(raw, y)
    assert y.shape == log_det.shape == again.shape == log_det_back.shape == x.shape
    np.testing.assert_allclose(again, x, rtol=1e-10, atol=1e-10)
    slope = jax.grad(lambda x: transformer.apply(raw, x)[0].sum())(x)
    assert np.all(slope > 0)
    np.testing.assert_allclose(log_det, np.log(slope), atol=1e-12)
    slope_back = jax.grad(lambda y: transformer.inverse(raw, y)[0].sum())(y)
    np.testing.assert_allclose(log_det_back, np.log(slope_back), atol=1e-12)


def test_values(x64):
    raw, x = jnp.array([[0.5, -2.0], [1.5, -40.0]]), jnp.array([2.0, 3.0])
    np.testing.assert_allclose(additive.apply(raw[:1], x)[0], [2.5, 1.0])
    scale = np.exp(3 * np.tanh([0.5, -40 / 3]))
    np.testing.assert_allclose(affine.apply(raw, x)[0], scale * x + raw[0])
    for transformer, bias in ((gated, 1.5), (gate(-0.7), -0.7)):
        share = 1 / (1 + np.exp(-(raw[1] + bias)))
        y, log_det = transformer.apply(raw, x)
        np.testing.assert_allclose(y, share * x + (1 - share) * raw[0])
        np.testing.assert_allclose(log_det, np.log(share))


@each_transformer
def test_zero_parameters_are_the_identity_or_a_gate(transformer):
    x = normal((5,))
    raw = jnp.zeros((transformer.num_params, 5))
    expected = {gated: 1 / (1 + np.exp(-1.5)), TRANSFORMERS["gate"]: 1 / (1 + np.exp(0.7))}
    y, log_det = transformer.apply(raw, x)
    np.testing.assert_allclose(y, expected.get(transformer, 1) * x, rtol=1e-6)
    np.testing.assert_allclose(log_det, np.log(expected.get(transformer, 1)), rtol=1e-5, atol=1e-7)


@each_transformer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("direction", ["apply", "inverse"])
def test_finite_whatever_the_network_emits_and_wherever_x_is(transformer, dtype, direction):
    """Forward and backward, at numbers up to 1e6 in every combination of size and sign."""
    sizes = np.array([0, 1e-3, 1, 30, 1e3, 1e6])
    rng = np.random.default_rng(0)
    raw, x = (
        jnp.asarray(rng.choice([-1, 1], shape) * rng.choice(sizes, shape), dtype)
        for shape in [(3000, transformer.num_params, 1), (3000, 1)]
    )
    function = getattr(transformer, direction)
    outputs, pullback = jax.vjp(function, raw, x)
    for cotangents in [outputs, jax.tree.map(jnp.ones_like, outputs)]:
        for leaf in (*outputs, *pullback(cotangents)):
            assert leaf.dtype == dtype
            assert np.isfinite(leaf.astype(jnp.float32)).all()


@each_transformer
def test_parameters_broadcast_against_samples(transformer):
    raw, x = normal((transformer.num_params, 5)), normal((6, 5))
    y, log_det = transformer.apply(raw, x)
    assert y.shape == log_det.shape == (6, 5)
    x, log_det = transformer.inverse(raw, y)
    assert x.shape == log_det.shape == (6, 5)
