"""Flags of the binaries, and their conversion to and from configurations."""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from experiments.config import OF_THE_POSTERIOR, Config
from experiments.workdir import read_config

_PROGRAM = "python -m experiments.train"


def start(argv: list[str]) -> None:
    """Quietens logs and refuses stray arguments: what every binary does first."""
    logging.set_verbosity(logging.WARNING)
    # The checkpointing library logs every file, and the errors of every thread with a traceback.
    logging.get_absl_logger().setLevel("CRITICAL")
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")


def check_devices() -> None:
    """Makes JAX look for its devices, before anything else asks for them.

    Raises:
      ValueError: if there are none of the kind that JAX_PLATFORMS names.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(
            f"JAX has no devices for JAX_PLATFORMS={asked!r}: unset it to take what there is, "
            f"or install what these need, say jax[cuda12]. {error}".rstrip()
        ) from error


def required_workdir() -> pathlib.Path:
    """The directory that --workdir names, for binaries that choose none themselves."""
    if not flags.FLAGS.workdir:
        raise app.UsageError("--workdir is required")
    return pathlib.Path(flags.FLAGS.workdir).expanduser()


@contextlib.contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Turns a ValueError or an OSError into one line and exit status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def output_path(text: str, suffixes: Sequence[str]) -> pathlib.Path:
    """The path that --output names, after checking that a file can be there.

    Raises:
      ValueError: if it has another suffix, is a directory, or would lie in a missing one.
    """
    path = pathlib.Path(text).expanduser()
    if path.suffix not in suffixes:
        raise ValueError(f"--output must name a file *{' or *'.join(suffixes)}, got {text!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--output={text} must be a file in an existing directory")
    return path


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one flag for each field of `Config`."""
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_boolean,
        type(None): flags.DEFINE_integer,
    }
    options: dict[str, Any] = {"flag_values": flag_values}
    for field in dataclasses.fields(Config):
        default: Any = field.default
        help, choices = field.metadata["help"], field.metadata["choices"]
        if choices:
            flags.DEFINE_enum(field.name, default, choices, help, **options)
        elif isinstance(default, tuple):
            flags.DEFINE_list(field.name, list(map(str, default)), help, **options)
        else:
            define[type(default)](field.name, default, help, **options)
        show_in_help(field.name, flag_values)


def show_in_help(name: str, flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Has --help list a flag, as if the binary had defined it itself."""
    flag_values.register_key_flag_for_module(sys.argv[0], flag_values[name])


def config_from_flags(workdir: pathlib.Path) -> Config:
    """The run's configuration: that on record in `workdir`, if any, changed by the given flags.

    Raises:
      ValueError: if a flag is invalid.
    """
    given = _given(flags.FLAGS)
    for name in ("data_dir", "prior_from"):
        if given.get(name):  # The run may be resumed in another working directory.
            given[name] = str(pathlib.Path(given[name]).expanduser().resolve())
    return dataclasses.replace(read_config(workdir) or config_beside(given), **given)


def config_beside(given: dict[str, Any]) -> Config:
    """The configuration of a new run, before the flags that are given are applied to it.

    It has the defaults, except that with --prior_from the fields `OF_THE_POSTERIOR` are those of
    the run that the flag names.

    Raises:
      ValueError: if --prior_from names no run's directory.
    """
    if not given.get("prior_from"):
        return Config()
    there = read_config(pathlib.Path(given["prior_from"]).expanduser())
    if there is None:
        raise ValueError(f"--prior_from={given['prior_from']} is the directory of no run")
    return Config(**{name: getattr(there, name) for name in OF_THE_POSTERIOR})


def to_command(config: Config) -> str:
    """The command line that starts this run, without --data_dir and the checkpoints' flags."""
    args = [
        f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in config.changes().items()
    ]
    return " ".join([_PROGRAM, *map(shlex.quote, args)])


def from_command(command: str) -> Config:
    """The configuration of a command line as `to_command` makes it."""
    return from_flags(shlex.split(command.removeprefix(_PROGRAM)))


def from_flags(args: Sequence[str]) -> Config:
    """The configuration of the flags of a command line.

    Raises:
      ValueError: if a flag is invalid.
    """
    flag_values = flags.FlagValues()
    define_flags(flag_values)
    try:
        flag_values(["train", *args])
    except flags.Error as error:
        raise ValueError(str(error)) from error
    return Config(**_given(flag_values))


def _given(flag_values: flags.FlagValues) -> dict[str, Any]:
    """The values of the fields of `Config` whose flags are given on the command line."""
    given = {}
    for field in dataclasses.fields(Config):
        flag = flag_values[field.name]
        if flag.present:
            value: Any = flag.value
            widths = isinstance(field.default, tuple)
            given[field.name] = _parse_widths(field.name, value) if widths else value
    return given


def _parse_widths(name: str, values: list[str]) -> tuple[int, ...]:
    if not values or not all(value.strip().isdecimal() and int(value) > 0 for value in values):
        raise ValueError(
            f"--{name} must be positive widths separated by commas, such as 512,512; "
            f"got {','.join(values)!r}"
        )
    return tuple(int(value) for value in values)
