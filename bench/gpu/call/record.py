"""What a call leaves: results.jsonl, summary.md, gpu.json and one archive of the three, written as results come."""

from __future__ import annotations

import json
import tarfile
import threading
import time
from pathlib import Path
from typing import Any


class Record:
    """Results in ``out``; ``start`` is the monotonic second at which the process began."""

    def __init__(self, out: Path, start: float) -> None:
        self.out, self.start = out, start
        self.rows: list[dict[str, Any]] = []
        self.parts: list[tuple[str, str, float]] = []
        self.gpu: dict[str, Any] = {"kind": "gpu", "dry": False, "quick": False, "without": {}}
        self.state = "running"
        self._lock = threading.RLock()
        out.mkdir(parents=True, exist_ok=True)
        self._lines = (out / "results.jsonl").open("a")
        self.save("running")

    def add(self, part: str, name: str, ended: str, **more: Any) -> None:
        """One result: a line of results.jsonl that is on disk when this returns."""
        row = {"part": part, "name": name, "ended": ended, "at": round(time.monotonic() - self.start, 2), **more}
        with self._lock:
            self.rows.append(row)
            self._lines.write(json.dumps(row, default=str) + "\n")
            self._lines.flush()
            for key, value in more.get("gpu", {}).items():
                if isinstance(value, list) and isinstance(self.gpu.get(key), list):
                    self.gpu[key] += value  # rows of one section, item by item
                else:
                    self.gpu[key] = value
        print(f"{row['at']:7.1f}  {part:14s}{ended:12s}{name}  {str(more.get('why', ''))[:160]}", flush=True)

    def part(self, name: str, ended: str, seconds: float) -> None:
        """How a part ended; everything is written again."""
        with self._lock:
            self.parts.append((name, ended, seconds))
            self.save("running")

    def save(self, state: str) -> None:
        """Write everything; once the call has ended or was stopped, its last word stays."""
        with self._lock:
            if self.state != "running":
                return
            self.state = state
            self.gpu["seconds"] = time.monotonic() - self.start
            wrong = [row for row in self.rows if row["ended"] not in ("ok", "skipped")]
            self.gpu["without"] = {f"{row['part']}, {row['name']}": str(row.get("why", ""))[:400] for row in wrong}
            self._write("summary.md", self._summary(state))
            self._write("gpu.json", json.dumps(self.gpu, indent=1, default=str) + "\n")
            part = self.out / "call.tar.gz.part"
            with tarfile.open(part, "w:gz") as archive:
                for name in ("summary.md", "results.jsonl", "gpu.json"):
                    archive.add(self.out / name, name)
            part.replace(self.out / "call.tar.gz")

    def _write(self, name: str, text: str) -> None:
        part = self.out / f"{name}.part"
        part.write_text(text)
        part.replace(self.out / name)

    def _summary(self, state: str) -> str:
        lines = [f"{state}, {time.monotonic() - self.start:.0f} s after the start", ""]
        lines += ["| part | ended | seconds | ok | not ok |", "|---|---|---|---|---|"]
        for name, ended, seconds in self.parts:
            own = [row["ended"] for row in self.rows if row["part"] == name]
            good = own.count("ok")
            bad = sum(ended not in ("ok", "skipped") for ended in own)
            lines.append(f"| {name} | {ended} | {seconds:.0f} | {good} | {bad} |")
        wrong = [row for row in self.rows if row["ended"] not in ("ok", "skipped")]
        lines += ["", f"Not ok: {len(wrong)}", ""]
        for row in wrong[:200]:
            why = " ".join(str(row.get("why", "")).split())[:300]
            lines.append(f"- {row['part']}, {row['name']}: {row['ended']}: {why}")
        values = [row for row in self.rows if row["ended"] == "ok" and "value" in row]
        lines += ["", "Values", ""]
        lines += [f"- {row['part']}, {row['name']}: {json.dumps(row['value'], default=str)[:400]}" for row in values]
        return "\n".join(lines) + "\n"
