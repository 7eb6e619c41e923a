"""The binaries in several processes, each with a working directory of its own."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import free_port

from experiments.config import Config
from experiments.flags import to_command
from experiments.run import run

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]

TINY = Config(epochs=2, latent_dim=3, prior_depth=1, prior_hidden=(4,), nll_samples=5)
FLAGS = to_command(TINY).split()[3:]


def launch_two(directory, module, *flags):
    """Runs a binary in two processes, each with flags and a working directory of its own."""
    port = free_port()

    def launch(i):
        (directory / str(i)).mkdir(exist_ok=True)
        command = [sys.executable, "-m", f"experiments.{module}", *flags[i]]
        command += [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"]
        return subprocess.run(command, cwd=directory / str(i), capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(launch, range(2)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run by two processes that read their rows from the host, and the result of the first."""
    directory = tmp_path_factory.mktemp("distributed")
    flags = [*FLAGS, "--data_placement=host", "--workdir=run"]
    first, second = launch_two(directory, "train", flags, flags)
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert "{" not in second.stdout
    return directory, json.loads(first.stdout.splitlines()[-1])


def test_two_processes_with_data_on_the_host_are_as_one_with_data_on_the_device(finished, tmp_path):
    directory, result = finished
    alone = run(TINY, tmp_path / "run")
    assert (result["processes"], result["devices"]) == (2, 2)
    for name in ("valid_elbo", "test_elbo", "nll"):
        assert result[name] == pytest.approx(alone[name], rel=1e-5)
    assert json.loads((directory / "0" / "run" / "result.json").read_text()) == result
    assert not list((directory / "1").iterdir())


def test_two_processes_go_on_from_what_the_first_one_saved(finished):
    directory, result = finished
    (directory / "0" / "run" / "result.json").unlink()
    flags = [*FLAGS, "--data_placement=host", "--workdir=run"]
    first, second = launch_two(directory, "train", flags, flags)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    again = json.loads(first.stdout.splitlines()[-1])
    assert again["seconds_train"] == result["seconds_train"]  # Nothing was trained again.
    assert again["nll"] == result["nll"]


def test_two_processes_evaluate_as_they_trained(finished):
    directory, result = finished
    flags = [f"--workdir={directory / '0' / 'run'}", "--nll_samples=5"]
    first, second = launch_two(directory, "evaluate", flags, flags)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert json.loads(first.stdout.splitlines()[-1])["nll"] == result["nll"]
    assert "{" not in second.stdout


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_process_that_fails_ends_the_other(tmp_path, wrong):
    flags = [[*FLAGS, "--workdir=run"], [*FLAGS, "--workdir=run"]]
    if wrong == 0:  # Its directory is taken.
        (tmp_path / "0").mkdir()
        (tmp_path / "0" / "run").write_text("")
        message = "--workdir=run is not a directory"
    else:
        flags[1].append("--seed=1")
        message = "process 1 has other flags than the first one, namely python -m experiments"
    started = time.monotonic()
    processes = launch_two(tmp_path, "train", *flags)
    assert time.monotonic() - started < 120
    assert all(process.returncode != 0 for process in processes)
    assert f"error: {message}" in processes[wrong].stderr
    assert not list((tmp_path / "1").iterdir())


def test_a_dead_coordinator_is_one_clear_line(tmp_path):
    code = """
import sys
from absl import app
from experiments import distributed, train
from experiments.flags import define_flags
distributed._CONNECT_SECONDS = 2
define_flags()
app.run(train.main)
"""
    command = [
        sys.executable,
        "-c",
        code,
        f"--coordinator=localhost:{free_port()}",
        "--process_id=1",
        "--num_processes=2",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no connection to --coordinator=localhost:" in errors[0]
    assert not list(tmp_path.iterdir())
