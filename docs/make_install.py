"""Fills the measured table of docs/install.md from the newest bench/results/*-install.json: ``make install-report``."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- install:begin -->", "<!-- install:end -->"
# What was asked for: MB of a wheel; minutes of the CPU's wheel and of an install on two cores; s of an import.
WHEEL_MB, WHEEL_MINUTES, INSTALL_MINUTES, IMPORT_S = 20, 3, 6, 0.1
CROWDED = 0.15  # cores in other programs' hands above which a time on the clock says nothing of a target


def verdict(measured: float, limit: float) -> str:
    """Whether the target was met."""
    return "met" if measured < limit else "**missed**"


def timed(row: Mapping[str, Any], limit: int) -> str:
    """Whether a time met its target; not told where others kept the cores busy, but for what the processor did."""
    if (row["busy_elsewhere"] or 0) > CROWDED:
        shared = f"{row['processor_s'] / 120:.1f} if shared by two cores"
        return f"under {limit} min: not told, the machine was not free; {shared}"
    return f"under {limit} min: {verdict(row['seconds'] / 60, limit)}"


def minutes(row: Mapping[str, Any]) -> str:
    """On the clock, of the processor, and what others kept busy."""
    busy = row["busy_elsewhere"]
    others = "" if busy is None else f", others kept {busy:.1f} cores busy"
    return f"{row['seconds'] / 60:.1f} min ({row['processor_s'] / 60:.1f} of the processor{others})"


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """What, how much, and what was asked for."""
    made = [["source archive", f"{found['sdist_bytes'] / 1e6:.2f} MB", ""]]
    for what, row in found["wheels"].items():
        size = row["bytes"] / 1e6
        asked = f"under {WHEEL_MB} MB: {verdict(size, WHEEL_MB)}"
        made.append([f"wheel, {what}", f"{size:.2f} MB; module {row['module_bytes'] / 1e6:.2f} MB unpacked", asked])
        limit = timed(row, WHEEL_MINUTES) if what == "CPU kernels" else ""
        made.append([f"`make wheel`, {what}", minutes(row), limit])
        same = f"yes, {row['sha256'][0][:16]}..." if row["same"] else "**no**"
        made.append(["the same file, made twice", same, "yes"])
    for what, row in found["installs"].items():
        made.append([f"`pip install .`, {what}", minutes(row), timed(row, INSTALL_MINUTES)])
    if "imports" in found:
        row = found["imports"]
        own = f"{row['deqfast_s']:.3f} s after torch's {row['torch_s']:.2f} s"
        if "collector_s" in row:
            own += f", {row['collector_s']:.3f} s of it Python's collector on torch's objects"
        crowded = (row["busy_elsewhere"] or 0) > CROWDED
        limit = "not told, the machine was not free" if crowded else verdict(row["deqfast_s"], IMPORT_S)
        limit = f"under {IMPORT_S} s: {limit}"
        made.append([f"`import deqfast`, median of {row['processes']} processes", own, limit])
    return made


def block(found: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    meta = found["meta"]
    lines = ["|  | measured | asked |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows(found))]
    packages = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    told = f"`{meta['command']}` on {meta['device']} ({meta['cores']} cores), {meta['date']}; {packages}."
    missing = (
        "" if "CPU and CUDA kernels" in found["wheels"] else " The wheel with CUDA kernels was not made in this run."
    )
    return "\n".join(lines) + f"\n\n{told}{missing}"


def filled(page: str, body: str) -> str:
    """``page`` with ``body`` between the marks."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"install.md: expected {BEGIN} and {END} once each")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{body}\n{END}", page, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite docs/install.md with what was measured last."""
    parser = argparse.ArgumentParser(
        prog="python docs/make_install.py", description=(__doc__ or "").split(":")[0] + "."
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "install.md")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*-install.json"))
    if not files:
        raise SystemExit(f"{options.results}: nothing measured, no *-install.json; make install-report")
    options.page.write_text(filled(options.page.read_text(), block(json.loads(files[-1].read_text()))))


if __name__ == "__main__":
    main()
