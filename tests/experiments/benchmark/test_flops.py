import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark import training_suite
from experiments.benchmark.flops import forward_flops, step_gflop
from experiments.models import build_led
from led_jax import flows


def num_weights(config):
    """Each part's number of weights, without biases."""
    led = build_led(config, training_suite._dataset())
    params = jax.eval_shape(led.init, jax.random.key(0), jnp.zeros((2, 784)))
    return {
        part: sum(
            leaf.size
            for path, leaf in jax.tree.leaves_with_path(tree)
            if path[-1].key.startswith("kernel")
        )
        for part, tree in params.items()
    }


def test_fully_connected_by_hand():
    mlp = 784 * 200 + 200 * 200 + 200 * 100 + 50 * 200 + 200 * 200 + 200 * 784
    coupling = 25 * 100 + 100 * 50
    made = 50 * 512 + 512 * 512 + 512 * 100
    products = {"mlp": 0, "prior12": 12 * coupling, "post4": 4 * made, "post12": 12 * made}
    for name, flow in products.items():
        forward = 2 * (mlp + flow)
        assert sum(forward_flops(training_suite.CELLS[name]).values()) == forward
        expected = 100 * (3 * forward - 2 * 784 * 200) / 1e9
        assert step_gflop(training_suite.CELLS[name]) == pytest.approx(expected)


def test_convolutions_by_hand():
    encoder = 14 * 14 * 9 * (1 * 32 + 16 * 16) + 7 * 7 * 9 * (16 * 64 + 32 * 32)
    # Upsampled maps are computed whole, before they are cropped.
    decoder = 28 * 28 * 9 * (16 * 17 + 16 * 1) + 14 * 14 * 9 * (32 * 48 + 32 * 16)
    flat = 4 * 4 * 9 * (32 * 64 + 32 * 32), 8 * 8 * 9 * (32 * 64 + 32 * 32)
    dense = 512 * 450 + 450 * 64, 32 * 450 + 450 * 512
    flops = forward_flops(training_suite.CELLS["resconv"])
    assert flops["encoder"] == 2 * (encoder + flat[0] + dense[0])
    assert flops["decoder"] == 2 * (decoder + flat[1] + dense[1])
    expected = 100 * (3 * sum(flops.values()) - 2 * 14 * 14 * 9 * 32) / 1e9
    assert step_gflop(training_suite.CELLS["resconv"]) == pytest.approx(expected)
    flops = forward_flops(training_suite.CELLS["spatial"])
    assert flops["encoder"] == 2 * (encoder + 7 * 7 * 9 * 32 * 6)
    assert flops["decoder"] == 2 * (decoder + 7 * 7 * 9 * 2 * 32)


@pytest.mark.parametrize("transformer", ["affine", "additive", "rational_quadratic"])
def test_twice_the_weights_where_nothing_is_masked(transformer):
    config = training_suite.CELLS["prior12"]
    config = dataclasses.replace(config, prior_transformer=transformer)
    flops = {part: 2 * size for part, size in num_weights(config).items()}
    assert forward_flops(config) == flops


def test_a_posterior_with_more_parameters_an_entry():
    config = training_suite.CELLS["post4"]
    spline = dataclasses.replace(config, posterior_transformer="rational_quadratic")
    more = forward_flops(spline)["posterior"] - forward_flops(config)["posterior"]
    assert more == 4 * 2 * 512 * 50 * (flows.rational_quadratic.num_params - 2)


def test_twice_the_weights_at_every_position_of_a_map():
    config = training_suite.CELLS["spatial"]
    weights, flops = num_weights(config), forward_flops(config)
    assert flops["prior"] == 2 * 49 * weights["prior"]
    assert flops["posterior"] == 2 * 49 * weights["posterior"]
