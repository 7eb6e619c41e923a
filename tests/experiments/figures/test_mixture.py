import pytest

from experiments.figures import mixture, plane

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]


def test_the_numbers_agree_with_one_another(tmp_path, monkeypatch):
    monkeypatch.setattr(plane, "PRIOR_DEPTH", 2)
    setting = mixture.Setting(epochs=4, snapshots=(1, 4), data_cells=30, latent_cells=80)
    numbers = mixture.run(setting, 0, tmp_path)
    for name in ("learned", "fixed"):
        model = numbers[name]
        # The estimate from samples of the data equals the integral within its error.
        assert abs(model["sampled_nll"] - model["nll"]) < 4 * model["sampled_nll_se"] + 0.01
        assert model["sampled_nll"] < -model["sampled_elbo"]
        assert model["nll"] - numbers["entropy"] == pytest.approx(model["kl_data_model"])
        assert model["kl_data_model"] > 0 and model["marginal_kl"] > 0
        # The KL does not depend on the coordinates.
        assert model["marginal_kl_in_base_space"] == pytest.approx(model["marginal_kl"], rel=0.03)
        assert all(mass == pytest.approx(1, abs=0.01) for mass in model["mass_on_grid"].values())
        assert [record["epoch"] for record in model["history"]] == [1, 4]
        assert model["history"][1]["nll"] < model["history"][0]["nll"]
    for name in ("figure2", "figure2_training"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
