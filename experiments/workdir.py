"""A run's directory: one writer, its configuration on record, and files that are written whole."""

import contextlib
import datetime
import fcntl
import json
import math
import os
import pathlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

from experiments.config import Config

_MAX_JSON_BYTES = 2**20

_LOCK = "lock"


@contextlib.contextmanager
def hold(workdir: pathlib.Path, wait: bool = False) -> Iterator[Callable[[], None]]:
    """Makes a run's directory if it is missing, and keeps other processes from writing to it.

    It locks the directory's file "lock" by flock(2). The lock ends with the process, whatever ends
    that. Network file systems do not guarantee it: on some it works within one host, others ignore
    it.

    Args:
      workdir: the directory.
      wait: whether to wait for another process that holds it.

    Yields:
      A function that raises FileNotFoundError if the directory was removed, renamed or replaced.

    Raises:
      ValueError: if another process holds it, saying which.
      OSError: if the directory cannot be made or locked.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / _LOCK
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read() or "another process"
            raise ValueError(
                f"{workdir} is written to by {holder}. Wait for its end, or name another --workdir"
            ) from error
        except OSError as error:
            raise OSError(
                f"{path} cannot be locked ({error.strerror}), so that nothing would keep a second "
                "run from writing there: name a --workdir on a file system with flock(2)"
            ) from error
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        with naming(path):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
            lock.flush()

        def check() -> None:
            with contextlib.suppress(OSError):
                if os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                    return
            raise FileNotFoundError(
                f"{workdir} was removed, renamed or replaced while the run went on: it stops here. "
                "Where its last checkpoint still is, it can go on from that"
            )

        try:
            yield check
        except Exception:
            check()  # If the directory is gone, that is the cause.
            raise
        finally:
            lock.truncate(0)


def check_path(workdir: pathlib.Path) -> None:
    """Checks that a path is a directory, or that a directory can be made there.

    Raises:
      ValueError: if it leads through a file or a broken link, or is not UTF-8, which the
        checkpointing library cannot write.
    """
    try:
        os.path.realpath(workdir).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--workdir={str(workdir)!a} must be UTF-8; name another one") from error
    there = next((path for path in (workdir, *workdir.parents) if os.path.lexists(path)), workdir)
    if os.path.lexists(there) and not there.is_dir():
        through = "" if there == workdir else f": {there}"
        raise ValueError(
            f"--workdir={workdir}{through} is not a directory but a file or a broken link; name "
            "another one"
        )


def write_config(config: Config, workdir: pathlib.Path) -> None:
    """Puts the configuration of a run on record in its directory."""
    # As given: its default depends on a field that may change when the run is resumed.
    given = {"matching_samples": config.matching_samples}
    write_json(workdir / "config.json", config.record() | given)


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Checks that a directory is free for a run of this configuration, or holds it.

    Raises:
      ValueError: if it holds anything else.
    """
    recorded = read_config(workdir)
    if recorded is None:
        return
    differing = config.differing(recorded.fixed())
    if differing:
        finished = (workdir / "result.json").exists()
        advice = "see that run's result" if finished else "continue that run"
        raise ValueError(
            f"{workdir} holds a {'finished ' * finished}run of another configuration: {differing}. "
            f"Leave these flags away to {advice}, or name another --workdir"
        )


def read_config(workdir: pathlib.Path) -> Config | None:
    """The configuration on record in a run's directory, or None if there is none.

    Raises:
      ValueError: if the record cannot be read, or the directory holds something else.
    """
    check_path(workdir)
    path = workdir / "config.json"
    if not path.exists():
        if workdir.is_dir() and any(
            entry.suffix != ".tmp" and entry.name != _LOCK for entry in workdir.iterdir()
        ):
            raise ValueError(
                f"{workdir} has files in it but no config.json: it is not a run's directory. Name "
                "an empty or a new --workdir"
            )
        return None
    record: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value  # JSON has no tuples.
        for name, value in (read_json(path) or {}).items()
    }
    fields = Config().record().keys()
    for what, names in (("lacks", fields - record.keys()), ("also has", record.keys() - fields)):
        if names:
            raise ValueError(
                f"{path} is not a run's configuration: it {what} {', '.join(sorted(names))}. Put "
                "the file back as the run wrote it, or name another --workdir"
            )
    return Config(**record)


def read_json(path: pathlib.Path, kind: type = dict) -> Any:
    """The dict or other `kind` of value in a JSON file, or None if there is no such file.

    Raises:
      ValueError: if the file holds anything else.
    """
    if not path.exists():
        return None
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ValueError(f"{path} cannot be read: {size} bytes, expected at most {_MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, kind):
        found = type(value).__name__
        raise ValueError(f"{path} cannot be read: expected a {kind.__name__}, got {found}")
    return value


def defined(value: float) -> float | None:
    """The number, or None for NaN, which JSON lacks: the standard error of one row or sample."""
    return None if math.isnan(value) else value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Adds a path to errors of writing to it that name no file, such as those of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path to write to; once the file is whole, it takes its place at `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
