"""The newest results in bench/results/, a full run before a quick one."""

from __future__ import annotations

import json
from pathlib import Path

from bench.report.markdown import Results


def newest(folder: Path) -> tuple[Results | None, Results | None, Results | None]:
    """(speed, convergence, breakdown) records: the newest full run of each kind, else the newest quick one."""
    found: dict[str, list[tuple[bool, str, Results]]] = {"speed": [], "convergence": [], "breakdown": []}
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        kind = record.get("kind", "speed" if "benchmarks" in record else None)
        if kind in found:
            meta = record["machine_info"] if kind == "speed" else record["meta"]
            quick = bool(meta.get("quick", record.get("quick", False)))
            found[kind].append((not quick, meta["date"], record))
    last = [max(runs, key=lambda run: run[:2])[2] if runs else None for runs in found.values()]
    return last[0], last[1], last[2]
