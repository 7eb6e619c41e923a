"""Runs in child processes that are killed or asked to stop, over and over."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
from support import assert_trees_equal
from support.processes import Forked

from experiments.config import Config
from experiments.signals import Stopped, stop_on_signal
from experiments.trainer import make_task
from experiments.workdir import read_config
from led_jax import checkpoints

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]

FLAGS = "--latent_dim=3 --prior_depth=0 --nll_samples=2".split()
# LED_JAX_KILLS=20 makes the long form of the test.
KILLS = int(os.environ.get("LED_JAX_KILLS", "2"))
EPOCHS = 20 * KILLS
KILLED = [f"--epochs={EPOCHS}", "--checkpoint_epochs=1"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    directory = tmp_path_factory.mktemp("interruptions")

    def start(name, flags=()):
        args = ["-m", "experiments.train", f"--workdir={name}", *flags]
        return directory / name, Forked(*args, cwd=directory)

    return start


@pytest.fixture(scope="module")
def uninterrupted(launch):
    workdir, process = launch("uninterrupted", FLAGS + KILLED)
    assert process.wait(900) == 0
    return workdir


def trees(workdir):
    like = make_task(read_config(workdir) or Config()).state_shape()
    found = checkpoints.restore(workdir / "checkpoints", {"last": like, "best": like})
    return found.trees, found.meta["history"]


def wait_for(process, happened):
    while process.poll() is None and not happened():
        time.sleep(0.01)


def interrupt(launch, name, flags, number, wait=0.0):
    """Sends a signal while a run trains; returns its status and what it said."""
    workdir, process = launch(name, flags)
    metrics = workdir / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else None
    wait_for(process, lambda: metrics.exists() and metrics.stat().st_mtime_ns != before)
    time.sleep(wait)
    process.send_signal(number)
    return process.wait(900), process.output


def test_a_killed_run_goes_on_to_bit_identical_parameters(launch, uninterrupted):
    rng = random.Random(0)
    # The longest wait before a kill: it leaves half of the epochs to the last start.
    longest = json.loads((uninterrupted / "result.json").read_text())["seconds_train"] / KILLS / 2
    torn = 0
    for _ in range(KILLS):
        status, said = interrupt(
            launch, "killed", FLAGS + KILLED, signal.SIGKILL, rng.uniform(0, longest)
        )
        assert status == -signal.SIGKILL, said
        written = uninterrupted.with_name("killed") / "checkpoints"
        torn += any(not path.name.isdecimal() for path in written.glob("*"))
    assert torn or KILLS < 20  # Some of many kills come while a checkpoint is written.
    workdir, process = launch("killed")
    assert process.wait(900) == 0
    (found, history), (expected, all_history) = trees(workdir), trees(uninterrupted)
    assert_trees_equal(found["last"], expected["last"])
    assert_trees_equal(found["best"], expected["best"])
    assert history == all_history and history[-1]["epoch"] == EPOCHS


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_exactly(launch, uninterrupted):
    def stop(number, flags, happened):
        workdir, process = launch("stopped", flags)
        wait_for(process, lambda: happened(workdir, process.output[1]))
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(100) == 0
        assert time.monotonic() - started < 20  # Under a second where the machine has time.
        _, said = process.output
        assert "Traceback" not in said
        how_far, advice = said.splitlines()[-1].split("; ")
        assert advice == "to go on: python -m experiments.train --workdir=stopped"
        return workdir, how_far

    def trains(workdir, said):
        metrics = workdir / "metrics.jsonl"
        return metrics.exists() and metrics.read_text()

    workdir, how_far = stop(signal.SIGTERM, FLAGS + KILLED, trains)
    number = re.fullmatch(rf"stopped after epoch (\d+) of {EPOCHS}", how_far)[1]
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == int(number)
    # A batch of so many samples takes minutes.
    _, how_far = stop(signal.SIGINT, ["--nll_samples=20000000"], lambda _, said: "nll:" in said)
    assert how_far == "stopped after training, in the estimation of the NLL"
    (found, history), (expected, all_history) = trees(workdir), trees(uninterrupted)
    assert_trees_equal(found, expected)
    assert history == all_history


BUSY = """
import hashlib, sys
from experiments.signals import stop_on_signal
with stop_on_signal("to go on: again") as stop:
    if sys.argv[1:]:
        stop.files.acquire()  # As while a checkpoint is written.
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # Far from Python, as a compilation is.
"""


@pytest.fixture
def busy():
    """Starts a process in native code, which holds `stop.files` if it has an argument."""
    with contextlib.ExitStack() as stack:

        def start(*args):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", BUSY, *args],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            assert process.stdout.readline() == "busy\n"
            return process

        yield start


def test_the_first_signal_ends_a_process_whatever_it_computes(busy):
    process = busy()
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert time.monotonic() - started < 20  # A few milliseconds where the machine has time.
    assert process.stderr.read().splitlines() == [
        "stopping as soon as the state is saved",
        "stopped before training; to go on: again",
    ]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_a_process_at_once_while_it_saves(busy, second):
    process = busy("saving")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "stopping as soon as the state is saved\n"
    assert process.poll() is None
    process.send_signal(second)
    assert process.wait(60) == 128 + second


# A KeyboardInterrupt in a destructor is ignored, as in callbacks of the import system.
IMPORTED = """
import time
class Destroyed:
    def __del__(self):
        print("importing", flush=True)
        time.sleep(600)
Destroyed()
"""


def test_a_signal_ends_imports_at_once(tmp_path):
    (tmp_path / "tensorboardX.py").write_text(IMPORTED)  # Shadows the package.
    # Children inherit an ignored signal, and a process in the background may ignore this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.train", "--workdir=w"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        signal.signal(signal.SIGINT, before)
        try:
            assert process.stdout.readline() == "importing\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == -signal.SIGINT
            assert not process.stderr.read()
        finally:
            process.kill()


def test_signals_are_noted_by_several_processes_and_no_longer_than_a_run(monkeypatch, capsys):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signal("to go on: again") as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.received:  # A thread takes the note.
            time.sleep(0.01)
        raise Stopped("stopped after epoch 3 of 4")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert capsys.readouterr().err.endswith("stopped after epoch 3 of 4; to go on: again\n")
