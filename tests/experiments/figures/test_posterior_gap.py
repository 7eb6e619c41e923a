import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY

from experiments.figures import plane, posterior_gap
from experiments.figures.posterior_gap import Setting, build_problems, train_parts

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    monkeypatch.setattr(plane, "PRIOR_DEPTH", 2)


def test_only_the_parts_named_are_trained():
    problem = build_problems(KEY)["mixture"]
    params = jax.jit(problem.led.init)(KEY, problem.rows[:2])
    trained = train_parts(problem, ("prior",), params, KEY, 1, "test")
    for part in ("encoder", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, trained[part], params[part])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), trained["prior"], params["prior"])
    assert any(jax.tree.leaves(changed))


def test_the_gap_is_what_the_bound_lacks(tmp_path):
    numbers = posterior_gap.run(Setting(epochs=3, cells=60), 0, tmp_path)
    for name in ("mixture", "digits"):
        problem = numbers[name]
        for stage in (problem["before"], problem["after"]):
            # The sampled ELBO has 500 draws a row.
            assert -stage["nll"] - stage["sampled_elbo"] == pytest.approx(
                stage["posterior_gap"], abs=0.05
            )
            assert stage["posterior_gap"] > 0
        assert problem["change"] == pytest.approx(
            problem["after"]["posterior_gap"] - problem["before"]["posterior_gap"], abs=1e-4
        )
        # What the prior is trained for: eq. 4.
        assert problem["after"]["train_marginal_kl"] < problem["before"]["train_marginal_kl"]
    assert numbers["digits"]["test_rows"] == 250
    assert (tmp_path / "figure1.png").stat().st_size > 1000
    assert jnp.isfinite(jnp.array([numbers[name]["change_se"] for name in numbers])).all()
