"""Where a number comes from: command, versions and hardware."""

import datetime
import os
import pathlib
import platform
from typing import Any

import flax
import jax
import numpy as np
import optax

import led_jax


def origin(command: str) -> dict[str, Any]:
    """What every result says of itself: its command, versions, hardware and date."""
    return {
        "command": command,
        "versions": versions(),
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


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
