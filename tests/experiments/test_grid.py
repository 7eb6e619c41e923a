import json
import math
import os
import signal
import time

import pytest
from absl import flags
from support.processes import Forked

from experiments import executors, grid, sweep
from experiments.config import Config
from experiments.flags import to_command
from experiments.sweep import run_name
from experiments.workdir import write_config

pytestmark = pytest.mark.usefixtures("fast_compile")

TINY = "prior_depth=0;latent_dim=2;nll_samples=2;epochs=1;batch_size=1000"


def test_a_grid_is_every_combination_of_its_flags():
    axes = grid.parse_grid("prior=nvp:depth=1,hidden=9|vamp:num_components=3; batch_size=5,6;")
    cells = grid.configs(axes, epochs=3, batch_size=7)
    assert [(c.prior, c.batch_size, c.epochs) for c in cells] == [
        ("nvp:depth=1,hidden=9", 5, 3),
        ("nvp:depth=1,hidden=9", 6, 3),
        ("vamp:num_components=3", 5, 3),
        ("vamp:num_components=3", 6, 3),
    ]
    (widths,) = grid.configs(grid.parse_grid("prior_hidden=100,50|"))
    assert widths == Config(prior_hidden=(100, 50))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prior_depth", "must be FLAG=VALUE"),
        ("depth=3", "experiments.train"),
        ("seed=1,2", "--seeds"),
        ("batch_size=5;batch_size=6", "different flags"),
        ("batch_size=", "one or more"),
        ("batch_size=5,5", "different values"),
        ("batch_size=a", "batch_size"),
        ("nll_samples=5,6", "are one run"),
        ("prior=vamp:num_components=3|nvp;prior_depth=2", "--prior_depth goes with"),
    ],
)
def test_a_wrong_grid_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        grid.configs(grid.parse_grid(text))


def test_the_table_has_the_mean_and_standard_error_over_seeds(tmp_path):
    axes = {"epochs": ["9"], "prior_depth": ["0", "4"], "prior": ["made", "nvp"]}
    nlls = [[30.0, 32.0, 34.0], [20.0], [], [1.0, 1.0]]
    rows = grid.summary(axes, [[{"nll": nll} for nll in cell] + [None] for cell in nlls])
    assert [(r["nll"], r["seeds"]) for r in rows] == [(32, 3), (20, 1), (None, 0), (1, 2)]
    assert rows[0]["nll_se"] == pytest.approx(2 / math.sqrt(3))
    assert [r["nll_se"] for r in rows[1:]] == [None, None, 0]
    lines = grid.to_markdown(axes, rows).splitlines()
    assert lines[0].endswith("All with --epochs=9.")
    assert lines[4:] == [
        "| 0 | made | 32.00 | 1.15 | 3 |",
        "| 0 | nvp | 20.00 |  | 1 |",
        "| 4 | made | not run |  | 0 |",
        "| 4 | nvp | 1.00 | 0.00 | 2 |",
    ]
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.plots.grid_lines", lambda *args: lines.append(args))
        grid.draw(tmp_path / "grid.png", axes, rows)
    assert lines[0][1:3] == ("prior_depth", ["0", "4"])
    assert lines[0][3]["prior=nvp"] == [("0", 20.0, 0.0), ("4", 1.0, 0)]
    grid.draw(tmp_path / "grid.png", axes, rows)
    assert (tmp_path / "grid.png").stat().st_size > 1000


def start(*args, cwd):
    return Forked("-m", "experiments.sweep", *args, cwd=cwd)


def finish(process):
    out, err = process.communicate(timeout=900)
    return process.returncode, out.splitlines(), err.splitlines()


def table(workdir):
    rows = json.loads((workdir / "grid.json").read_text())["rows"]
    return rows, (workdir / "grid.md").read_text()


@pytest.mark.slow
def test_shards_with_a_killed_and_diverging_cells_come_to_the_table_of_one_process(tmp_path):
    args = [f"--grid={TINY};learning_rate=0.001,0.002,1e30", "--seeds=0,1"]
    first = start(*args, "--shard=1/2", "--workdir=shards", cwd=tmp_path)
    while first.poll() is None and not list(tmp_path.glob("shards/*/result.json")):
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    assert finish(first)[0] == -signal.SIGKILL
    one = start(*args, "--workdir=one", cwd=tmp_path)
    again, out, _ = finish(start(*args, "--dry_run", "--shard=1/2", "--workdir=x", cwd=tmp_path))
    assert again == 0 and len(out) == 3 and not (tmp_path / "x").exists()
    for shard in ("1/2", "2/2"):
        code, _, err = finish(start(*args, f"--shard={shard}", "--workdir=shards", cwd=tmp_path))
        assert code == 1 and err[-1].startswith("error: 1 of 3 runs failed: ")
        assert err[-1].count("learning_rate=1e%2B30") == 1
    code, _, err = finish(one)
    assert code == 1 and err[-1].startswith("error: 2 of 6 runs failed: ")
    assert table(tmp_path / "shards") == table(tmp_path / "one")
    rows, _ = table(tmp_path / "one")
    assert [row["seeds"] for row in rows] == [2, 2, 0]


def runs():
    axes = grid.parse_grid(f"{TINY};learning_rate=0.001,1e30")
    return {run_name(config): config for config in grid.configs(axes)}


def test_a_grids_commands_name_the_data_and_take_another_runs_flags(tmp_path, capsys):
    there = Config(network="resconv", latent_dim=3)
    write_config(there, tmp_path)
    cells = grid.configs(grid.parse_grid(f"prior_from={tmp_path};prior=nvp|vamp"), data_dir="D")
    assert [(c.network, c.latent_dim, c.prior) for c in cells] == [
        ("resconv", 3, "nvp"),
        ("resconv", 3, "vamp"),
    ]
    sweep._print_commands(dict(zip("ab", cells, strict=True)), tmp_path, None)
    for line, config in zip(capsys.readouterr().out.splitlines(), cells, strict=True):
        assert line.startswith(to_command(config)) and " --data_dir=D --workdir=" in line


@pytest.mark.slow
def test_jobs_on_this_machine_give_what_this_process_gives(tmp_path):
    pytest.importorskip("submitit")
    good, bad = runs()
    execute = executors.submitted("local", parallel=2)
    results, failed = execute(runs(), tmp_path / "jobs")
    assert failed == [bad] and list(results) == [good]
    expected, _ = executors.here({good: runs()[good]}, tmp_path / "here")
    assert results[good]["nll"] == expected[good]["nll"]
    (tmp_path / "jobs" / good / "checkpoints").rename(tmp_path / "away")  # The run is not repeated.
    assert execute({good: runs()[good]}, tmp_path / "jobs") == (results, [])


def test_the_jobs_of_slurm_are_one_array_that_is_queued_again(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    (tmp_path / "bin").mkdir()
    for name, script in (
        ("srun", "exit 0"),
        ("sbatch", f"cp $1 {tmp_path}/script.sh; echo Submitted batch job 12"),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="slurm")
    executor.update_parameters(timeout_min=600, slurm_array_parallelism=2)
    calls = [(config, tmp_path / name) for name, config in runs().items()]
    jobs = executors.submit_array(executor, calls)
    assert [job.job_id for job in jobs] == ["12_0", "12_1"]
    script = (tmp_path / "script.sh").read_text()
    for line in ("--array=0-1%2", "--time=600", "--signal=USR2@90", "--open-mode=append"):
        assert f"#SBATCH {line}" in script
    again = executors.RunJob().checkpoint(*calls[0])
    assert again.function.__class__ is executors.RunJob and again.args == calls[0]


def test_commands_of_a_grid_make_its_runs():
    from experiments.flags import from_command

    for config in runs().values():
        assert from_command(to_command(config)) == config


def test_two_shards_come_to_one_table_and_name_what_failed(tmp_path, monkeypatch, capsys):
    results = {}

    def run(config, workdir, stop):
        if config.learning_rate > 1:
            raise FloatingPointError("diverged")
        nll = config.seed + 10 * config.prior_depth
        results[workdir] = config.report() | {"nll": nll}
        return results[workdir]

    monkeypatch.setattr(executors, "run", run)
    monkeypatch.setattr(executors, "read_result", lambda config, workdir: results.get(workdir))
    for shard in ("1/2", "2/2"):
        flags.FLAGS.unparse_flags()
        args = ["--grid=prior_depth=0,1;learning_rate=0.1,9", "--seeds=1,3", f"--shard={shard}"]
        flags.FLAGS(["sweep", f"--workdir={tmp_path}", *args])
        with pytest.raises(SystemExit):
            sweep.main(["sweep"])
        assert "error: 2 of 4 runs failed: prior_depth=0,learning_rate=9" in capsys.readouterr().err
    rows = [(row["nll"], row["nll_se"], row["seeds"]) for row in table(tmp_path)[0]]
    assert rows == [(2, 1, 2), (None, None, 0), (12, 1, 2), (None, None, 0)]
