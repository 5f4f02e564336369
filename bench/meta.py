"""What a figure needs beside it: command, device, threads, versions, date.  No host names and no paths."""

from __future__ import annotations

import os
import platform
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("deqfast", "torch", "torchdeq", "numpy", "scipy", "scikit-learn")


def device_name() -> str:
    """Marketing name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Bystanders:
    """Cores that other processes kept busy since this object was made; None where the system does not tell.

    Two threads that share their cores with another program wait for each other at every barrier, which slows rivals
    by whole orders and each by another factor, so a report must say when a run was not alone.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._others = self._busy()

    @staticmethod
    def _busy() -> float | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
        everyone = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return everyone - (own.user + own.system + own.children_user + own.children_system)

    def cores(self) -> float | None:
        now = self._busy()
        if now is None or self._others is None:
            return None
        return max(0.0, (now - self._others) / max(time.perf_counter() - self._start, 1e-9))


def describe(command: str, bystanders: Bystanders | None = None) -> dict[str, object]:
    """The record that every results file carries; `command` is what to type to get the file again."""
    return {
        "command": command,
        "busy_elsewhere": bystanders.cores() if bystanders else None,
        "device": device_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
