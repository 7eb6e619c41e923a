import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import training_suite
from experiments.config import Config
from experiments.models import build_led

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]

CONFIGS = training_suite.CELLS | {
    "both": Config(dataset="synthetic", prior_depth=3, posterior_depth=2)
}


def led_and_params(config, scale=0.3):
    """A model of ours with noise added to all parameters, also to those that start at zero."""
    led = build_led(config, training_suite._dataset())
    params = jax.jit(led.init)(jax.random.key(0), jnp.zeros((2, 784)))
    rng = np.random.default_rng(1)

    def add_noise(leaf):
        fan_in = leaf.shape[-2:][0] if leaf.ndim else 1
        noise = scale * rng.normal(size=leaf.shape) / max(1, fan_in) ** 0.5
        return jax.device_put(np.float32(leaf + noise))

    return led, jax.tree.map(add_noise, jax.device_get(params))


def images():
    return np.random.default_rng(0).binomial(1, 0.13, (6, 784)).astype(np.float32)


def dense_layers(params, name="Dense"):
    return [params[f"{name}_{i}"] for i in range(len(params))]


def conditioners(params, marker):
    """Parameters of each flow layer's conditioner, from stacked dicts with the key `marker`."""
    if isinstance(params, dict) and marker in params:
        depth = len(jax.tree.leaves(params)[0])
        return [jax.tree.map(operator.itemgetter(i), params) for i in range(depth)]
    children = params.values() if isinstance(params, dict) else params
    return [layer for child in children for layer in conditioners(child, marker)]


def rows_of(layer, count):
    """A masked layer without the inputs that no unit sees, which torch's layers do not have."""
    return layer | {"kernel": layer["kernel"][:count]}


def copy_to_torch(net, layers):
    """Our layers' parameters into a network's linear layers and convolutions, in order."""
    import torch

    kinds = torch.nn.Linear, torch.nn.Conv2d
    for module, layer in zip(
        (m for m in net.modules() if isinstance(m, kinds)), layers, strict=True
    ):
        kernel = np.array(layer.get("kernel", layer.get("kernel_0")))
        kernel = np.moveaxis(kernel, (-1, -2), (0, 1)).reshape(module.weight.shape)
        module.weight.data = torch.from_numpy(kernel.copy())
        if "bias" in layer:
            module.bias.data = torch.from_numpy(np.array(layer["bias"]).ravel())


def assert_same_terms(model, led, params, noise_axes):
    """Asserts that the batch means of the bound's three terms equal ours for the same noise."""
    import torch

    key, x = jax.random.key(2), images()
    expected = [term.mean() for term in jax.jit(led.elbo)(params, key, x)]
    encoding = jax.eval_shape(led.encoding, params, x)
    noise = np.array(jax.random.normal(key, encoding.mean.shape).transpose(noise_axes))
    with torch.no_grad():
        found = model(torch.from_numpy(x), torch.from_numpy(noise))
    np.testing.assert_allclose(found, expected, rtol=2e-5)


# The peers compute the same bound as ours with the same parameters.


@pytest.mark.parametrize("name", ["mlp", "both"])
def test_torch_computes_the_same_bound(name):
    torch = pytest.importorskip("torch")
    from experiments.benchmark.peers import torch_led

    config = CONFIGS[name]
    led, params = led_and_params(config)
    model = torch_led.TorchLED(config)

    copy_to_torch(model.encoder, dense_layers(params["encoder"]))
    copy_to_torch(model.decoder, dense_layers(params["decoder"]))
    priors = conditioners(params["prior"], "dense_0")
    for layer, ours in zip(model.prior, priors, strict=True):
        copy_to_torch(layer.net, dense_layers(ours, "dense"))
    posteriors = conditioners(params["posterior"], "dense_0")
    for layer, ours in zip(model.posterior, posteriors, strict=True):
        sizes = [m.in_features for m in layer.net if isinstance(m, torch.nn.Linear)]
        layers = zip(dense_layers(ours, "dense"), sizes, strict=True)
        copy_to_torch(layer.net, [rows_of(m, n) for m, n in layers])
    assert_same_terms(model, led, params, (0, 1))


@pytest.mark.parametrize("name", ["resconv", "spatial"])
def test_torch_computes_the_same_bound_with_convolutions(name):
    pytest.importorskip("torch")
    from experiments.benchmark.peers import torch_led

    config = CONFIGS[name]
    led, params = led_and_params(config, scale=0.03)
    model = torch_led.TorchLED(config)

    def convolutions(params):
        blocks = [params[f"ResBlock_{i}"] for i in range(3) if f"ResBlock_{i}" in params]
        return [block[name] for block in blocks for name in ("Conv_0", "Conv_1")]

    def ends(params):
        return [params[name] for name in ("Conv_0", "Dense_0", "Dense_1") if name in params]

    def channels_first(axis, layer):
        """A dense layer that reads (axis 0) or writes (axis 1) the smallest map."""
        for part in {"kernel", "bias"} if axis else {"kernel"}:
            value = layer[part]
            at = value.ndim - 2 + axis if part == "kernel" else 0
            maps = value.reshape(*value.shape[:at], 4, 4, 32, *value.shape[at + 1 :])
            layer = layer | {part: jnp.moveaxis(maps, at + 2, at).reshape(value.shape)}
        return layer

    encoder_ends, decoder_ends = ends(params["encoder"]), ends(params["decoder"])
    if name == "resconv":
        encoder_ends[0] = channels_first(0, encoder_ends[0])
        decoder_ends[1] = channels_first(1, decoder_ends[1])
    copy_to_torch(model.encoder, convolutions(params["encoder"]) + encoder_ends)
    copy_to_torch(model.decoder, decoder_ends + convolutions(params["decoder"]))
    for layer, ours in zip(model.prior, conditioners(params["prior"], "conv_0"), strict=True):
        copy_to_torch(layer.net, [ours["conv_0"], ours["conv_1"]])
    posteriors = conditioners(params["posterior"], "pixel")
    for layer, ours in zip(model.posterior, posteriors, strict=True):
        stacks, pixel = ours["stacks"], ours["pixel"]
        for part in ("above", "left"):
            copy_to_torch(getattr(layer, part), [stacks[f"{part}_0"], stacks[f"{part}_1"]])
        copy_to_torch(layer.down, [stacks["join_0"], stacks["join_1"]])
        copy_to_torch(layer.context, [stacks["context"]])
        copy_to_torch(layer.pixel, [rows_of(pixel["dense_0"], layer.pixel.in_features)])
        copy_to_torch(layer.pixel_context, [pixel["context"]])
        copy_to_torch(layer.out, [rows_of(pixel["dense_1"], layer.out[0].in_features)])
    # No unit may see the last channel of a pixel, but our layers have weights for it.
    unseen = 16 * config.posterior_depth
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(leaf.size for leaf in jax.tree.leaves(params)) - unseen
    )
    assert_same_terms(model, led, params, (0, 3, 1, 2) if config.latent_shape else (0, 1))


def test_torch_learns_with_convolutions_in_every_way():
    pytest.importorskip("torch")
    from experiments.benchmark.peers import torch_led

    data = np.random.default_rng(0).binomial(1, 0.13, (100, 784)).astype(np.uint8)
    epochs = torch_led.make_epochs(CONFIGS["spatial"], data)
    assert {way.split()[-1] for way in epochs} == {"threads", "last"}
    for epoch in epochs.values():
        assert epoch() > epoch()


@pytest.mark.parametrize("name", ["mlp", "prior12"])
def test_distrax_computes_the_same_bound(name):
    pytest.importorskip("distrax")
    from experiments.benchmark.peers import distrax_led
    from led_jax.flows import masks

    config = CONFIGS[name]
    led, params = led_and_params(config)
    model = distrax_led.DistraxLED(50, config.prior_depth, config.prior_hidden)
    key, x = jax.random.key(2), jnp.asarray(images())
    like = jax.eval_shape(model.init, key, x, key)["params"]
    layers = dense_layers(params["encoder"]) + dense_layers(params["decoder"])
    for i, layer in enumerate(conditioners(params["prior"], "dense_0")):
        order = np.argsort(~masks.random_half((50,), i // 2), kind="stable")[:: -1 if i % 2 else 1]
        passing, rest = order[:25], order[25:]
        first, last = dense_layers(layer, "dense")
        outputs = np.concatenate([rest, 50 + rest])
        layers.append(first | {"kernel": jnp.zeros((50, 100)).at[passing].set(first["kernel"])})
        kernel = jnp.zeros((100, 100)).at[:, outputs].set(last["kernel"])
        layers.append({"kernel": kernel, "bias": jnp.zeros(100).at[outputs].set(last["bias"])})
    theirs = {f"Dense_{i}": layer for i, layer in enumerate(layers)}
    assert jax.tree.map(jnp.shape, theirs) == jax.tree.map(jnp.shape, like)
    expected = [term.mean() for term in jax.jit(led.elbo)(params, key, x)]
    found = model.apply({"params": theirs}, x, key)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("peer", "cell"), [("torch", "post1"), ("distrax", "mlp")])
def test_peers_are_timed_and_learn(monkeypatch, peer, cell):
    pytest.importorskip(peer)
    post1 = Config(dataset="synthetic", prior_depth=0, posterior_depth=1)
    monkeypatch.setitem(training_suite.CELLS, "post1", post1)
    data = np.random.default_rng(0).binomial(1, 0.13, (300, 784)).astype(np.uint8)
    result = training_suite.training_cell(cell, [peer, "distrax"], data, 2, (32, 32, 32))
    assert ("distrax_over_ours" in result) == (cell == "mlp")  # distrax has no MADE.
    assert result[f"{peer}_step_ms"] == min(result[f"{peer}_ways_ms"].values())
    ratio = result[f"{peer}_step_ms"] / result["step_ms"]
    assert result[f"{peer}_over_ours"] == pytest.approx(ratio)
    # A coin for every pixel costs 543 nats; a few steps improve on it.
    assert result["loss"] < 543 and result[f"{peer}_loss"] < 543
