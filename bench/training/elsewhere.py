"""JAX's rows as this process sees them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


class Worker:
    """An interpreter with JAX that takes its turns when asked.

    Attributes:
        rows: facts by row name; those with "failed" are not timed.
        versions: of its packages.
    """

    def __init__(self, python: str, net: str, errors: Any = subprocess.DEVNULL) -> None:
        script = Path(__file__).with_name("jax_worker.py")
        self._process = subprocess.Popen(
            [python, str(script), net], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        found = json.loads(self._line())
        self.rows: dict[str, dict[str, Any]] = found["rows"]
        self.versions: dict[str, str] = found["versions"]

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the interpreter with JAX ended with status {self._process.wait()}")
        return line

    def seconds(self, row: str, count: int) -> float:
        """Seconds a call of so many."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{row}\t{count}\n")
        self._process.stdin.flush()
        return float(self._line())

    def end(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.close()
        self._process.wait(timeout=30)


class Elsewhere:
    """One row of a worker, to be timed beside callables of this process."""

    def __init__(self, worker: Worker, row: str) -> None:
        self._worker, self._row = worker, row

    def __call__(self) -> None:
        self.seconds(1)

    def seconds(self, count: int) -> float:
        """Seconds a call, by the worker's clock."""
        return self._worker.seconds(self._row, count)
