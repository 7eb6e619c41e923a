"""A model in a directory, sampled and scored with no data set."""

import json
import os
import sys

import jax
import numpy as np
import pytest
from absl import flags
from matplotlib import image
from support import KEY, random_params

import led_jax
from led_jax import decoders, densities, encoders, estimators, flows, likelihoods

SCORE = "--workdir=MODELS/flow --output=s.npz"
CLASSES = "--workdir=MODELS/classes --output=s.npz --input=in.npz"
pytestmark = pytest.mark.usefixtures("fast_compile")
SIZE, LATENT = 12, 3


def make(prior=None, likelihood=None, num_classes=None):
    flow = flows.real_nvp((LATENT,), 2, hidden=(8,), context_dim=num_classes)
    led = led_jax.LED(
        encoders.mlp_encoder(LATENT, (8,)),
        flows.chain(),
        prior or densities.transformed(densities.standard_normal((LATENT,)), flow),
        decoders.mlp_decoder(SIZE, (8,), likelihood=likelihood),
    )
    context = [] if num_classes is None else [np.zeros((2, num_classes), np.float32)]
    return led, random_params(led.init, np.zeros((2, SIZE), np.float32), *context)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    led_jax.save(directory / "flow", *make())
    led_jax.save(directory / "plain", *make(densities.standard_normal((LATENT,))))
    led_jax.save(directory / "levels", *make(likelihood=likelihoods.discretized_logistic(2)))
    led_jax.save(directory / "real", *make(likelihood=likelihoods.gaussian(0.5)))
    (directory / "record").mkdir()
    led_jax.save(directory / "record", *make())
    (directory / "record" / "result.json").write_text('{"image_shape": [3, 4]}')
    (directory / "classes").mkdir()
    led_jax.save(directory / "classes", *make(num_classes=3))
    (directory / "classes" / "result.json").write_text('{"image_shape": [3, 4], "num_classes": 3}')
    return directory


@pytest.fixture
def own_flags():
    """Restores the process's flags after a test, as other tests have defined theirs."""
    state = vars(flags.FLAGS)
    before = {
        name: {key: list(v) if isinstance(v, list) else v for key, v in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in state.items()
    }
    yield
    state.clear()
    state.update(before)


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path, models, own_flags):
    """Runs a binary's `main` in `tmp_path`; gives its JSON, or the error's line."""
    monkeypatch.chdir(tmp_path)

    def run(name, args):
        # Flags are defined when a binary is imported; two binaries share names.
        for key in list(flags.FLAGS):
            if str(flags.FLAGS.find_module_defining_flag(key)).startswith("experiments."):
                delattr(flags.FLAGS, key)
        monkeypatch.delitem(sys.modules, f"experiments.{name}", raising=False)
        module = __import__(f"experiments.{name}", fromlist=["main"])
        flags.FLAGS([name, *args.replace("MODELS", str(models)).split()])
        try:
            module.main([name])
        except SystemExit as error:
            return str(error)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.slow
def test_samples_are_the_models(launch, models, tmp_path):
    said = launch("sample", "--workdir=MODELS/record --num=400 --output=s.npz --seed=3")
    assert said == {
        "output": "s.npz",
        "seed": 3,
        "arrays": {"z": [400, LATENT], "mean": [400, 3, 4], "x": [400, 3, 4]},
    }
    led, params = led_jax.load(models / "record")
    with np.load(tmp_path / "s.npz") as arrays:
        z, mean, x = (arrays[name] for name in ("z", "mean", "x"))
    np.testing.assert_allclose(mean.reshape(400, -1), led.decode(params, z), rtol=1e-5)
    assert set(np.unique(x)) == {0, 1}
    # Each pixel's frequency has a standard deviation of 0.025 at most about its mean.
    np.testing.assert_allclose(x.mean(0), mean.mean(0), atol=0.12)
    assert len(np.unique(z)) == z.size
    assert os.listdir(tmp_path) == ["s.npz"]


@pytest.mark.slow
def test_lines_in_z0_are_straight_in_the_flows_base(launch, models, tmp_path):
    launch("sample", "--workdir=MODELS/flow --num=2 --interpolate --steps=5 --output=s.npz")
    led, params = led_jax.load(models / "flow")
    flow = flows.real_nvp((LATENT,), 2, hidden=(8,))
    with np.load(tmp_path / "s.npz") as file:
        arrays = dict(file)
    assert arrays["mean_z0"].shape == (2, 5, SIZE)
    for name in ("z", "z0"):
        np.testing.assert_allclose(np.diff(arrays[name], 2, axis=1), 0, atol=1e-5)
    # Both lines have the same ends, but different middles.
    z, _ = flow.apply(params["prior"]["flow"], arrays["z0"])
    np.testing.assert_allclose(z[:, [0, -1]], arrays["z"][:, [0, -1]], atol=1e-5)
    assert np.abs(z[:, 2] - arrays["z"][:, 2]).max() > 1e-2
    np.testing.assert_allclose(arrays["mean_z0"], led.decode(params, z), atol=1e-5)
    np.testing.assert_allclose(arrays["mean_z"], led.decode(params, arrays["z"]), atol=1e-5)


def test_a_prior_without_a_flow_has_lines_in_z_alone(launch, tmp_path):
    said = launch("sample", "--workdir=MODELS/plain --num=2 --interpolate --output=s.npz")
    assert said["arrays"].keys() == {"z", "mean_z"}


@pytest.mark.slow
@pytest.mark.parametrize(("option", "rows"), [("", 2), ("--interpolate", 12 * 2)])
def test_pictures(launch, tmp_path, option, rows):
    launch("sample", f"--workdir=MODELS/record --num=12 --output=s.png {option}")
    pixels = image.imread(tmp_path / "s.png")
    scale = 56 // 3
    assert pixels.shape[:2] == ((rows * 4 + 1) * scale, (10 * 5 + 1) * scale)
    launch("sample", "--workdir=MODELS/flow --num=3 --image_shape=2,2,3 --output=c.png")
    colours = image.imread(tmp_path / "c.png")[..., :3]
    assert np.ptp(colours, axis=-1).max() > 0.01 and (colours[0] == 1).all()


@pytest.mark.slow
def test_samples_class_by_class(launch, models, tmp_path):
    args = "--workdir=MODELS/classes --num=4 --output"
    assert launch("sample", f"{args}=s.npz")["arrays"]["x"] == [4, 3, 3, 4]
    led, params = led_jax.load(models / "classes")
    with np.load(tmp_path / "s.npz") as arrays:
        mean = led.decode(params, arrays["z"], np.eye(3, dtype=np.float32))
        np.testing.assert_allclose(arrays["mean"].reshape(4, 3, -1), mean, rtol=1e-5)
        x = arrays["x"]
    assert launch("sample", f"{args}=l.npz --labels=2,0")["arrays"]["z"] == [4, 2, LATENT]
    launch("sample", f"{args}=l.npz --interpolate --steps=3 --labels=1")
    with np.load(tmp_path / "l.npz") as arrays:
        for name in ("z", "z0"):
            np.testing.assert_allclose(np.diff(arrays[name], 2, axis=1), 0, atol=1e-5)
        ends = [arrays[name][:, [0, -1]] for name in ("mean_z", "mean_z0")]
        np.testing.assert_allclose(*ends, atol=1e-5)
    launch("sample", f"{args}=s.png")
    scale = 56 // 3
    pixels = image.imread(tmp_path / "s.png")
    assert pixels.shape[:2] == ((4 * 4 + 1) * scale, (3 * 5 + 1) * scale)
    np.savez(tmp_path / "rows.npz", x=x[:, 1], c=np.ones(4, int))
    score = "--workdir=MODELS/classes --input=rows.npz --output=n.npz --nll_samples=9 --array=x"
    launch("score", f"{score} --context=c")
    rows, context = x[:, 1].reshape(4, SIZE).astype(np.float32), np.eye(3)[np.ones(4, int)]
    expected = estimators.nll(led, params, KEY, rows, 9, context=context)
    with np.load(tmp_path / "n.npz") as scores:
        np.testing.assert_allclose(scores["nll"], expected.per_example, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float64])
def test_scores_are_the_estimators(launch, models, tmp_path, dtype):
    x = np.random.default_rng(0).integers(0, 2, (7, 3, 4)).astype(dtype)
    np.savez_compressed(tmp_path / "rows.npz", rows=x)
    said = launch(
        "score", "--workdir=MODELS/flow --input=rows.npz --output=s.npz --nll_samples=40 --seed=2"
    )
    led, params = led_jax.load(models / "flow")
    expected = estimators.nll(
        led, params, jax.random.key(2), x.reshape(7, 12).astype(np.float32), 40
    )
    with np.load(tmp_path / "s.npz") as scores:
        np.testing.assert_allclose(scores["nll"], expected.per_example, rtol=1e-5)
        assert scores["error"].shape == (7,) and (scores["error"] > 0).all()
        total = np.sqrt((scores["error"] ** 2).sum()) / 7
    assert said["nll_monte_carlo_se"] == pytest.approx(total, rel=1e-5)
    assert said["rows"] == 7 and said["nll"] == pytest.approx(expected.nll, rel=1e-5)


@pytest.mark.slow
def test_a_gaussian_model_scores_real_numbers(launch, tmp_path):
    np.savez(tmp_path / "rows.npz", a=np.full((3, SIZE), -3.5), b=np.zeros(2))
    args = "--workdir=MODELS/real --input=rows.npz --output=s.npz --nll_samples=4"
    assert launch("score", f"{args} --array=a")["nll"] > 0


@pytest.mark.slow
def test_samples_of_levels_can_be_scored(launch, tmp_path):
    launch("sample", "--workdir=MODELS/levels --num=5 --output=rows.npz")
    with np.load(tmp_path / "rows.npz") as arrays:
        assert arrays["x"].dtype == np.uint8 and arrays["x"].max() > 1 >= arrays["mean"].max()
    args = "--workdir=MODELS/levels --input=rows.npz --array=x --output=s.npz --nll_samples=4"
    assert launch("score", args)["nll"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("binary", "args", "message"),
    [
        ("sample", "--workdir=absent --output=s.npz", "absent holds no model.json"),
        ("sample", "--workdir=MODELS/flow", "--output must name a file"),
        ("sample", "--workdir=MODELS/flow --output=s.gif", "--output must name a file"),
        ("sample", "--workdir=MODELS/flow --output=no/s.npz", "in an existing directory"),
        ("sample", "--workdir=MODELS/flow --output=s.png", "a .png needs images"),
        ("sample", "--workdir=MODELS/flow --output=s.png --image_shape=5,5", "has 12 entries"),
        ("sample", "--workdir=MODELS/flow --output=s.png --image_shape=a,5", "must be H,W"),
        ("score", "--workdir=MODELS/flow --output=s.npz --input=absent.npz", "not an existing"),
        ("score", "--workdir=MODELS/flow --output=s.png --input=in.npz", "must name a file"),
        ("sample", "--workdir=MODELS/flow --output=s.npz --labels=1", "of --condition=labels"),
        ("sample", "--workdir=MODELS/classes --output=s.npz --labels=3", "3 classes, 0 up to 2"),
        ("score", f"{CLASSES} --array=bits", "name the array of its labels by --context"),
        ("score", f"{CLASSES} --array=bits --context=grey", "expected (2,) numbers of classes"),
        ("score", f"{CLASSES} --array=bits --context=three", "classes 0 to 3, expected 0 to 2"),
        ("score", f"{SCORE} --input=in.npz --array=bits --context=three", "goes with a run"),
        ("score", f"{SCORE} --input=in.npz", "name one by --array"),
        ("score", f"{SCORE} --input=in.npz --array=x", "no array x"),
        (
            "score",
            "--workdir=MODELS/flow --output=s.npz --input=in.npz --array=grey",
            "from 0 to 9",
        ),
        (
            "score",
            "--workdir=MODELS/flow --output=s.npz --input=in.npz --array=nan",
            "row 1, entry",
        ),
        ("score", f"{SCORE} --input=in.npz --array=wide", "takes 12"),
        ("score", f"{SCORE} --input=in.npz --array=none", "n >= 1"),
        ("score", f"{SCORE} --input=in.npz --array=any", "unpickled"),
    ],
)
def test_a_wrong_input_is_refused_and_nothing_written(launch, tmp_path, binary, args, message):
    nan = np.zeros((2, SIZE))
    nan[1, 4] = np.nan
    np.savez(
        tmp_path / "in.npz",
        bits=np.ones((2, SIZE)),
        three=np.array([0, 3]),
        grey=np.full((2, SIZE), [0] * 11 + [9]),
        nan=nan,
        wide=np.zeros((2, 13)),
        none=np.zeros((0, SIZE)),
        any=np.array([{}] * 2),
    )
    assert message in launch(binary, args)
    assert os.listdir(tmp_path) == ["in.npz"]


def test_the_prior_flow_is_refused_where_there_is_none():
    led, params = make(densities.standard_normal((LATENT,)))
    with pytest.raises(ValueError, match=r"standard_normal\(\(3,\)\) has no flow; expected"):
        led.prior_inverse(params, jax.random.normal(KEY, (2, LATENT)))
