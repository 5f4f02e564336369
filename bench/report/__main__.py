"""Turns the newest results into docs/benchmarks.md and pictures: `python -m bench.report`.

Reads bench/results/*.json, what pytest-benchmark, bench.convergence and bench.breakdown wrote, and the gpu.json of runs
on a GPU in folders below.  Full runs are preferred to quick ones.  No number in the document is typed by hand; targets
come from bench/targets.py and each is marked as met or not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import methods
from bench.report import gpu, pictures
from bench.report.compat import compat_section
from bench.report.convergence import convergence_section, time_section
from bench.report.held import target_section
from bench.report.history import history_section, rounding_section
from bench.report.markdown import CROWDED, Results
from bench.report.newest import newest
from bench.report.processes import scaling_section, segments_section
from bench.report.rows import rows_section
from bench.report.sections import breakdown_section, joint_section, speed_section
from bench.report.torch import torch_section
from bench.report.training import memory_section, training_section
from bench.report.warm import coarse_section, warm_section


def _convergence(record: Results, img: Path) -> list[str]:
    shown = [method for method in methods.SHOWN if method in record["counts"]]
    pictures.performance_profiles(record, shown, img / "performance_profiles.png")
    return convergence_section(record) + time_section(record)


# Kinds of results, in the order of the document, with what is said of one and where its pictures go.
SECTIONS: dict[str, Callable[[Results, Path], list[str]]] = {
    "speed": lambda record, img: speed_section(record, img) + joint_section(record),
    "training": training_section,
    "memory": memory_section,
    "breakdown": lambda record, _: breakdown_section(record),
    "convergence": _convergence,
    "torch": lambda record, _: torch_section(record),
    "compat": lambda record, _: compat_section(record),
    "rows": lambda record, _: rows_section(record),
    "segments": lambda record, _: segments_section(record),
    "scaling": lambda record, _: scaling_section(record),
    "history": lambda record, _: history_section(record),
    "rounding": lambda record, _: rounding_section(record),
    "warm": lambda record, _: warm_section(record),
    "coarse": lambda record, _: coarse_section(record),
}
# Of a single thread the processor's time is told, or memory or counts: other programs do not matter.
ALONE = ("speed", "training", "breakdown", "convergence", "torch", "scaling")


def meta_of(kind: str, record: Results) -> Results:
    found: Results = record["machine_info" if kind == "speed" else "meta"]
    return found


def write(results: Path, out: Path) -> None:
    records = {kind: record for kind in SECTIONS if (record := newest(results, kind)) is not None}
    if not records.keys() & {"speed", "convergence"}:
        raise SystemExit(f"no results in {results}: run `make bench` or `python -m bench.convergence` first")
    img = out.parent / "img"
    parts = ["# Benchmarks", "Written by `python -m bench.report` from the newest results; edit nothing here."]
    if any(record.get("quick") or meta_of(kind, record).get("quick") for kind, record in records.items()):
        parts.append("**Some of these results come from a `--quick` trial and are not measurements.**")
    metas = [meta_of(kind, record) for kind, record in records.items() if kind in ALONE]
    if any((meta.get("busy_elsewhere") or 0.0) > CROWDED for meta in metas):
        parts.append(
            "**Other programs were busy during a run below: its times, and what they say of targets, are void.**"
        )
    parts += target_section(records)
    for kind, section in SECTIONS.items():
        if kind in records:
            parts += section(records[kind], img)
    parts += gpu.section(gpu.newest(results))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(parts) + "\n")
    print(f"wrote {out}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args(arguments)
    write(options.results, options.out)


if __name__ == "__main__":
    main()
