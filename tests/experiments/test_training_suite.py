import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import training_suite
from experiments.config import Config, build_led

CONFIGS = {
    name: Config(dataset="synthetic", prior_depth=prior, posterior_depth=posterior)
    for name, (prior, posterior) in training_suite.CELLS.items()
} | {"both": Config(dataset="synthetic", prior_depth=3, posterior_depth=2)}


def led_and_params(config, scale=0.3):
    """A model of ours with random parameters, those that start at zero included."""
    led = build_led(config, training_suite._dataset())
    params = jax.jit(led.init)(jax.random.key(0), jnp.zeros((2, 784)))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [scale * jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)]
    shrunk = [v + n / max(1, v.shape[0]) ** 0.5 for v, n in zip(leaves, noise, strict=True)]
    return led, jax.tree.unflatten(treedef, shrunk)


def images():
    return np.random.default_rng(0).binomial(1, 0.13, (6, 784)).astype(np.float32)


def dense_layers(params):
    return [params[f"Dense_{i}"] for i in range(len(params))]


def conditioners(params, marker):
    """Each flow layer's conditioner: the dicts that hold `marker`, in order."""
    found = []

    def visit(node):
        if isinstance(node, dict) and marker in node:
            found.append(node)
        elif isinstance(node, dict | tuple | list):
            for child in node.values() if isinstance(node, dict) else node:
                visit(child)

    visit(params)
    return found


# Operations of the matrix products.


def test_flops_by_hand():
    mlp = 784 * 200 + 200 * 200 + 200 * 100 + 50 * 200 + 200 * 200 + 200 * 784
    coupling = 25 * 100 + 100 * 50
    made = 50 * 512 + 512 * 512 + 512 * 100
    products = {"mlp": 0, "prior12": 12 * coupling, "post4": 4 * made, "post12": 12 * made}
    for name, flow in products.items():
        forward = 2 * (mlp + flow)
        assert sum(training_suite.forward_flops(CONFIGS[name]).values()) == forward
        expected = 100 * (3 * forward - 2 * 784 * 200) / 1e9
        assert training_suite.step_gflop(CONFIGS[name]) == pytest.approx(expected)


def test_flops_are_twice_the_weights_where_nothing_is_masked():
    led = build_led(CONFIGS["prior12"], training_suite._dataset())
    params = jax.eval_shape(led.init, jax.random.key(0), jnp.zeros((2, 784)))
    weights = {
        part: sum(2 * leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim == 2)
        for part, tree in params.items()
    }
    assert training_suite.forward_flops(CONFIGS["prior12"]) == weights


# The peers compute the same bound as ours with the same parameters.


@pytest.mark.parametrize("name", ["mlp", "both"])
def test_torch_computes_the_same_bound(name):
    torch = pytest.importorskip("torch")
    from experiments.peers import torch_led

    config = CONFIGS[name]
    led, params = led_and_params(config)
    model = torch_led.TorchLED(config)

    def copy(net, layers):
        linears = [module for module in net if isinstance(module, torch.nn.Linear)]
        for linear, layer in zip(linears, layers, strict=True):
            linear.weight.data = torch.from_numpy(np.array(layer["kernel"]).T.copy())
            linear.bias.data = torch.from_numpy(np.array(layer["bias"]).ravel())

    def unblocked(layer, rows, columns):
        """A masked layer's dense kernel, from blocks of columns."""
        shape = layer["bias"].shape
        kernel, start = np.zeros((rows, *shape), np.float32), 0
        for i, size in enumerate(map(len, np.array_split(np.arange(shape[1]), columns))):
            block = layer.get(f"kernel_{i}")
            if block is not None:
                block = np.array(block).reshape(len(block), shape[0], size)
                kernel[: len(block), :, start : start + size] = block
            start += size
        return {"kernel": kernel.reshape(rows, -1), "bias": layer["bias"]}

    def num_blocks(layer):
        return 1 + max(int(k.removeprefix("kernel_")) for k in layer if k != "bias")

    copy(model.encoder, dense_layers(params["encoder"]))
    copy(model.decoder, dense_layers(params["decoder"]))
    priors = conditioners(params["prior"], "Dense_0")
    for layer, ours in zip(model.prior, priors, strict=True):
        copy(layer.net, dense_layers(ours))
    posteriors = conditioners(params["posterior"], "_MaskedDense_0")
    for layer, ours in zip(model.posterior, posteriors, strict=True):
        layers = [ours[f"_MaskedDense_{i}"] for i in range(len(ours))]
        sizes = [m.in_features for m in layer.net if isinstance(m, torch.nn.Linear)]
        copy(
            layer.net, [unblocked(m, n, num_blocks(m)) for m, n in zip(layers, sizes, strict=True)]
        )

    key, x = jax.random.key(2), images()
    noise = np.array(jax.random.normal(key, (len(x), 50)))
    expected = -led.elbo(params, key, jnp.asarray(x)).bound.mean()
    found = model(torch.from_numpy(x), torch.from_numpy(noise)).item()
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["mlp", "prior12"])
def test_distrax_computes_the_same_bound(name):
    pytest.importorskip("distrax")
    from experiments.peers import distrax_led
    from led_jax.flows import masks

    config = CONFIGS[name]
    led, params = led_and_params(config)
    model = distrax_led.DistraxLED(50, config.prior_depth, config.prior_hidden)
    key, x = jax.random.key(2), jnp.asarray(images())
    like = jax.eval_shape(model.init, key, x, key)["params"]
    layers = dense_layers(params["encoder"]) + dense_layers(params["decoder"])
    for i, layer in enumerate(conditioners(params["prior"], "Dense_0")):
        order = np.argsort(~masks.random_half((50,), i // 2), kind="stable")[:: -1 if i % 2 else 1]
        passing, rest = order[:25], order[25:]
        first, last = dense_layers(layer)
        outputs = np.concatenate([rest, 50 + rest])
        layers.append(first | {"kernel": jnp.zeros((50, 100)).at[passing].set(first["kernel"])})
        kernel = jnp.zeros((100, 100)).at[:, outputs].set(last["kernel"])
        layers.append({"kernel": kernel, "bias": jnp.zeros(100).at[outputs].set(last["bias"])})
    theirs = {f"Dense_{i}": layer for i, layer in enumerate(layers)}
    assert jax.tree.map(jnp.shape, theirs) == jax.tree.map(jnp.shape, like)
    expected = -led.elbo(params, key, x).bound.mean()
    found = model.apply({"params": theirs}, x, key)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("peer", "cell"), [("torch", "post1"), ("distrax", "mlp")])
def test_peers_are_timed_and_learn(monkeypatch, peer, cell):
    pytest.importorskip(peer)
    monkeypatch.setitem(training_suite.CELLS, "post1", (0, 1))
    data = np.random.default_rng(0).binomial(1, 0.13, (300, 784)).astype(np.uint8)
    result = training_suite.training_cell(cell, [peer, "distrax"], data, 2, (32, 32, 32))
    assert ("distrax_over_ours" in result) == (cell == "mlp")  # distrax has no MADE.
    assert result[f"{peer}_step_ms"] == min(result[f"{peer}_ways_ms"].values())
    ratio = result[f"{peer}_step_ms"] / result["step_ms"]
    assert result[f"{peer}_over_ours"] == pytest.approx(ratio)
    # A coin for every pixel costs 543 nats; a few steps improve on it.
    assert result["loss"] < 543 and result[f"{peer}_loss"] < 543
