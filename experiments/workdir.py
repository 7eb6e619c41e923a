"""A run's directory: its configuration on record, and files that are written whole."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.config import FREE, Config

_MAX_JSON_BYTES = 2**20


def write_config(config: Config, workdir: pathlib.Path) -> None:
    """Makes a run's directory and puts its configuration on record."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", config.record())


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Makes sure that a directory is free for, or holds, a run of this configuration.

    Raises:
      ValueError: if it holds anything else.
    """
    recorded = read_config(workdir)
    if recorded is None:
        return
    there = recorded.record()
    differing = [
        f"--{name} is {there[name]} there and {value} here"
        for name, value in config.record().items()
        if name not in FREE and value != there[name]
    ]
    if differing:
        raise ValueError(
            f"{workdir} holds a run of another configuration: {'; '.join(differing)}. Leave these "
            "flags away to continue that run, or name another --workdir"
        )


def read_config(workdir: pathlib.Path) -> Config | None:
    """The configuration on record in a run's directory, or None if there is none.

    Raises:
      ValueError: if the record cannot be read, or the directory holds something else.
    """
    path = workdir / "config.json"
    if not path.exists():
        if workdir.exists() and not workdir.is_dir():
            raise ValueError(f"--workdir={workdir} is not a directory")
        if workdir.is_dir() and any(entry.suffix != ".tmp" for entry in workdir.iterdir()):
            raise ValueError(
                f"{workdir} has files in it but no config.json: it is not a run's directory. Name "
                "an empty or a new --workdir"
            )
        return None
    record: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value  # JSON has no tuples.
        for name, value in (read_json(path) or {}).items()
    }
    try:
        return Config(**record)
    except TypeError as error:
        raise ValueError(f"{path} is not a run's configuration: {error}") from error


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


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to; the file takes its place at `path` once it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
