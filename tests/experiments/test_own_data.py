"""A file of one's own, from training to the scores of new rows."""

import json

import numpy as np
import pytest

import led_jax
from experiments.config import Config
from experiments.run import load_run, run
from experiments.trainer import stream
from led_jax import data, estimators

pytestmark = pytest.mark.usefixtures("fast_compile")
TINY = {"epochs": 2, "latent_dim": 3, "prior_depth": 0, "nll_samples": 5}
RNG = np.random.default_rng(0)
FILES = {
    "bits": RNG.integers(0, 2, (200, 16, 12)).astype(bool),
    "colour": RNG.random((200, 5, 4, 3)),
    "unit": RNG.random((200, 6, 5, 1)),
    "table": RNG.normal(size=(200, 7)).astype(np.float32),
    "letters": RNG.integers(0, 4, (200, 6)),
    "grey": RNG.integers(0, 256, (200, 6, 5, 1)).astype(np.uint8),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "decoder", "binarize"),
    [
        ("bits", "bernoulli", "static"),
        ("colour", "bernoulli", "static"),
        ("table", "gaussian:std=0.3", "static"),
        ("table", "learned_gaussian:scale=entry", "static"),
        ("table", "flow:depth=1,hidden=8", "static"),
        ("colour", "flow:depth=1,hidden=8,mask=checkerboard", "static"),
        ("letters", "categorical:num_categories=4", "static"),
        ("grey", "bernoulli", "dynamic"),
        ("unit", "flow:depth=2,hidden=8,mask=checkerboard", "static"),
        ("grey", "discretized_logistic:num_components=2", "static"),
    ],
)
def test_a_run_on_ones_own_array(tmp_path, name, decoder, binarize):
    np.savez(tmp_path / f"{name}.npz", train=FILES[name])
    config = Config(
        dataset=f"{name}.npz",
        data_dir=str(tmp_path),
        split="0.6,0.2,0.2",
        binarize=binarize,
        decoder=decoder,
        **TINY,
    )
    result = run(config, tmp_path / "run")
    shape = FILES[name].shape[1:]
    assert np.isfinite(result["nll"]) and result["image_shape"] == list(shape)
    assert str(tmp_path) not in json.dumps(result)
    is_image = (tmp_path / "run" / "samples.png").exists()
    assert (
        is_image == (name not in ("table", "letters"))
        and (tmp_path / "run" / "curves.png").exists()
    )
    # What was saved scores the test split as the run did.
    dataset = load_run(config, tmp_path / "run")[0].dataset
    assert [len(getattr(dataset, split)) for split in ("train", "valid", "test")] == [120, 40, 40]
    led, params = led_jax.load(tmp_path / "run")
    scored = estimators.nll(led, params, stream(config, "nll"), dataset.test, 5)
    assert scored.nll == result["nll"]
    bits = result["nll"] / np.log(2) / np.prod(shape)
    assert result["nll_bits_per_dim"] == pytest.approx(bits)
    if decoder.startswith("discretized"):  # Uniform levels take 8 bits.
        assert led.decoder.values == "scaled_levels" and 7.5 < bits < 11


@pytest.mark.slow
def test_another_split_is_other_data(tmp_path):
    np.savez(tmp_path / "bits.npz", train=FILES["bits"])
    load = lambda seed: data.load("bits.npz", data_dir=str(tmp_path), seed=seed)  # noqa: E731
    assert data.fingerprint(load(0)) != data.fingerprint(load(1))
    with pytest.raises(ValueError, match="--data_seed is 0 there and 1 here"):
        config = Config(dataset="bits.npz", data_dir=str(tmp_path), split="0.6,0.2,0.2", **TINY)
        run(config, tmp_path / "run")
        run(Config(**{**vars(config), "data_seed": 1}), tmp_path / "run")
