"""Several processes, on one machine or on several, through JAX's own runtime."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
from absl import flags

from experiments.flags import show_in_help

_CONNECT_SECONDS = 60

ERRORS = (ValueError, OSError, FloatingPointError)
"""What a run's input, its files or its numbers can cause: a line says it, without a traceback."""

_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of the first process, the same for all; 'auto' takes it, and the two flags below, "
    "from the cluster's environment; empty: one process.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", 1, 2**31 - 1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This one's number, from 0.", 0)
for _flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID):
    show_in_help(_flag.name)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that the flags describe; errors end this one with a line and status 1.

    To be entered before JAX computes anything.
    """
    try:
        _join()
        yield
    except ERRORS as error:
        _fail(message_of(error))
    except jax.errors.JaxRuntimeError as error:
        if jax.distributed.is_initialized():
            _fail(f"{message_of(error)} (look for the other processes' errors, too)")
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(message_of(error))


def message_of(error: Exception) -> str:
    """What an error says; of JAX's long ones, the first line."""
    return (
        str(error).partition("\n")[0]
        if isinstance(error, jax.errors.JaxRuntimeError)
        else str(error)
    )


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(1)  # A regular exit would wait for processes that wait for this one.
    raise SystemExit(1)


def _join() -> None:
    coordinator, number, index = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    if not coordinator:
        if number is not None or index is not None:
            raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT")
        return
    if coordinator != "auto":
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"--coordinator must be HOST:PORT or auto, got {coordinator!r}")
        if number is None or index is None:
            raise ValueError(f"--coordinator={coordinator} needs --num_processes and --process_id")
        if index >= number:
            raise ValueError(
                f"--process_id must be less than --num_processes={number}, got {index}"
            )
        if index:
            _wait_for(host, int(port))
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            number,
            index,
            initialization_timeout=_CONNECT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the processes cannot be joined through --coordinator={coordinator}: {reason}"
        ) from error


def _wait_for(host: str, port: int) -> None:
    """Waits until the coordinator answers: JAX's runtime aborts the process where it does not."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"no connection to --coordinator={host}:{port} within {_CONNECT_SECONDS} s: "
                    f"{error}. Start the process with --process_id=0 there"
                ) from error
        time.sleep(0.1)
