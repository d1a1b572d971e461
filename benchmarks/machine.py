"""What a benchmark ran on: without it, seconds say nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import jax


def machine() -> dict[str, Any]:
    """The processor, the cores this process may use, JAX's device and version."""
    return {
        "processor": _processor(),
        "cores": _cores(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def in_pieces() -> dict[str, Any]:
    """Options for ``jax.jit`` under which XLA's CPU backend takes what a step needs for itself in pieces of 33 MB.

    By default it is one piece. One of more than 32 MiB, 33.6 MB, glibc maps anew at every step, whose pages the system
    has to clear one by one, a fifth of a step of K-FAC on the autoencoders; smaller ones it keeps.
    """
    return {"xla_multiheap_size_constraint_per_heap": 33_000_000} if jax.default_backend() == "cpu" else {}


def load() -> float:
    """How many processes wanted to run, the mean over the last minute; more than the cores means that they waited."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan")


def on_machine() -> str:
    """The machine and its load now, in words."""
    now = machine()
    return f"{now['processor']}, {now['cores']} cores, load {load():g}, {now['device']}, jax {now['jax']}"


def _processor():
    """Its name, which ``platform`` does not know on Linux."""
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
