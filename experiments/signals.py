"""SIGTERM and SIGINT end a run, with everything on disk that it needs to continue."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils


class Stopped(Exception):
    """A signal asked several processes to stop; all that they need to continue is on disk."""


class Stop:
    """How a run ends when a signal comes.

    A run in one process does not wait until it has computed or compiled something: a thread saves
    the state of the last finished epoch and ends the process. Several processes have to end
    together, and so ask each other after every epoch (`agreed`).

    Attributes:
      files: a lock, held while the run's files are written; the process ends after its release.
      save: writes to disk what is not there yet, and returns words for how far the run has come.
      received: whether a signal has come.
    """

    def __init__(self) -> None:
        """No signal has come, and nothing is to be saved."""
        self.files = threading.Lock()
        self.save: Callable[[], str] = lambda: "stopped before training"
        self.received = False

    def agreed(self) -> bool:
        """Whether a signal has come to any of several processes, all of which must call this.

        In a single process it is always False.
        """
        if jax.process_count() == 1:
            return False
        return bool(multihost_utils.process_allgather(np.array(self.received)).any())


@contextlib.contextmanager
def stop_on_signal(advice: str) -> Iterator[Stop]:
    """Ends the process with status 0 after the first SIGTERM or SIGINT, at once after the second.

    If the state cannot be saved, the status is 1; after a second signal, 128 plus its number.

    Args:
      advice: how to continue, in words; printed after how far the run has come.
    """
    stop = Stop()
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def say(line: str) -> None:
        tqdm.tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def leave() -> None:
        with stop.files:
            try:
                line, status = f"{stop.save()}; {advice}", 0
            except Exception as error:
                line, status = f"error: {error}", 1
            with tqdm.tqdm.external_write_mode(sys.stderr):  # Hides progress bars meanwhile.
                print(line, file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(status)  # A regular exit would wait for computations.

    def watch() -> None:
        leaving = None
        while number := reader.recv(1):
            if number[0] not in previous:
                continue
            if stop.received:
                os._exit(128 + number[0])
            stop.received = True
            say("stopping as soon as the state is saved")
            if not jax.distributed.is_initialized():
                leaving = threading.Thread(target=leave, daemon=True)
                leaving.start()
        if leaving is not None:
            leaving.join()

    # A thread receives the signals, because the main one runs no Python handler while it compiles
    # or waits for a device.
    previous_fd = signal.set_wakeup_fd(writer.fileno())
    previous = {
        number: signal.signal(number, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield stop
    except Stopped as stopped:
        say(f"{stopped}; {advice}")
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        writer.close()
        watcher.join()
        reader.close()
