from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY, normal, random_params

from led_jax import flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]

MAKERS = {
    "planar": flows.planar,
    "radial": flows.radial,
    "triangular_sylvester": flows.triangular_sylvester,
    "householder_sylvester": partial(flows.householder_sylvester, num_reflections=2),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def softplus(x):
    return np.log1p(np.exp(x))


def test_planar_is_the_papers_formula(x64):
    """Eq. 10 to 12 and appendix A.1 of Rezende and Mohamed, layer by layer in NumPy."""
    flow, x = flows.planar((4,), 3), normal((6, 4))
    params = random_params(flow.init, x, scale=0.8)
    z, expected = np.asarray(x), np.zeros(6)
    for layer in np.asarray(params["bias"]):
        w, u, b = layer[:4], layer[4:8], layer[8]
        u = u + (softplus(w @ u) - 1 - w @ u) * w / (w @ w)
        assert w @ u > -1
        psi = (1 - np.tanh(z @ w + b) ** 2)[:, None] * w
        expected += np.log(np.abs(1 + psi @ u))
        z = z + u * np.tanh(z @ w + b)[:, None]
    y, log_det = jax.jit(flow.apply)(params, x)
    np.testing.assert_allclose(y, z, rtol=1e-10)
    np.testing.assert_allclose(log_det, expected, rtol=1e-10)


def test_radial_is_the_papers_formula(x64):
    """Eq. 13 and 14 and appendix A.2."""
    flow, x = flows.radial((4,), 3), normal((6, 4))
    params = random_params(flow.init, x, scale=0.8)
    z, expected = np.asarray(x), np.zeros(6)
    for layer in np.asarray(params["bias"]):
        center, alpha = layer[:4], softplus(layer[4])
        beta = softplus(layer[5]) - alpha
        r = np.linalg.norm(z - center, axis=1)
        h, slope = 1 / (alpha + r), -1 / (alpha + r) ** 2
        expected += 3 * np.log(1 + beta * h) + np.log(1 + beta * h + beta * slope * r)
        z = z + (beta * h)[:, None] * (z - center)
    y, log_det = jax.jit(flow.apply)(params, x)
    np.testing.assert_allclose(y, z, rtol=1e-10)
    np.testing.assert_allclose(log_det, expected, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Importing pyro warns.
@pytest.mark.parametrize("name", ["planar", "radial"])
def test_the_flow_is_pyros(x64, name):
    """On the same parameters; the extra `bench` installs pyro."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip(f"pyro.distributions.transforms.{name}")
    flow, x = MAKERS[name]((4,), 3), normal((6, 4))
    params = random_params(flow.init, x, scale=0.8)
    y = torch.tensor(np.asarray(x))
    expected = torch.zeros(6, dtype=y.dtype)
    for layer in torch.tensor(np.asarray(params["bias"])):
        vector, others, last = layer[:4], layer[4:-1], layer[-1:]
        if name == "planar":
            there = module.ConditionedPlanar((last, others, vector))
        else:
            there = module.ConditionedRadial((vector, others, last))
        image = there(y)
        expected = expected + there.log_abs_det_jacobian(y, image)
        y = image
    actual, log_det = jax.jit(flow.apply)(params, x)
    np.testing.assert_allclose(actual, y, rtol=1e-10)
    np.testing.assert_allclose(log_det, expected, rtol=1e-10)


@pytest.mark.slow
def test_at_its_center_a_radial_layer_is_smooth(x64):
    flow, x = flows.radial((3,), 1), normal((3,))
    params = random_params(flow.init, x)
    center = np.asarray(params["bias"])[0, :3]
    for direction in (flow.apply, flow.inverse):

        @jax.jit
        def results(params, x, direction=direction):
            matrix = jax.jacfwd(lambda x: direction(params, x)[0])(x)
            return matrix, *jax.value_and_grad(lambda x: direction(params, x)[1])(x)

        matrix, log_det, gradient = map(np.asarray, results(params, center))
        np.testing.assert_allclose(np.linalg.slogdet(matrix)[1], log_det, rtol=1e-9)
        assert np.isfinite(gradient).all()


@pytest.mark.slow
@every_maker
def test_a_fresh_flow_moves_nothing(make):
    flow, x, context = make((5,), 2, context_dim=3), normal((4, 5)), normal((4, 3))

    @jax.jit
    def fresh(x, context):
        return flow.apply(flow.init(KEY, x, context), x, context)

    y, log_det = fresh(x, context)
    np.testing.assert_allclose(y, x, atol=1e-6)
    np.testing.assert_allclose(log_det, np.zeros(4), atol=1e-6)


@pytest.mark.slow
@every_maker
def test_where_the_map_is_all_but_singular_it_is_still_inverted(x64, make):
    """The parameters would make the map fold over if they were not constrained."""
    flow, x = make((3,), 1), np.asarray(normal((50, 3)))
    shapes = jax.eval_shape(flow.init, KEY, x)
    many = jax.tree.map(lambda leaf: 2 * np.asarray(normal((30, *leaf.shape), seed=4)), shapes)
    y, log_det = map(np.asarray, jax.jit(jax.vmap(flow.apply, (0, None)))(many, x))
    again, log_det_back = jax.jit(jax.vmap(flow.inverse))(many, y)
    assert log_det.min() < -1
    np.testing.assert_allclose(again, x[None].repeat(30, 0), atol=1e-6)
    np.testing.assert_allclose(log_det_back, -log_det, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@every_maker
@pytest.mark.parametrize("direction", ["apply", "inverse"])
def test_gradients_are_finite_differences(x64, make, direction):
    flow, x, context = make((3,), 2, context_dim=2), normal((4, 3)), normal((4, 2))
    params, along = (
        jax.device_get(random_params(flow.init, x, context, seed=seed)) for seed in (7, 3)
    )

    @jax.jit
    @jax.value_and_grad
    def objective(params):
        y, log_det = getattr(flow, direction)(params, x, context)
        return jnp.sin(y).sum() + log_det.sum()

    _, gradient = objective(params)
    slope = sum(
        jax.tree.leaves(jax.tree.map(lambda g, d: (np.asarray(g) * d).sum(), gradient, along))
    )
    (ahead, _), (behind, _) = (
        objective(jax.tree.map(lambda p, d, e=e: p + e * d, params, along)) for e in (1e-5, -1e-5)
    )
    np.testing.assert_allclose((float(ahead) - float(behind)) / 2e-5, slope, rtol=1e-6)


@every_maker
def test_parameters_of_another_shape_are_an_error(make):
    flow = make((3,), 2)
    x = np.zeros(3)
    params = jax.eval_shape(flow.init, KEY, x)
    wrong = jax.tree.map(lambda leaf: np.zeros((2, leaf.shape[1] - 1)), params)
    with pytest.raises(ValueError, match=r"expected parameters of shapes .* got"):
        jax.eval_shape(flow.apply, wrong, x)
    with pytest.raises(ValueError, match="depth must be 0 or more, got -1"):
        make((3,), -1)
