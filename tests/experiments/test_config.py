import dataclasses
import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from experiments.config import Config
from experiments.flags import config_from_flags, define_flags, from_command, to_command
from experiments.models import build_led, make_objective
from experiments.workdir import check_workdir, read_config, write_config, write_json
from led_jax import data, densities, flows


def test_defaults_are_those_of_the_final_configuration():
    config = Config()
    assert (config.num_epochs, config.latent_size) == (200, 50)
    config = dataclasses.replace(config, dataset="binarized_mnist", network="resconv")
    assert (config.num_epochs, config.latent_size) == (400, 32)
    config = dataclasses.replace(config, latent_shape=(7, 7, 2))
    assert config.latent_size == 98
    assert (config.record()["epochs"], config.record()["latent_dim"]) == (400, 98)
    assert (Config(epochs=3).num_epochs, Config(latent_dim=4).latent_size) == (3, 4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prior_depth", -1, "--prior_depth must be 0 or more, got -1"),
        ("posterior_depth", -2, "--posterior_depth must be 0 or more, got -2"),
        ("latent_dim", 0, "--latent_dim must be positive, got 0"),
        ("epochs", -5, "--epochs must be positive, got -5"),
        ("batch_size", 0, "--batch_size must be positive, got 0"),
        ("learning_rate", 0.0, "--learning_rate must be positive, got 0.0"),
        ("learning_rate", float("nan"), "--learning_rate must be positive, got nan"),
        ("nll_samples", 0, "--nll_samples must be positive, got 0"),
        ("seed", -1, "--seed must be 0 or more, got -1"),
        ("clip_norm", -1.0, "--clip_norm must be 0 or more"),
        ("network", "transformer", "--network must be one of mlp, resconv, got 'transformer'"),
        ("prior", "maf", "--prior=maf is none of nvp, made, pixelcnn, nor a constructor .* 'maf'"),
        ("prior", "nvp:width=3", "--prior=nvp:width=3 .* real_nvp has no argument width; it has"),
        ("posterior", "affine", "--posterior=affine .* 'affine' is no constructor"),
        ("posterior", "pixelcnn", "--posterior=pixelcnn needs --latent_shape=H,W,C"),
        ("prior_mask", "channel", "--prior_mask=channel needs --latent_shape=H,W,C"),
        ("latent_shape", (7, 7), r"--latent_shape must be H,W,C, got \(7, 7\)"),
        ("latent_shape", (7, 7, 2), "--latent_shape needs --network=resconv, got 'mlp'"),
        ("prior_transformer", "cubic", "--prior_transformer must be one of additive, affine, .*"),
        ("posterior_transformer", "cubic", "--posterior_transformer must be one of default, "),
        ("binarize", "sometimes", "--binarize must be one of static, dynamic"),
        ("weight_norm", True, "--weight_norm needs --network=resconv, got 'mlp'"),
        ("warmup", 1.0, "--warmup must be in"),
        ("kl_warmup", -0.1, "--kl_warmup must be in"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        Config(**{field: value})


@pytest.mark.slow
def test_every_combination_of_flows_builds_at_depth_zero_and_one():
    digits = data.load("digits")
    x = jnp.asarray(digits.train[:2], jnp.float32)
    for network, posterior in (("mlp", "made"), ("mlp", "nvp"), ("resconv", "made")):
        for depth in (0, 1):
            config = Config(
                network=network,
                posterior=posterior,
                posterior_depth=depth,
                prior_depth=depth,
                posterior_hidden=(8,),
                prior_hidden=(8,),
                posterior_context=3 * depth,
                latent_dim=4,
            )
            led = build_led(config, digits)
            params = jax.eval_shape(led.init, jax.random.key(0), x)
            terms = jax.eval_shape(led.elbo, params, jax.random.key(1), x)
            assert {term.shape for term in terms} == {(2,)}


SPATIAL = {"network": "resconv", "latent_shape": (4, 4, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "prior,prior_mask,posterior,posterior_mask",
    [
        ("nvp", "checkerboard", "pixelcnn", "random"),
        ("nvp", "channel", "nvp", "checkerboard"),
        ("nvp", "random", "made", "random"),
        ("pixelcnn", "random", "nvp", "random"),
        ("made", "random", "nvp", "channel"),
    ],
)
def test_latent_maps_with_every_flow(prior, prior_mask, posterior, posterior_mask):
    digits = data.load("digits")
    x = jnp.asarray(digits.train[:2], jnp.float32)
    for depth in (0, 1):
        config = Config(
            **SPATIAL,
            prior=prior,
            prior_mask=prior_mask,
            prior_depth=depth,
            prior_hidden=(4,),
            posterior=posterior,
            posterior_mask=posterior_mask,
            posterior_depth=depth,
            posterior_hidden=(4,),
            posterior_context=depth,
        )
        led = build_led(config, digits)
        params = jax.eval_shape(led.init, jax.random.key(0), x)
        z = jax.eval_shape(led.encode, params, jax.random.key(1), x)
        terms = jax.eval_shape(led.elbo, params, jax.random.key(1), x)
        assert z.shape == (2, 4, 4, 2) and {term.shape for term in terms} == {(2,)}
        assert jax.eval_shape(led.sample, params, jax.random.key(1)).shape == (64,)


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["made", "pixelcnn"])
def test_an_autoregressive_prior_scores_without_a_loop(prior):
    digits = data.load("digits")
    config = Config(**SPATIAL, prior=prior, prior_depth=1, prior_hidden=(4,))
    led = build_led(config, digits)
    z = jnp.zeros((2, *config.latent_shape))
    params = jax.eval_shape(led.prior.init, jax.random.key(0), z)
    assert "scan" not in str(jax.make_jaxpr(led.prior.log_prob)(params, z))
    # A fresh prior is N(0, I).
    params = jax.jit(led.prior.init)(jax.random.key(0), z)
    expected = -0.5 * config.latent_size * jnp.log(2 * jnp.pi)
    assert jnp.allclose(jax.jit(led.prior.log_prob)(params, z), expected)


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ({"prior": "nvp:depth=2,hidden=8"}, {"prior_depth": 2, "prior_hidden": (8,)}),
        (
            {"prior": "real_nvp:depth=1,transformer=deep_sigmoid"},
            {"prior_depth": 1, "prior_transformer": "deep_sigmoid"},
        ),
        (
            {"posterior": "made:depth=1,hidden=8x8", "posterior_context": 3},
            {"posterior_depth": 1, "posterior_hidden": (8, 8), "posterior_context": 3},
        ),
        (
            {**SPATIAL, "prior": "nvp:depth=2,mask=channel", "posterior": "pixelcnn:depth=1"},
            {
                **SPATIAL,
                "prior_depth": 2,
                "prior_mask": "channel",
                "posterior": "pixelcnn",
                "posterior_depth": 1,
            },
        ),
    ],
)
def test_one_flag_names_what_several_do(long, short):
    digits, config = data.load("digits"), Config(**long)
    assert build_led(config, digits) == build_led(Config(**short), digits)
    assert from_command(to_command(config)) == config


def test_a_prior_may_be_any_density():
    digits = data.load("digits")
    led = build_led(Config(prior="mixture_of_normals:num_components=5"), digits)
    assert repr(led.prior) == "mixture_of_normals((50,), num_components=5)"
    for name in ("vamp", "data_subset"):
        led = build_led(Config(prior=f"{name}:num_components=20"), digits)
        assert repr(led.prior) == f"{name}(20)"
    base, flow = "mixture_of_normals(event_shape=50,num_components=5)", "lu(event_shape=50)"
    led = build_led(Config(prior=f"transformed:base={base},flow={flow}"), digits)
    expected = densities.mixture_of_normals((50,), 5), flows.lu((50,))
    assert led.prior == densities.transformed(*expected)
    text = f"nvp:depth=2,mixing={flow}"
    led = build_led(Config(posterior=text, prior=text), digits)
    assert led.posterior == flows.real_nvp((50,), 2, mixing=flows.lu((50,)), seed=1000)
    with pytest.raises(ValueError, match="--posterior=standard_normal is no flow"):
        build_led(Config(posterior="standard_normal"), digits)
    with pytest.raises(ValueError, match="--prior_depth goes with nvp, made, pixelcnn alone"):
        Config(prior="nvp:depth=2", prior_depth=3)


def test_residual_flows_of_the_posterior_read_its_context_and_of_the_prior_score_in_one_pass():
    digits = data.load("digits")
    sylvester = ("triangular_sylvester", "householder_sylvester", "orthogonal_sylvester")
    for name in ("planar", *sylvester):
        text = f"{name}:depth=2"
        led = build_led(Config(posterior=text, posterior_context=9, prior=text), digits)
        flow = getattr(flows, name)((50,), 2, context_dim=9)
        assert led.posterior == flow
        assert led.prior == densities.transformed(
            densities.standard_normal((50,)), flows.invert(getattr(flows, name)((50,), 2))
        )


def test_the_latent_shape_sets_the_latent_dim():
    config = Config(**SPATIAL, posterior="pixelcnn")
    assert config.latent_size == 32
    assert to_command(config) == (
        "python -m experiments.train --network=resconv --latent_shape=4,4,2 --posterior=pixelcnn"
    )
    with pytest.raises(ValueError, match="--latent_dim is 5 and --latent_shape.* has 32 entries"):
        Config(**SPATIAL, latent_dim=5)


@pytest.mark.slow
@pytest.mark.parametrize("transformer", ["rational_quadratic", "deep_sigmoid"])
@pytest.mark.parametrize("posterior", ["made", "nvp"])
def test_each_transformer_flag_reaches_its_own_flow(posterior, transformer):
    digits = data.load("digits")
    x = jnp.asarray(digits.train[:2], jnp.float32)

    def sizes(**given):
        shape = {"latent_dim": 2, "prior_hidden": (8,), "posterior_hidden": (8,)}
        config = Config(posterior=posterior, prior_depth=1, posterior_depth=1, **shape, **given)
        led = build_led(config, digits)
        params = jax.eval_shape(led.init, jax.random.key(0), x)
        bound = jax.eval_shape(lambda params: led.elbo(params, jax.random.key(1), x).bound, params)
        assert bound.shape == (2,)
        return {
            part: sum(leaf.size for leaf in jax.tree.leaves(params[part]))
            for part in ("prior", "posterior")
        }

    more = getattr(flows, transformer).num_params - flows.affine.num_params
    entries = {"prior": 1, "posterior": 2 if posterior == "made" else 1}
    for part, other in (("prior", "posterior"), ("posterior", "prior")):
        before, after = sizes(), sizes(**{f"{part}_transformer": transformer})
        # Eight hidden units and a bias emit each of the parameters of each entry.
        assert after[part] - before[part] == 9 * more * entries[part]
        assert after[other] == before[other]


def test_the_record_is_read_back(tmp_path):
    config = Config(prior_hidden=(7, 3), seed=5)
    write_config(config, tmp_path)
    found = read_config(tmp_path)
    assert found == dataclasses.replace(config, epochs=200, latent_dim=50, decoder="bernoulli")
    assert dataclasses.replace(found, nll_samples=7).num_matching_samples == 7
    assert found.record() == config.record()
    check_workdir(config, tmp_path)
    check_workdir(dataclasses.replace(config, nll_samples=7, data_dir="elsewhere"), tmp_path)


def test_another_configurations_workdir_is_refused_by_name(tmp_path):
    write_config(Config(), tmp_path)
    other = Config(seed=1, prior_depth=2)
    with pytest.raises(ValueError, match="--prior_depth is 4 there and 2 here; --seed is 0 there"):
        check_workdir(other, tmp_path)


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not a run's directory"):
        check_workdir(Config(), tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        check_workdir(Config(), tmp_path / "thesis.tex")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"epochs": "many"}', '{"colour": 3}'])
def test_a_broken_record_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"config\.json (is not a run's configuration|cannot be read)|--epochs"
    ):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("seed"), "it lacks seed"),
        (lambda record: record.update(colour=3), "it also has colour"),
    ],
)
def test_a_record_names_all_fields_and_nothing_else(tmp_path, change, message):
    record = Config().record()
    change(record)
    write_json(tmp_path / "config.json", record)
    with pytest.raises(ValueError, match=rf"config\.json is not a run's .*: {message}\."):
        read_config(tmp_path)


def test_the_command_says_what_differs_from_the_defaults_and_is_read_back():
    config = Config(dataset="binarized_mnist", data_dir="secret", prior_hidden=(5, 6), seed=3)
    command = to_command(config)
    assert command == (
        "python -m experiments.train --dataset=binarized_mnist --prior_hidden=5,6 --seed=3"
    )
    assert to_command(dataclasses.replace(config, epochs=400, latent_dim=50)) == command
    assert from_command(command) == dataclasses.replace(config, data_dir="")
    config = Config(network="resconv", weight_norm=True, latent_shape=(7, 7, 2), clip_norm=1e-05)
    assert from_command(to_command(config)) == config
    assert to_command(Config()) == "python -m experiments.train"
    assert from_command(to_command(Config())) == Config()


def test_what_makes_two_runs_one():
    config = Config(learning_rate=1e-3, nll_samples=7, devices=1, data_dir="secret")
    assert config.changes() == {"learning_rate": 1e-3, "nll_samples": 7, "devices": 1}
    assert config.identity() == {"learning_rate": 1e-3}
    for samples, changes in ((7, {}), (0, {"matching_samples": 0})):
        again = dataclasses.replace(config, matching_samples=samples)
        assert again.changes() == config.changes() | changes
    assert Config(epochs=200, latent_dim=50).identity() == {}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_help_lists_every_flag():
    values = flags.FlagValues()
    define_flags(values)
    text = values.module_help(sys.argv[0])
    assert all(f"{field.name}:" in text for field in dataclasses.fields(Config))


def test_a_prior_from_a_run_has_its_flags_on_data_and_model(tmp_path):
    there = Config(
        network="resconv", condition="labels", posterior_context=3, prior_depth=2, epochs=7, seed=4
    )
    (tmp_path / "a").mkdir()
    write_config(there, tmp_path / "a")
    flag_values = flags.FlagValues()
    define_flags(flag_values)
    flag_values(["train", f"--prior_from={tmp_path / 'a'}", "--prior=vamp:num_components=9"])
    with mock.patch.object(flags, "FLAGS", flag_values):
        config = config_from_flags(tmp_path / "b")
    expected = Config(
        network="resconv",
        condition="labels",
        posterior_context=3,
        prior_from=str(tmp_path / "a"),
        prior="vamp:num_components=9",
    )
    assert config.record() == expected.record()
    assert repr(make_objective(config, 10)) == "prior_only()"
    assert from_command(to_command(config)).record() == config.record()
    flag_values(["train", f"--prior_from={tmp_path / 'none'}"])
    with mock.patch.object(flags, "FLAGS", flag_values):
        with pytest.raises(ValueError, match="is the directory of no run"):
            config_from_flags(tmp_path / "b")
    with pytest.raises(ValueError, match="--prior_from has an objective of its own"):
        Config(prior_from="a", objective="stl")
    with pytest.raises(ValueError, match="--optimizer=adamw decays what --prior_from holds fixed"):
        Config(prior_from="a", optimizer="adamw")
