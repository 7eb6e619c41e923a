"""A run that is killed or asked to stop, over and over: in processes of their own."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from support import assert_trees_equal

from experiments.config import Config
from experiments.trainer import make_task, stop_on_signal
from experiments.workdir import read_config
from led_jax import checkpoints

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.slow]

FLAGS = "--latent_dim=3 --prior_depth=1 --prior_hidden=4 --nll_samples=2".split()
# The long form: LED_JAX_KILLS=20.
KILLS = int(os.environ.get("LED_JAX_KILLS", "2"))
EPOCHS = 20 * KILLS
KILLED = [f"--epochs={EPOCHS}", "--checkpoint_epochs=1"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    directory = tmp_path_factory.mktemp("interruptions")

    def start(name, flags=()):
        command = [sys.executable, "-m", "experiments.train", f"--workdir={name}", *flags]
        with (directory / "stderr").open("w") as stderr:
            return directory / name, subprocess.Popen(
                command, cwd=directory, stdout=stderr, stderr=stderr
            )

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


def interrupt(launch, name, flags, number, wait=0.0):
    """Sends a signal while a run trains; returns its status and what it said."""
    workdir, process = launch(name, flags)
    metrics = workdir / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else None
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_mtime_ns == before):
        time.sleep(0.01)
    time.sleep(wait)
    process.send_signal(number)
    status = process.wait(900)
    return status, (workdir.parent / "stderr").read_text()


def test_a_killed_run_goes_on_to_bit_identical_parameters(launch, uninterrupted):
    rng = random.Random(0)
    # As long a wait as leaves half of the epochs to the last start.
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


def test_a_signal_saves_and_says_how_to_go_on(launch):
    name, epochs = "stopped", 0
    # More epochs than pass before the signal comes, and no checkpoint but the signal's.
    first = ["--epochs=1000000", "--checkpoint_minutes=1000", *FLAGS]
    for number, flags in ((signal.SIGTERM, first), (signal.SIGINT, [])):
        status, said = interrupt(launch, name, flags, number)
        assert status == 0 and "Traceback" not in said
        assert f"| {epochs}/1000000 [" in said  # Where its progress bar began.
        last = said.splitlines()[-1]
        assert last.startswith("stopped after epoch ")
        assert last.endswith(f"; to go on: python -m experiments.train --workdir={name}")
        before, epochs = epochs, int(last.split()[3])
        assert epochs > before


BUSY = """
import hashlib
from experiments.trainer import stop_on_signal
with stop_on_signal():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # Far from Python, as a compilation is.
"""


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)]
)
def test_the_second_signal_ends_a_process_at_once_whatever_it_does(numbers):
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as busy:
        try:
            assert busy.stdout.readline() == "busy\n"
            busy.send_signal(numbers[0])
            assert busy.stderr.readline() == "stopping as soon as the state is saved\n"
            assert busy.poll() is None
            busy.send_signal(numbers[1])
            assert busy.wait(30) == 128 + numbers[1]
        finally:
            busy.kill()


def test_signals_are_noted_while_a_run_goes_on_and_no_longer():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signal() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        while not stopped():  # A thread takes the note.
            time.sleep(0.01)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
