"""A directory has one writer. `test_config` tests the configuration that is saved there."""

import errno
import fcntl
import math
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments.workdir import check_path, defined, hold, read_config, read_json, write_json

HOLDER = """
import pathlib, sys, time
from experiments.workdir import hold
with hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_directory_has_one_writer_until_its_process_dies(tmp_path):
    workdir = tmp_path / "w"
    command = [sys.executable, "-c", HOLDER, str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            first = rf"process {holder.pid} on {re.escape(socket.gethostname())} since 20\d\d-"
            with pytest.raises(ValueError, match=f"w is written to by {first}"), hold(workdir):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    with hold(workdir):
        pass


def test_who_waits_for_a_directory_gets_it_in_the_end(tmp_path):
    def write():
        with hold(tmp_path, wait=True):
            return (tmp_path / "table").read_text()

    with ThreadPoolExecutor(1) as pool:
        with hold(tmp_path):
            waiting = pool.submit(write)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            (tmp_path / "table").write_text("whole")
        assert waiting.result(60) == "whole"


def test_a_file_system_without_locks_is_one_clear_line(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    message = r"w/lock cannot be locked \(No locks available\).* name a --workdir on a file system"
    with pytest.raises(OSError, match=message), hold(tmp_path / "w"):
        pass


def test_one_process_does_not_hold_a_directory_twice(tmp_path):
    with hold(tmp_path):
        for _ in range(2):  # A refused attempt keeps the lock.
            with pytest.raises(ValueError, match=f"process {os.getpid()} on"), hold(tmp_path):
                pass
    with hold(tmp_path):
        pass
    assert read_config(tmp_path) is None  # A directory with a lock alone is accepted.


@pytest.mark.parametrize("replaced", [False, True])
def test_who_holds_a_directory_notices_that_it_is_gone(tmp_path, replaced):
    workdir = tmp_path / "w"
    with hold(workdir) as check:
        check()
        workdir.rename(tmp_path / "v")
        if replaced:
            with hold(workdir):
                pass
        with pytest.raises(FileNotFoundError, match="w was removed, renamed or replaced while"):
            check()


def test_an_error_in_a_directory_that_is_gone_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="w was removed"), hold(tmp_path / "w"):
        (tmp_path / "w").rename(tmp_path / "v")
        raise RuntimeError("a checkpoint was not written")
    with pytest.raises(RuntimeError, match="^out of memory$"), hold(tmp_path / "w"):
        raise RuntimeError("out of memory")


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in [
        ("file", "--workdir=.*/file is not a directory but a file"),
        ("file/x/y", "--workdir=.*/file/x/y: .*/file is not a directory but a file"),
        ("loop", "--workdir=.*/loop is not a directory but .* a broken link"),
        ("\udcff", r"--workdir='.*\\udcff' must be UTF-8"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_path(tmp_path / name)
    check_path(tmp_path)
    check_path(tmp_path / "new" / "er")


def test_a_number_that_is_not_there_is_null(tmp_path):
    record = {"nll_se": defined(math.nan), "nll": defined(1.5)}
    write_json(tmp_path / "a.json", record)
    assert read_json(tmp_path / "a.json") == {"nll_se": None, "nll": 1.5}
