"""The binaries in several processes, each with a working directory of its own."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from support import free_port
from support.processes import Forked, finish, fresh

from experiments import distributed
from experiments.config import Config
from experiments.flags import to_command
from experiments.run import run

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]

TINY = Config(epochs=2, latent_dim=3, prior_depth=1, prior_hidden=(4,), nll_samples=5)
FLAGS = to_command(TINY).split()[3:]


def launch_two(directory, module, *flags, start=Forked):
    """Runs a binary in two processes, each with flags and a working directory of its own."""
    port = free_port()

    def launch(i):
        (directory / str(i)).mkdir(exist_ok=True)
        args = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"]
        module_and_flags = ["-m", f"experiments.{module}", *flags[i]]
        return finish(start(*module_and_flags, *args, cwd=directory / str(i)))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(launch, range(2)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run by two processes that read their rows from the host, and the result of the first."""
    directory = tmp_path_factory.mktemp("distributed")
    flags = [*FLAGS, "--data_placement=host", "--workdir=run"]
    first, second = launch_two(directory, "train", flags, flags, start=fresh)
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert "{" not in second.stdout
    result = json.loads(first.stdout.splitlines()[-1])
    assert result.pop("workdir") == "run"
    return directory, result


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


@pytest.mark.parametrize("wrong", [0, 1, "data"])
def test_a_process_that_fails_ends_the_other(tmp_path, wrong):
    flags = [[*FLAGS, "--workdir=run"], [*FLAGS, "--workdir=run"]]
    if wrong == "data":
        for i, rows in enumerate((np.eye(200, 4), np.ones((200, 4)))):
            (tmp_path / f"data{i}").mkdir()
            np.savez(tmp_path / f"data{i}" / "own.npz", train=rows)
            flags[i] += ["--dataset=own.npz", f"--data_dir={tmp_path / f'data{i}'}"]
        wrong, message = 1, "process 1 has other data than the first one: --dataset=own.npz has"
    elif wrong == 0:  # A file has its directory's name.
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


@pytest.mark.parametrize(
    ("index", "listens", "message"),
    [
        (1, False, "no connection to --coordinator=localhost:PORT within 1 s: "),
        (1, True, "no connection to --coordinator=localhost:PORT within 1 s: "),
        (
            0,
            False,
            "--process_id=1,2 of .*=3 did not come to --coordinator, port PORT of",
        ),
        (0, True, "--coordinator: port PORT cannot be had on this machine, .* already in use"),
    ],
)
def test_processes_that_cannot_meet_say_so(monkeypatch, index, listens, message):
    monkeypatch.setattr(distributed, "_CONNECT_SECONDS", 1)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        other.listen() if listens else other.close()
        with pytest.raises(ValueError, match=message.replace("PORT", str(port))):
            distributed._arrive("localhost", port, index) if index else distributed._gather(port, 3)


@pytest.mark.parametrize(
    "error,said",
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory, 9 bytes.\nat"),
            "RESOURCE_EXHAUSTED: Out of memory, 9 bytes. Lower the",
        ),
        (MemoryError("Unable to allocate 9 bytes"), "memory is exhausted: Unable to allocate 9 b"),
    ],
)
def test_memory_exhausted_says_what_to_lower(monkeypatch, capsys, error, said):
    monkeypatch.setattr(distributed, "_join", lambda: None)
    with pytest.raises(SystemExit), distributed.processes():
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}") and "--batch_size" in line


def test_processes_meet_whoever_comes_first():
    port = free_port()
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(distributed._arrive, "localhost", port, i) for i in (1, 2)]
        time.sleep(0.2)
        first = pool.submit(distributed._gather, port, 3)
        # Each returns, and none raises that another is missing.
        assert [process.result(30) for process in (first, *others)] == [None] * 3
