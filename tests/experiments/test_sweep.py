import dataclasses
import json

import numpy as np
import pytest

from experiments import sweep as sweep_module
from experiments.config import Config
from experiments.sweep import TABLES, Cell, sweep, to_markdown

pytestmark = pytest.mark.usefixtures("fast_compile")

TINY = Config(epochs=1, latent_dim=3, prior_depth=0, prior_hidden=(4,), nll_samples=3)


def cell(depth, nll):
    return Cell(depth, nll, dataclasses.replace(TINY, prior_depth=depth))


SMALL = {"a": [cell(0, 30.0), cell(1, 29.0)], "b": [cell(0, 30.0)]}


def test_the_table_is_the_papers():
    paper = {name: [cell.paper_nll for cell in cells] for name, cells in TABLES[1].items()}
    assert paper["mlp_prior"] == [90.78, 88.07, 87.47, 86.59]
    assert paper["mlp_posterior"] == [90.78, 88.89, 88.71, 88.70]
    assert paper["resconv_prior"] == [83.11, 81.87, 81.70, 81.44]
    for cells in TABLES[1].values():
        assert [cell.depth for cell in cells] == [0, 4, 8, 12]
    rows = [
        (cell.paper_nll, c.network, c.latent_dim, c.prior_depth, c.posterior, c.posterior_depth)
        for cells in TABLES[2].values()
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

    def record(config, workdir):
        assert directories.setdefault(workdir, config) == config
        return {}

    monkeypatch.setattr(sweep_module, "run", record)
    for table in TABLES.values():
        sweep(table, [0, 1], tmp_path)
    configs = {
        cell.config for table in TABLES.values() for cells in table.values() for cell in cells
    }
    assert len(directories) == 2 * len(configs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    return workdir, sweep(SMALL, [0, 1], workdir)


def test_cells_are_trained_once_and_skipped_when_done(finished, monkeypatch):
    workdir, results = finished
    assert [(r["prior_depth"], r["seed"]) for r in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert results[0]["columns"] == ["a", "b"] and results[2]["columns"] == ["a"]
    assert [r["paper_nll"] for r in results] == [30.0, 30.0, 29.0, 29.0]

    def fail(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr("experiments.run.fit", fail)
    assert sweep(SMALL, [0, 1], workdir) == results


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


def test_another_setting_in_the_same_directory_is_refused(finished):
    workdir, _ = finished
    with pytest.raises(ValueError, match="--epochs is 1 there and 2 here"):
        sweep(SMALL, [0], workdir, epochs=2)


def test_main_writes_the_table_column_by_column(finished, monkeypatch, capsys):
    from absl import flags

    workdir, results = finished
    monkeypatch.setattr(sweep_module, "TABLES", {1: SMALL})
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
    assert (workdir / "table1.png").stat().st_size > 1000
