import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from led_jax import flows

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("fast_compile")]


def test_probit_is_the_normal_distribution_function(x64):
    x = jnp.linspace(-8, 8, 30).reshape(10, 3)
    y, log_det = jax.jit(flows.probit().apply)((), x)
    np.testing.assert_allclose(y, stats.norm.cdf(x), rtol=1e-12)
    np.testing.assert_allclose(log_det, stats.norm.logpdf(x).sum(-1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_probit_keeps_to_the_open_interval(dtype):
    x = jnp.array([-1e6, -50, 0, 50, 1e6], dtype)
    y, log_det = jax.jit(flows.probit().apply)((), x[:, None])
    assert y.dtype == log_det.dtype == dtype
    assert np.all((y > 0) & (y < 1)) and np.isfinite(log_det.astype(np.float32)).all()
    again, _ = jax.jit(flows.probit().inverse)((), jnp.array([[0.0], [1.0]], dtype))
    assert np.isfinite(again.astype(np.float32)).all() and again[0] < -2 and again[1] > 2
