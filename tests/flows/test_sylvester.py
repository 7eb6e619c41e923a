import jax
import numpy as np
import pytest
from support import normal, random_params

from led_jax import flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def layer_in_numpy(raw, z, num_reflections):
    """z + Q R tanh(S Q'z + b) with explicit matrices, and log|det| of the D x D Jacobian."""
    n = z.shape[-1]
    matrix, diagonal, b = raw[: n * n].reshape(n, n), raw[n * n :][:n], raw[n * n :][n : 2 * n]
    r = np.triu(matrix, 1) + np.diag(np.tanh(np.diag(matrix)))
    s = np.tril(matrix, -1).T + np.diag(np.tanh(diagonal))
    q = np.eye(n)
    for v in raw[n * n + 2 * n :].reshape(num_reflections, n):
        q = q @ (np.eye(n) - 2 * np.outer(v, v) / (v @ v))
    np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-12)
    assert num_reflections == 0 or np.abs(q - np.eye(n)).max() > 0.1
    inner = z @ q @ s.T + b
    slopes = 1 - np.tanh(inner) ** 2
    jacobians = np.eye(n) + q @ r @ (slopes[:, :, None] * (s @ q.T))
    return z + np.tanh(inner) @ r.T @ q.T, np.linalg.slogdet(jacobians)[1]


@pytest.mark.parametrize("num_reflections", [0, 3])
def test_a_stack_is_the_papers_formula_with_explicit_determinants(x64, num_reflections):
    """Van den Berg et al., eq. 13, whose determinant is eq. 14."""
    if num_reflections:
        flow = flows.householder_sylvester((4,), 3, num_reflections)
    else:
        flow = flows.triangular_sylvester((4,), 3)
    x = normal((6, 4))
    params = random_params(flow.init, x, scale=0.8)
    (stack,) = jax.tree.leaves(params)
    z, expected = np.asarray(x), np.zeros(6)
    for raw in np.asarray(stack):
        z, log_det = layer_in_numpy(raw, z, num_reflections)
        expected += log_det
        z = z if num_reflections else z[:, ::-1]
    y, log_det = jax.jit(flow.apply)(params, x)
    np.testing.assert_allclose(y, z, rtol=1e-10)
    np.testing.assert_allclose(log_det, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(jax.jit(flow.inverse)(params, z)[0], x, atol=1e-9)


def test_an_orthogonal_layer_moves_within_the_space_of_its_columns(x64):
    """The formula of section 3.2.1 with Q = U V' of a singular value decomposition."""
    n, m = 5, 2
    flow, x = flows.orthogonal_sylvester((n,), 1, m), np.asarray(normal((6, n)))
    params = random_params(flow.init, x, scale=0.8)
    raw = np.asarray(params["bias"])[0]
    matrix, diagonal, b = raw[: m * m].reshape(m, m), raw[m * m :][:m], raw[m * m :][m : 2 * m]
    r = np.triu(matrix, 1) + np.diag(np.tanh(np.diag(matrix)))
    s = np.tril(matrix, -1).T + np.diag(np.tanh(diagonal))
    u, _, vt = np.linalg.svd(raw[m * m + 2 * m :].reshape(m, n).T, full_matrices=False)
    q = u @ vt
    inner = x @ q @ s.T + b
    jacobians = np.eye(n) + q @ r @ ((1 - np.tanh(inner) ** 2)[:, :, None] * (s @ q.T))
    y, log_det = jax.jit(flow.apply)(params, x)
    np.testing.assert_allclose(y, x + np.tanh(inner) @ r.T @ q.T, rtol=1e-10)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], rtol=1e-9)
    assert np.abs(y - x).max() > 0.1


@pytest.mark.parametrize("number", [0, 5])
def test_columns_are_no_more_than_entries(number):
    with pytest.raises(ValueError, match=rf"from 1 to 4, .* shape \(2, 2\); got {number}"):
        flows.orthogonal_sylvester((2, 2), 1, number)


def test_reflections_are_needed():
    with pytest.raises(ValueError, match="num_reflections must be positive, got 0"):
        flows.householder_sylvester((4,), 1, 0)
