import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import KEY

from led_jax import descriptions
from led_jax.descriptions import constructor, from_json, load, make, parse, register, save, to_json


class Map(NamedTuple):
    init: Callable[..., Any]
    apply: Callable[..., Any]
    num_params: int = 0

    def __repr__(self) -> str:
        return descriptions.describe(self)


class Model(NamedTuple):
    first: Map
    second: Map

    def __repr__(self) -> str:
        return descriptions.describe(self)


class Pair(NamedTuple):
    left: Any
    right: Any


class Net(nn.Module):
    width: int
    activation: Callable[..., Any] = nn.relu
    initializer: Callable[..., Any] = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x):
        return self.activation(nn.Dense(self.width, kernel_init=self.initializer)(x))


def dense(
    width: int,
    hidden: Sequence[int] = (8,),
    activation: Callable[..., Any] = jax.nn.relu,
    *,
    scale: float = 0.1,
    mode: str = "plain",
    network: Callable[..., Any] | None = None,
    mask: Any = None,
) -> Map:
    """A dense map."""

    def init(key, x):
        return {"kernel": scale * jax.random.normal(key, (x.shape[-1], width))}

    def apply(params, x):
        return activation(x @ params["kernel"])

    return Map(init, apply, width)


def compose(*maps: Map, **named: Map) -> Map:
    maps = (*maps, *named.values())

    def init(key, x):
        return tuple(m.init(key, x) for m in maps)

    def apply(params, x):
        for m, p in zip(maps, params, strict=True):
            x = m.apply(p, x)
        return x

    return Map(init, apply)


def network(shape: tuple[int, ...], hidden: Sequence[int] = (4,)) -> Callable[..., Any]:
    return functools.partial(Net, hidden[0])


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Gives each test its own names."""
    for table in ("_entries", "_by_id"):
        entries = getattr(descriptions, table).items()
        kept = {key: entry for key, entry in entries if entry.name.startswith("jax.")}
        monkeypatch.setattr(descriptions, table, kept)
    toys = {f.__name__: constructor(f) for f in (dense, compose, network)}
    for cls in (Model, Net, Pair):
        constructor(cls)
    toys["unit"] = register("unit", Map(lambda key, x: (), lambda params, x: x, 7))
    return type("Toys", (), toys)


def through_text(value):
    return from_json(json.loads(json.dumps(to_json(value), allow_nan=False)))


def test_a_constructor_stays_what_it_was(registry):
    assert registry.dense.__name__ == "dense"
    assert registry.dense.__doc__ == "A dense map."
    assert str(descriptions.inspect.signature(registry.dense)).startswith("(width: int, hidden")
    value = registry.dense(3)
    x = jnp.ones((2, 4))
    plain = dense(3)
    params = value.init(KEY, x)
    np.testing.assert_array_equal(params["kernel"], plain.init(KEY, x)["kernel"])
    np.testing.assert_array_equal(value.apply(params, x), plain.apply(params, x))
    assert jax.make_jaxpr(value.apply)(params, x).jaxpr.eqns
    with pytest.raises(TypeError, match="width"):
        registry.dense()


def test_repr_is_the_call_without_defaults(registry):
    inner = registry.dense(2, (3,), jnp.tanh, network=functools.partial(registry.network, (7, 7)))
    value = registry.compose(registry.dense(width=3, hidden=(8,)), registry.unit, last=inner)
    assert repr(value) == (
        "compose(dense(3), unit, last=dense(2, hidden=(3,), activation=jax.nn.tanh, "
        "network=functools.partial(network, (7, 7))))"
    )
    assert repr(Model(value, registry.unit)).endswith("second=unit)")
    assert repr(registry.network((2, 3))) == "network((2, 3))"
    assert repr(registry.dense(1)._replace(num_params=3)).startswith("Map(init=<init of dense(1)>")
    mask = registry.dense(1, mask=np.arange(100))
    assert "array([ 0, 1, 2, ..., 97, 98, 99]" in repr(mask)


def test_defaults_are_on_record(registry):
    assert to_json(registry.dense(1)) == {
        "make": "dense",
        "arguments": {
            "width": 1,
            "hidden": {"tuple": [8]},
            "activation": {"name": "jax.nn.relu"},
            "scale": 0.1,
            "mode": "plain",
            "network": None,
            "mask": None,
        },
    }


ARGUMENTS = [
    {"hidden": [4, 5]},
    {"hidden": ()},
    {"activation": jax.nn.elu},
    {"scale": float("inf")},
    {"scale": -0.0},
    {"scale": 1e16},
    {"scale": 1 / 3},
    {"scale": np.float32(0.1)},
    {"mode": "ü/\n"},
    {"mask": True},
    {"mask": 2**70},
    {"mask": {"a": (1, [None]), "b": {}}},
    {"mask": np.arange(6).reshape(2, 3).T},
    {"mask": np.array([], bool)},
    {"mask": jnp.array([1.5, 2], jnp.bfloat16)},
    {"mask": jnp.float32},
    {"network": Net(3, activation=nn.tanh)},
    {"network": functools.partial(Net, width=3)},
    {"network": functools.partial(jax.nn.leaky_relu, negative_slope=0.2)},
    {"network": dense},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_arguments_come_back_as_they_were(registry, arguments):
    arguments = {k: registry.dense if v is dense else v for k, v in arguments.items()}
    given = []

    @constructor(name="spy")
    def spy(**arguments):
        given.append(arguments)
        return Map(lambda key, x: (), lambda params, x: x)

    value = spy(**arguments)
    again = through_text(value)
    assert again == value
    assert hash(again) == hash(value)
    assert to_json(again) == to_json(value)
    jax.tree.map(assert_same, given[0], given[1])
    assert through_text(registry.dense(3, **arguments)) == registry.dense(3, **arguments)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, functools.partial):
        assert (a.func, a.args, a.keywords) == (b.func, b.args, b.keywords)
    elif hasattr(a, "dtype") and not isinstance(a, type) and hasattr(a, "shape"):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert repr(a) == repr(b)


def test_a_value_gives_its_arguments_back(registry):
    name, arguments = descriptions.arguments(registry.dense(3, scale=0.5))
    assert name == "dense" and arguments["width"] == 3 and arguments["scale"] == 0.5
    assert make(name, **arguments) == registry.dense(3, scale=0.5)
    for value in (registry.dense(3)._replace(init=None), 3, [registry.unit]):
        with pytest.raises(ValueError, match="expected what a constructor made"):
            descriptions.arguments(value)


def test_equality_is_that_of_the_calls(registry):
    d = registry.dense
    assert d(3) == d(width=3, hidden=(8,))
    different = [
        d(3),
        d(3, [8]),
        d(3, scale=1),
        d(3, scale=1.0),
        d(3, scale=0.0),
        d(3, scale=-0.0),
        d(3, mask=np.zeros(2)),
        d(3, mask=np.zeros(2, np.float32)),
        d(3, mask=jnp.zeros(2, np.float32)),
        registry.compose(d(3)),
        registry.compose(a=d(3)),
    ]
    assert len(set(different)) == len(different)
    assert d(3).init != d(3).apply
    # An argument without a description counts as itself.
    own = lambda x: x  # noqa: E731
    assert d(3, activation=own) == d(3, activation=own)
    assert d(3, activation=own) != d(3, activation=lambda x: x)


def test_what_the_caller_changes_later_is_not_on_record(registry):
    hidden, mask = [4], np.zeros(3)
    value = registry.dense(1, hidden, mask=mask)
    before = to_json(value)
    hidden.append(5)
    mask[0] = 1
    assert to_json(value) == before


@pytest.mark.slow
def test_equal_models_share_a_program(registry):
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, params, x):
        traces.append(model)
        return model.second.apply(params["second"], model.first.apply(params["first"], x))

    def build(width):
        return Model(registry.dense(width), registry.compose(registry.unit, registry.dense(2)))

    x = jnp.ones((2, 4))
    for width in (3, 3, 5):
        model = build(width)
        first = model.first.init(KEY, x)
        second = model.second.init(KEY, model.first.apply(first, x))
        run(model, {"first": first, "second": second}, x)
        run(through_text(model), {"first": first, "second": second}, x)
    assert traces == [build(3), build(5)]


@pytest.mark.slow
def test_constructors_work_on_traced_arguments(registry):
    @jax.jit
    def run(x):
        return registry.dense(2, mask=x).apply({"kernel": jnp.ones((3, 2))}, x)

    with jax.checking_leaks():
        assert run(jnp.ones((1, 3))).shape == (1, 2)


@pytest.mark.parametrize(
    "change,path",
    [
        (lambda t: t.dense(1)._replace(num_params=3), "model"),
        (lambda t: t.dense(1)._replace(apply=t.dense(1).apply), "model"),
        (lambda t: Map(*t.dense(1)[:2]), "model"),
        (lambda t: Map(t.dense(1).apply, t.dense(1).init), "model"),
        (lambda t: dense(1), "model"),
        (lambda t: Model(t.unit, dense(1)), "model/second"),
        (lambda t: t.compose(t.unit, t.dense(1, mask=(object(),))), "model/maps/1/mask/0"),
        (lambda t: t.dense(1, activation=lambda x: x), "model/activation"),
        (lambda t: t.dense(1, mask={1: 2}), "model/mask"),
        (lambda t: t.dense(1, mask=jax.random.key(0)), "model/mask"),
        (lambda t: t.dense(1, mask=np.array(["a"])), "model/mask"),
        (lambda t: t.dense(1, network=t.dense(1).apply), "model/network"),
    ],
)
def test_what_has_no_description_is_refused(registry, change, path):
    with pytest.raises(ValueError, match=rf"(?s)^{path} has no description.*constructor"):
        to_json(change(registry))


def test_a_default_without_description_is_left_out(registry):
    @constructor
    def shifted(shift, function=lambda x: x):
        return Map(lambda key, x: (), lambda params, x: function(x) + shift)

    assert to_json(shifted(2)) == {"make": "shifted", "arguments": {"shift": 2}}
    assert through_text(shifted(2)).apply((), 3) == 5
    assert through_text(Net(3)) == Net(3)


def test_a_user_registers_a_constructor_in_one_line(registry):
    @constructor(name="mine.planar")
    def planar(width: int = 2):
        return registry.dense(width)

    assert repr(planar()) == "mine.planar()"
    assert through_text(registry.compose(planar(3))) == registry.compose(planar(3))


def test_a_name_stands_for_one_thing(registry):
    def other():
        return registry.unit

    with pytest.raises(ValueError, match="'dense' is the name of .* already"):
        constructor(other, name="dense")
    with pytest.raises(ValueError, match="'unit' is the name of"):
        register("unit", registry.dense(1))
    before = registry.dense(1)
    assert constructor(dense)(1) != before  # Defined again, it may be another function.
    with pytest.raises(TypeError, match="NamedTuple or a dataclass"):
        constructor(dict)
    with pytest.raises(TypeError, match="text: a constructor returns a NamedTuple of functions"):
        constructor(lambda: "text", name="text")()


@pytest.mark.parametrize(
    "data,message",
    [
        ({"make": "planar", "arguments": {}}, "'planar' is not registered; import the module"),
        ({"name": "planar"}, "'planar' is not registered"),
        ({"make": "unit", "arguments": {}}, "'unit' is no constructor; .* There are Model, Net"),
        ({"make": "dense", "arguments": {}}, "dense: missing a required argument: 'width'"),
        ({"make": "dense", "arguments": {"depth": 1}}, "dense has no argument depth; it has width"),
        ({"make": "dense", "arguments": {"width": 1}, "more": 1}, "no description"),
        (
            {"make": "network", "arguments": {"shape": 1, "hidden": 3}},
            "shape must be a sequence of int",
        ),
        ({"make": "compose", "arguments": {"maps": 3}}, "iterable"),
        ({"partial": "unit", "positional": [], "arguments": {}}, "no description"),
        ({"import": "os"}, "no description"),
        ({1: 2}, "no description"),
        ({"tuple": 3}, "no description"),
        ({"float": "1"}, "no description"),
        ({"leaf": {"dtype": "int8", "shape": []}}, "no description"),
        ({"numpy": {"dtype": "O", "shape": [1], "data": ""}}, "no dtype and shape"),
        ({"numpy": {"dtype": "int8", "shape": [-1], "data": ""}}, "no dtype and shape"),
        ({"numpy": {"dtype": "int8", "shape": [2], "data": "AA=="}}, "do not fit"),
        ({"numpy": {"dtype": "int8", "shape": [1], "data": "!"}}, "do not fit"),
        (functools.reduce(lambda a, _: [a], range(200), None), "nested more than 100"),
    ],
)
def test_damaged_descriptions_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        from_json(data)


def build(toys):
    mask = np.arange(6) % 2 == 0
    inner = toys.dense(2, (3,), jnp.tanh, mask=mask, network=functools.partial(toys.network, (7,)))
    return Model(toys.dense(3), toys.compose(toys.unit, last=inner))


def test_random_damage_is_refused_or_harmless(registry, tmp_path):
    text = json.dumps(to_json(build(registry)))
    rng = random.Random(0)
    for _ in range(300):
        i, j = sorted(rng.choices(range(len(text)), k=2))
        damaged = text[:i] + rng.choice(["", "0", "[", '"', "{}", text[i : i + 9]]) + text[j:]
        try:
            from_json(json.loads(damaged))
        except ValueError:
            pass


def tree():
    key = iter(jax.random.split(KEY, 20))
    return {
        "a": (jax.random.normal(next(key), (3, 2)), [jnp.zeros((0, 4)), None]),
        "a/b": {"": jnp.arange(3), "file": jnp.bool_(True), "ü.npy": np.ones((2, 3)).T == 1},
        "pair": Pair(jax.random.normal(next(key), (5,), jnp.bfloat16), Pair((), {})),
        "small": jnp.array([0.5, -0.0, np.inf, np.nan], jnp.float8_e5m2),
        "half": jnp.array(1.5, jnp.float16),
        "number": 0.25,
    }


@pytest.mark.parametrize("params", [tree(), jnp.ones(3), {}, ()], ids=["tree", "leaf", "{}", "()"])
def test_parameters_come_back_as_they_were(registry, tmp_path, params):
    path = tmp_path / "new" / "model"
    save(path, build(registry), params)
    save(path, build(registry), params)  # Replaces the first.
    model, again = load(path)
    assert model == build(registry)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert sorted(os.listdir(path)) == ["model.json", "params.npz"]


def test_the_files_can_be_read_without_this_library(registry, tmp_path):
    save(tmp_path, build(registry), {"layer": ({"kernel": jnp.ones((2, 3))},)})
    with np.load(tmp_path / "params.npz", allow_pickle=False) as file:
        assert file["params/layer/0/kernel"].shape == (2, 3)
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["model"]["make"] == "Model"
    assert record["format"] == 1


def test_wide_parameters_need_wide_types(registry, tmp_path, x64):
    save(tmp_path, registry.unit, jnp.ones(3, jnp.float64))
    assert load(tmp_path)[1].dtype == jnp.float64
    with jax.enable_x64(False), pytest.raises(ValueError, match="params was saved as float64"):
        load(tmp_path)


def test_parameters_without_description_are_refused(registry, tmp_path):
    for leaf in (object(), np.array(["a"]), jax.random.key(0)):
        with pytest.raises(ValueError, match="params/a/0 has no description"):
            save(tmp_path, registry.unit, {"a": (leaf,)})
    assert not list(tmp_path.iterdir())


def resave(path, record=None, arrays=None, compress=False):
    """Writes other contents with a SHA-256 that matches."""
    files = {"params.npz": None}
    if arrays is not None:
        with open(path / "params.npz", "wb") as file:
            (np.savez_compressed if compress else np.savez)(file, **arrays)
    data = (path / "params.npz").read_bytes()
    old = json.loads((path / "model.json").read_text())
    files = {**old, "sha256": descriptions.hashlib.sha256(data).hexdigest(), **(record or {})}
    (path / "model.json").write_text(json.dumps(files))


def header(dtype, *shape):
    return {"params": {"dict": {"w": {"leaf": {"dtype": dtype, "shape": list(shape)}}}}}


@pytest.mark.parametrize(
    "damage,message",
    [
        ({"record": {"format": 2}}, "no model in format 1"),
        ({"record": {"more": 2}}, "expected format, model, params and sha256"),
        ({"record": header("float32", 4)}, "params/w: 140 bytes|params/w: .*expected"),
        ({"record": header("int32", 3)}, r"params/w: .*expected int32"),
        ({"record": header("float32", 3, 1)}, r"params/w: .*expected float32"),
        ({"record": header("float32", 10**15)}, "params/w: .* bytes, expected"),
        ({"record": header("object", 3)}, "params/w: no dtype"),
        ({"record": {"params": {"tuple": []}}}, "params/w is not in model.json"),
        ({"record": {"params": {"make": "rm", "arguments": {}}}}, "'rm' is not registered"),
        ({"arrays": {}}, "params/w: missing"),
        ({"arrays": {"params/w": np.zeros(4, np.float32)}}, "params/w: "),
        ({"arrays": {"params/w": np.zeros((3,), np.int32)}}, "params/w: "),
        ({"arrays": {"params/w": np.array([None] * 3)}}, "params/w: "),
        ({"arrays": {"params/w": np.zeros(10**6)}, "compress": True}, "larger than the file"),
        ({"arrays": {"params/w": np.ones(3, np.float32)}, "compress": True}, "larger|compressed"),
    ],
)
def test_damaged_files_are_refused(registry, tmp_path, damage, message):
    save(tmp_path, registry.unit, {"w": jnp.ones(3)})
    resave(tmp_path, **damage)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_half_written_model_is_refused(registry, tmp_path, monkeypatch):
    save(tmp_path, registry.unit, jnp.ones(3))
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(OSError, match="disk"):
        save(tmp_path, registry.unit, jnp.zeros(3))
    with pytest.raises(ValueError, match="params.npz is not the one"):
        load(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


def test_flipped_bytes_are_refused(registry, tmp_path):
    save(tmp_path, registry.unit, {"w": jnp.ones(30), "v": jnp.ones((3, 2), jnp.bfloat16)})
    good, rng = (tmp_path / "params.npz").read_bytes(), random.Random(0)
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "params.npz").write_bytes(data[: rng.choice([len(data), rng.randrange(700)])])
        with pytest.raises(ValueError, match="is not the one"):
            load(tmp_path)
        resave(tmp_path)
        try:
            load(tmp_path)
        except ValueError:
            pass


def test_flags_name_a_constructor_and_its_arguments(registry):
    assert parse("dense") == ("dense", {})
    text = "dense:width=4, hidden=64x32,activation=jax.nn.elu,scale=1,mode=none,mask=(1,2.5,none)"
    name, arguments = parse(text)
    assert (name, arguments) == (
        "dense",
        {
            "width": 4,
            "hidden": (64, 32),
            "activation": jax.nn.elu,
            "scale": 1.0,
            "mode": "none",
            "mask": (1, 2.5, None),
        },
    )
    assert type(arguments["scale"]) is float
    assert parse("dense:hidden=100,mask=true")[1] == {"hidden": (100,), "mask": True}
    assert parse("network:shape=7,hidden=()")[1] == {"shape": (7,), "hidden": ()}
    assert parse("dense:hidden=(64,)")[1] == {"hidden": (64,)}
    assert make(name, **arguments) == registry.dense(
        4, (64, 32), jax.nn.elu, scale=1.0, mode="none", mask=(1, 2.5, None)
    )
    assert make("compose", maps=(registry.unit,)) == registry.compose(registry.unit)
    nested = parse("dense:width=4,network=network(shape=7,hidden=(3)),mode=none")[1]
    assert nested["network"].args == registry.network((7,), (3,)).args


@pytest.mark.parametrize(
    "text,message",
    [
        ("planar:depth=1", "'planar' is not registered.* There are .*compose, dense, network"),
        ("netwrok", "'netwrok' is not registered.*Did you mean network\\?"),
        ("unit", "'unit' is no constructor"),
        ("dense:depth=4", "dense has no argument depth; it has width, hidden"),
        ("dense:width", "expected NAME:KEY=VALUE"),
        ("dense:width=1,width=2", "expected NAME:KEY=VALUE"),
        ("dense:network=network(7)", "'network:7': expected NAME:KEY=VALUE"),
        ("dense:network=network()", "network: missing a required argument: 'shape'.*:shape=..."),
        (
            "dense:activation=rleu",
            "dense:activation: 'rleu' is not registered.* jax.nn.relu.*unit",
        ),
    ],
)
def test_flags_that_name_nothing(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_missing_argument_is_named():
    with pytest.raises(ValueError, match="missing a required argument: 'width'"):
        make("dense", scale=1.0)


# Three models that no flag can name, and a model that flags name.
MODELS = """
import functools
import sys
import jax
import jax.numpy as jnp
import numpy as np
import led_jax
from led_jax import LED, decoders, densities, encoders, flows, likelihoods

def prior(flow, shape=(4,)):
    return densities.transformed(densities.standard_normal(shape), flow)

def different_layers():
    mask = np.array([True, False, False, True])
    posterior = flows.chain(
        flows.actnorm(),
        flows.coupling(mask, flows.mlp((6,), activation=jnp.tanh), flows.additive),
        flows.permute([2, 0, 3, 1]),
        flows.autoregressive(flows.made((8,), context_dim=2), flows.gate(0.5)),
    )
    encoder = encoders.mlp_encoder(4, (8,), context_dim=2)
    return LED(encoder, posterior, prior(flows.chain()), decoders.mlp_decoder(16, (8,)))

def inverted_spline_prior():
    spline = flows.real_nvp((4,), 2, (8,), transformer=flows.spline(3, bound=4.0), seed=3)
    decoder = decoders.mlp_decoder(16, (8,), likelihood=likelihoods.gaussian(0.5))
    return LED(encoders.mlp_encoder(4, (8,)), flows.chain(), prior(flows.invert(spline)), decoder)

def latent_map():
    shape = (2, 2, 2)
    convnet = functools.partial(flows.convnet, shape, activation=jax.nn.elu)
    flow = flows.real_nvp(shape, 2, (4,), "checkerboard", conditioner=convnet)
    return LED(
        encoders.spatial_encoder((4, 4), shape, (3,), weight_norm=True),
        flows.chain(event_ndims=3),
        prior(flow, shape),
        decoders.spatial_decoder((4, 4), shape, (3,), weight_norm=True),
    )

x = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 16)).astype(float)
for build in (different_layers, inverted_spline_prior, latent_map):
    path = f"{sys.argv[2]}/{build.__name__}"
    if sys.argv[1] == "save":
        led = build()
        params = jax.jit(led.init)(jax.random.key(0), x)
        leaves, tree = jax.tree.flatten(params)
        noise = np.random.default_rng(0)
        leaves = [p + 0.1 * noise.normal(size=p.shape).astype(p.dtype) for p in leaves]
        params = jax.tree.unflatten(tree, leaves)
        led_jax.save(path, led, params)
    else:
        led, params = led_jax.load(path)
        assert led == build()
    bound = jax.jit(led.elbo, static_argnums=3)(params, jax.random.key(2), x, (2,)).bound
    assert bound.shape == (2, 3) and jnp.isfinite(bound).all()
    print(led, bound.tobytes().hex())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("fast_compile")
def test_another_process_has_the_same_bounds_to_the_bit(tmp_path):
    def run(verb):
        command = [sys.executable, "-c", MODELS, verb, str(tmp_path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    saved = run("save")
    assert len(saved.splitlines()) == 3
    assert "prior=transformed(standard_normal((4,)), flow=invert(real_nvp((4,), depth=2" in saved
    assert run("load") == saved
