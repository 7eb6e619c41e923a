"""Where a number comes from: command, commit, versions and hardware."""

import datetime
import os
import pathlib
import platform
import subprocess
from typing import Any

import flax
import jax
import numpy as np
import optax

import led_jax

FIELDS = ("command", "commit", "versions", "hardware", "date")
"""The keys of the result of `origin`."""


def origin(command: str) -> dict[str, Any]:
    """The origin that every result records: its command, commit, versions, hardware and date."""
    return {
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def commit() -> str | None:
    """The project's commit, with "+dirty" where tracked files differ from it; None without git."""
    here = pathlib.Path(__file__)

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # Fails in a repository without this file.
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + "+dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    modules = (led_jax, jax, flax, optax, np)
    return {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules}


def hardware() -> str:
    """The device that computes, in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} core{'s' if cores != 1 else ''}, {model}"
