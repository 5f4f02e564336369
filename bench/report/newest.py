"""The newest results in bench/results/, a full run before a quick one."""

from __future__ import annotations

import json
from pathlib import Path

from bench.report.markdown import Results


def newest(folder: Path, kind: str) -> Results | None:
    """The newest full run of a kind ("speed", "convergence", "torch" and so on), else the newest quick one."""
    found: list[tuple[bool, str, Results]] = []
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        if record.get("kind", "speed" if "benchmarks" in record else None) == kind:
            meta = record["machine_info"] if kind == "speed" else record["meta"]
            quick = bool(meta.get("quick", record.get("quick", False)))
            found.append((not quick, meta["date"], record))
    return max(found, key=lambda run: run[:2])[2] if found else None
