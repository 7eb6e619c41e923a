"""Child processes that need no imports.

A server process imports `experiments.run` once; each child is a fork of it. The server starts with
the first child, and all children have the environment of that moment.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["experiments.run"])
_environment: dict[str, str] = {}  # Settings of JAX when the server started.

# Text rather than a function: to unpickle a function the child would import `support`, whose key
# makes JAX look for its devices.
_RUN = """
import atexit, os, runpy, sys
os.chdir(cwd)
for number, file in enumerate(files, 1):
    os.dup2(os.open(file, os.O_WRONLY), number)
option, code, *rest = args
sys.argv = [option, *rest]
try:
    if option == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        exec(code, {"__name__": "__main__"})
finally:
    atexit._run_exitfuncs()  # The fork itself ends without them.
"""


class Forked:
    """What Python's options `-m MODULE ...` or `-c CODE ...` run, with methods of a `Popen`."""

    def __init__(self, *args, cwd=None):
        settings = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))}
        _environment.update({} if _environment else settings)
        assert settings == _environment, "these children have the environment of the first: `fresh`"
        self.args = [*map(str, args)]
        self._files = [tempfile.NamedTemporaryFile() for _ in range(2)]
        names = {
            "args": self.args,
            "cwd": os.path.abspath(cwd or "."),
            "files": [file.name for file in self._files],
        }
        self._process = _SERVER.Process(target=exec, args=(_RUN, names), daemon=True)
        self._process.start()

    @property
    def output(self):
        """The standard output and error so far."""
        return [Path(file.name).read_text() for file in self._files]

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def wait(self, timeout):
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout):
        self.wait(timeout)
        return self.output


def fresh(*args, cwd=None):
    """The same in a new interpreter."""
    return subprocess.Popen(
        [sys.executable, *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """What `subprocess.run` returns."""
    output = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, *output)
