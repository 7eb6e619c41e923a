"""Runs in several processes, on one or more machines, which JAX's distributed runtime joins."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
from absl import flags

from experiments.flags import check_devices, show_in_help

_CONNECT_SECONDS = 60

_OTHERS = " (look for the other processes' errors, too)"

_OF_MEMORY = (
    "Lower the networks' widths or depths or, in training, --batch_size. The NLL takes a few "
    "samples of a few rows at a time, whatever --nll_samples and --batch_size are"
)

ERRORS = (ValueError, OSError, FloatingPointError, MemoryError)
"""Errors that a run's input, files, numbers or size cause: shown in a line, with no traceback."""

_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of the first process, the same for all; 'auto' takes this address, the number of "
    "processes and each one's number from the cluster's environment; empty: one process.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", 1, 2**31 - 1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", 0)
for _flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID):
    show_in_help(_flag.name)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that the flags describe; to be entered before JAX computes anything.

    `ERRORS`, exhausted memory and, with several processes, all errors of JAX's runtime end this
    process with one line and status 1.
    """
    try:
        _join()
        check_devices()
        yield
    except ERRORS as error:
        # A collective operation's errors are ValueErrors in some versions of JAX.
        _fail(message_of(error) + _OTHERS * ("Gloo" in str(error)))
    except jax.errors.JaxRuntimeError as error:
        if jax.distributed.is_initialized():
            _fail(message_of(error) + _OTHERS)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(message_of(error))


def message_of(error: Exception) -> str:
    """An error's message, or its first line if it is JAX's; with advice if memory is exhausted."""
    if isinstance(error, MemoryError):  # From NumPy, for masks or data.
        return f"memory is exhausted: {error}. {_OF_MEMORY}"
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return str(error)
    message = str(error).partition("\n")[0]
    return f"{message} {_OF_MEMORY}" if "RESOURCE_EXHAUSTED" in message else message


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
            _arrive(host, int(port), index)
        else:
            _gather(int(port), number)
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            number,
            index,
            initialization_timeout=_CONNECT_SECONDS,
        )
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX had caught it for its own use.
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the processes cannot be joined through --coordinator={coordinator}: {reason}"
        ) from error


# JAX's runtime aborts the process if its port is in use or another process is missing. Therefore
# all meet at the port before it starts: the first one by `_gather`, the others by `_arrive`.


def _gather(port: int, number: int) -> None:
    """Waits, in the first process, until all others are there; tells them to go on."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        server = socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise ValueError(
            f"--coordinator: port {port} cannot be had on this machine, where --process_id=0 runs: "
            f"{error.strerror}. Name another one to all processes"
        ) from error
    deadline = time.monotonic() + _CONNECT_SECONDS
    with server, contextlib.ExitStack() as stack:
        there: dict[int, socket.socket] = {}
        while missing := sorted(set(range(1, number)) - there.keys()):
            server.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError as error:
                raise ValueError(
                    f"--process_id={','.join(map(str, missing))} of --num_processes={number} did "
                    f"not come to --coordinator, port {port} of this machine, within "
                    f"{_CONNECT_SECONDS} s"
                ) from error
            connection.settimeout(1)
            with contextlib.suppress(OSError):
                there[int.from_bytes(connection.recv(4), "big")] = connection
        for connection in there.values():
            with contextlib.suppress(OSError):
                connection.sendall(b"!")


def _arrive(host: str, port: int, index: int) -> None:
    """Waits, in another process, until the first one says that all are there."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            with socket.create_connection((host.strip("[]"), port), timeout=1) as connection:
                connection.settimeout(_CONNECT_SECONDS)
                connection.sendall(index.to_bytes(4, "big"))
                if connection.recv(1) == b"!":
                    return
                raise ConnectionError("the process there did not wait for this one")
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"no connection to --coordinator={host}:{port} within {_CONNECT_SECONDS} s: "
                    f"{error}. Start the process with --process_id=0 there"
                ) from error
        time.sleep(0.1)
