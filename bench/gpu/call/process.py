"""Runs a part: a command that tells of its items line by line, and is started again after one that took it down."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu.call.record import Record

MARK = "@item "
DEATH = 1  # PR_SET_PDEATHSIG
STICKY = 75  # exit status of a process whose CUDA context is lost


@dataclass
class Part:
    """A command with its time limit; ``patience``: seconds an item may take. A command without items is one itself.

    ``items``: it takes ``--done FILE``, the names of items that it leaves out. ``needs``: the part that must have gone
    well before it.
    """

    name: str
    command: list[str]
    limit: float
    patience: float = 60.0
    items: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None


class Children:
    """The processes of a call, each in a group of its own; they end with this one."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def start(self, part: Part, command: list[str], root: Path) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
        environment.update(part.environment)
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bound.py")), *command],
            cwd=root,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._running.add(process)
        return process

    def kill(self, process: subprocess.Popen[str]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._running.discard(process)

    def stop(self) -> None:
        self.stopped = True
        for process in list(self._running):
            self.kill(process)


def die_with_parent() -> None:
    """Asks Linux to end this process with its parent; children call it first."""
    ctypes.CDLL(None).prctl(DEATH, signal.SIGKILL)


def run(part: Part, record: Record, children: Children, root: Path, end: float) -> str:
    """How the part ended; each of its items is in ``record``, the one that a process died or hung in too."""
    begin = time.monotonic()
    end = min(end, begin + part.limit)
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / "done"
        done.touch()
        ended = "the time was up before it began"
        while time.monotonic() < end and not children.stopped:
            before = done.stat().st_size
            ended = _once(part, record, children, root, end, done)
            if ended != "again":
                break
            if done.stat().st_size == before:
                ended = "no item ended, and it is not tried again"
                break
        else:
            ended = "out of time"
    if ended == "ok" and any(row["part"] == part.name and row["ended"] not in ("ok", "skipped") for row in record.rows):
        ended = "items failed"
    record.part(part.name, ended, time.monotonic() - begin)
    return ended


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _once(part: Part, record: Record, children: Children, root: Path, end: float, done: Path) -> str:  # noqa: PLR0911, PLR0912, PLR0915
    command = [*part.command, "--done", str(done)] if part.items else part.command
    try:
        process = children.start(part, command, root)
    except OSError as error:
        record.add(part.name, "start", "failed", why=str(error))
        return "did not start"
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    tail: deque[str] = deque(maxlen=40)
    opened: str | None = None
    heard, bad, why = time.monotonic(), False, ""

    def close(name: str, ended: str, **more: object) -> None:
        record.add(part.name, name, ended, **more)
        with done.open("a") as file:
            file.write(name + "\n")

    while True:
        now = time.monotonic()
        if now >= end:
            why = "out of time"
        elif part.items and opened is not None and now - heard > part.patience:
            why = "hung"
        if why:
            children.kill(process)
            break
        try:
            line = lines.get(timeout=0.1)
        except queue.Empty:
            continue
        if line is None:
            break
        if not line.startswith(MARK):
            tail.append(line.rstrip())
            continue
        told = json.loads(line.removeprefix(MARK))
        heard = time.monotonic()
        if "begin" in told:
            opened = told["begin"]
        else:
            bad |= told["ended"] not in ("ok", "skipped")
            close(told.pop("name"), told.pop("ended"), **told)
            opened = None
    status = process.wait()
    children.kill(process)
    last = "\n".join(tail)
    if opened is not None:
        how = why or f"died ({status})"
        close(opened, how, why=f"after {time.monotonic() - heard:.1f} s; {last[-1500:]}")
        return why if why == "out of time" else "again"
    if not part.items:
        ended = why or ("ok" if status == 0 else f"exit status {status}")
        record.add(part.name, part.name, ended, why="" if ended == "ok" else last[-3000:])
        return ended
    if why:
        return why
    if status == STICKY:
        return "again"
    if status not in (0, 1):
        record.add(part.name, "process", f"exit status {status}", why=last[-3000:])
        return f"exit status {status}"
    return "items failed" if bad or status else "ok"
