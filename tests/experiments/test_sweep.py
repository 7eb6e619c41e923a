import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from absl import flags

from experiments import executors
from experiments import sweep as sweep_module
from experiments.config import Config
from experiments.flags import to_command
from experiments.sweep import TABLES, Cell, run_name, sweep, to_markdown
from experiments.workdir import hold

pytestmark = pytest.mark.usefixtures("fast_compile")

TINY = Config(epochs=1, latent_dim=3, prior_depth=0, prior_hidden=(4,), nll_samples=3)


def cell(depth, nll):
    return Cell(depth, nll, dataclasses.replace(TINY, prior_depth=depth))


SMALL = {"a": [cell(0, 30.0), cell(1, 29.0)], "b": [cell(0, 30.0)]}


def test_the_table_is_the_papers():
    paper = {name: [cell.paper_nll for cell in cells] for name, cells in TABLES["1"].items()}
    assert paper["mlp_prior"] == [90.78, 88.07, 87.47, 86.59]
    assert paper["mlp_posterior"] == [90.78, 88.89, 88.71, 88.70]
    assert paper["resconv_prior"] == [83.11, 81.87, 81.70, 81.44]
    for cells in TABLES["1"].values():
        assert [cell.depth for cell in cells] == [0, 4, 8, 12]
    rows = [
        (cell.paper_nll, c.network, c.latent_size, c.prior_depth, c.posterior, c.posterior_depth)
        for cells in TABLES["2"].values()
        for cell in cells
        for c in [cell.config]
    ]
    assert rows == [
        (81.81, "resconv", 32, 4, "nvp", 4),
        (81.55, "resconv", 32, 8, "nvp", 8),
        (80.81, "resconv", 32, 8, "made", 8),
        (80.60, "resconv", 32, 16, "made", 16),
    ]


def test_every_cell_has_a_directory_of_its_own(tmp_path, monkeypatch):
    directories = {}

    def record(config, workdir, stop):
        assert directories.setdefault(workdir, config) == config
        return {}

    monkeypatch.setattr(executors, "run", record)
    for table in TABLES.values():
        sweep(table, [0, 1], tmp_path)
    configs = {
        cell.config for table in TABLES.values() for cells in table.values() for cell in cells
    }
    assert len(directories) == 2 * len(configs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    results, failed = sweep(SMALL, [0, 1], workdir)
    assert not failed
    return workdir, results


@pytest.mark.slow
def test_cells_are_trained_once_and_skipped_when_done(finished, monkeypatch):
    workdir, results = finished
    assert [(r["prior_depth"], r["seed"]) for r in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert results[0]["columns"] == ["a", "b"] and results[2]["columns"] == ["a"]
    assert [r["paper_nll"] for r in results] == [30.0, 30.0, 29.0, 29.0]

    def fail(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr("experiments.run.fit", fail)
    assert sweep(SMALL, [0, 1], workdir) == (results, [])


@pytest.mark.slow
def test_one_cell_that_fails_leaves_the_others_to_go_on(finished, tmp_path, monkeypatch, capsys):
    workdir, results = finished
    shutil.copytree(workdir, tmp_path / "w")
    broken = tmp_path / "w" / run_name(SMALL["a"][0].config)
    (broken / "config.json").write_text("{}")
    monkeypatch.setattr(sweep_module, "TABLES", {"1": SMALL})
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["sweep", f"--workdir={tmp_path / 'w'}", "--seeds=0,1"])
    with pytest.raises(SystemExit) as exit:
        sweep_module.main(["sweep"])
    output = capsys.readouterr()
    assert exit.value.code == 1
    assert f"error: {broken}/config.json is not a run's configuration" in output.err
    assert output.err.splitlines()[-1] == f"error: 1 of 4 runs failed: {broken.name}"
    written = json.loads((tmp_path / "w" / "table1.json").read_text())
    assert written == json.loads(output.out)["results"] == results[1:]


@pytest.mark.parametrize(
    "error",
    [FloatingPointError("diverged"), OSError("disk"), jax.errors.JaxRuntimeError("memory\nmore")],
)
def test_whatever_a_cell_fails_from_is_one_line(tmp_path, monkeypatch, capsys, error):
    def run(config, workdir, stop):
        if config.prior_depth:
            return {}
        raise error

    monkeypatch.setattr(executors, "run", run)
    results, failed = sweep(SMALL, [0], tmp_path)
    assert [result["columns"] for result in results] == [["a"]]
    assert failed == [run_name(SMALL["a"][0].config)]
    said = capsys.readouterr().err.splitlines()
    assert said[1] == f"error: {str(error).splitlines()[0]}" and len(said) == 3


@pytest.mark.slow
def test_markdown_shows_ours_beside_the_papers(finished):
    _, results = finished
    lines = to_markdown(SMALL, results).splitlines()
    rows = [[part.strip() for part in line.split("|")] for line in lines if line.startswith("| ")]
    assert [row[1:4] for row in rows[1:]] == [
        ["a", "0", "30.00"],
        ["a", "1", "29.00"],
        ["b", "0", "30.00"],
    ]
    mean = np.mean([r["nll"] for r in results if r["prior_depth"] == 0])
    assert float(rows[1][4]) == pytest.approx(mean, abs=0.006)
    assert any("python -m experiments.train" in line for line in lines)


OTHERS = [
    {"prior_transformer": "rational_quadratic"},
    {"posterior_context": 7},
    {"prior_hidden": (1, 2)},
    {"prior_hidden": (12,)},
    {"learning_rate": 1e-3},
    {"epochs": 2},
    {"dataset": "a/b"},
    {"dataset": "a,seed=1"},
    {"dataset": "a" * 300},
    {"dataset": "a" * 301},
]


def test_two_runs_share_a_directory_only_if_they_are_one():
    names = [run_name(dataclasses.replace(TINY, **fields)) for fields in ({}, *OTHERS)]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 150 and re.fullmatch(r"[\w=,.%+-]+", name) for name in names)
    assert names[3] == "latent_dim=3,prior_depth=0,prior_hidden=1x2,epochs=1"
    assert run_name(Config(nll_samples=9, data_dir="d", epochs=200)) == "default"


@pytest.mark.slow
def test_a_cells_results_are_those_of_its_own_configuration(finished):
    _, results = finished
    of_cell = [r for r in results if r["prior_depth"] == 1]
    other = of_cell[0] | {"command": of_cell[0]["command"] + " --prior_transformer=gated"}
    longer = of_cell[1] | {
        "epochs": 9,
        "command": of_cell[1]["command"].replace("--epochs=1", "--epochs=9"),
    }
    assert sweep_module._merge(results, [other, longer]) == [*results, other, longer]
    again = of_cell[0] | {"nll": 1.0, "columns": ["c"]}
    merged = sweep_module._merge(results, [again])
    assert len(merged) == len(results) and again | {"columns": ["a", "c"]} in merged
    found = sweep_module._runs_of(SMALL["a"][1], "a", [*results, other])
    assert found == of_cell
    assert sweep_module._runs_of(SMALL["a"][1], "a", [*results, longer]) == [longer]


def test_the_committed_tables_hold_every_cell():
    for number in ("1", "2"):
        path = pathlib.Path(__file__).parents[2] / "results" / f"table{number}.json"
        results = json.loads(path.read_text())
        for column, cells in TABLES[number].items():
            assert all(sweep_module._runs_of(cell, column, results) for cell in cells)


@pytest.mark.slow
def test_main_writes_the_table_column_by_column(finished, monkeypatch, capsys):
    workdir, results = finished
    monkeypatch.setattr(sweep_module, "TABLES", {"1": SMALL})
    write = sweep_module._write

    def write_alone(number, results, workdir):
        with pytest.raises(ValueError, match="is written to by process"), hold(workdir):
            pass
        return write(number, results, workdir)

    monkeypatch.setattr(sweep_module, "_write", write_alone)
    tables = []
    for column in ("b", "a"):
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["sweep", f"--workdir={workdir}", f"--columns={column}"])
        sweep_module.main(["sweep"])
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert printed["results"] == json.loads((workdir / "table1.json").read_text())
        tables.append([(r["prior_depth"], r["columns"], r["nll"]) for r in printed["results"]])
    nlls = {r["prior_depth"]: r["nll"] for r in results if r["seed"] == 0}
    assert tables[0] == [(0, ["b"], nlls[0])]
    assert tables[1] == [(0, ["b", "a"], nlls[0]), (1, ["a"], nlls[1])]
    assert (workdir / "table1.md").read_text().count("not run") == 0
    for name in ("table1", "table1_nats"):
        assert (workdir / f"{name}.png").stat().st_size > 1000


def test_the_error_of_one_image_is_unknown():
    runs = [{"nll": 1.0, "nll_se": None}, {"nll": 2.0, "nll_se": 0.5}]
    nll, error = sweep_module._mean_and_error(runs)
    assert nll == 1.5 and np.isnan(error)


def test_alternatives_have_a_table_without_depths_and_the_papers_numbers(tmp_path, monkeypatch):
    """Checks, for made-up results, the rows and the drawn nats, whose sum is the bound."""
    table = {
        name: [Cell(None, None, TABLES["priors"][name][0].config)] for name in ("normal", "vamp")
    }
    monkeypatch.setattr(sweep_module, "TABLES", {"priors": table})
    result = {
        "columns": ["normal"],
        "command": to_command(table["normal"][0].config),
        "nll": 90.0,
        "nll_se": 0.3,
        "test_elbo": -95.0,
        "test_kl": 25.0,
        "mutual_information": 9.0,
        "active_units": 25,
        "epochs": 200,
        "nll_samples": 5000,
        "hardware": "h",
        "versions": {},
        "date": "d",
    }
    drawn = {}
    monkeypatch.setattr(sweep_module.plots, "nats", lambda path, bars: drawn.update({path: bars}))
    other = {"command": result["command"] + " --seed=1", "nll": 91.0, "active_units": 26}
    other = result | other | {"mutual_information": None}
    sweep_module._write("priors", [result, other], tmp_path)
    text = (tmp_path / "priors.md").read_text()
    assert (
        "| normal | 90.50 | 0.30 | 0.50 | 95.00 | 70.00 | - | - | 25.5 | 2 | 200 | 5000 |" in text
    )
    assert "| vamp | not run |" in text
    one = sweep_module.to_markdown(table, [result])
    assert "| normal | 90.00 | 0.30 | - | 95.00 | 70.00 | 9.00 | 16.00 | 25 | 1 | 200 " in one
    ((path, bars),) = drawn.items()
    assert path == tmp_path / "priors.png" and not list(tmp_path.glob("*.png"))
    (_, whole), (_, split) = bars["normal"][1], bars["normal"][0]
    assert split == {"reconstruction": 70.0, "I(x; z)": 9.0, "KL(q(z) || p(z))": 16.0}
    assert whole == {"reconstruction": 70.0, "KL(q(z|x) || p(z))": 25.0}
