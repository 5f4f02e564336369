"""Turns the newest results into docs/benchmarks.md and pictures: `python -m bench.report`.

Reads bench/results/*.json, what pytest-benchmark, bench.convergence and bench.breakdown wrote, and the gpu.json of runs
on a GPU in folders below.  Full runs are preferred to quick ones.  No number in the document is typed by hand; targets
come from bench/targets.py and each is marked as met or not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import methods
from bench.report import gpu, pictures
from bench.report.compat import compat_section
from bench.report.convergence import convergence_section, time_section
from bench.report.held import target_section
from bench.report.markdown import CROWDED
from bench.report.newest import newest
from bench.report.processes import scaling_section, segments_section
from bench.report.rows import rows_section
from bench.report.sections import breakdown_section, joint_section, speed_section
from bench.report.torch import torch_section


def write(results: Path, out: Path) -> None:
    kinds = ("speed", "convergence", "breakdown", "torch", "compat", "segments", "scaling", "rows")
    speed, convergence, breakdown, plain, compat, segments, scaling, rows = (newest(results, kind) for kind in kinds)
    if speed is None and convergence is None:
        raise SystemExit(f"no results in {results}: run `make bench` or `python -m bench.convergence` first")
    records = (speed and speed["machine_info"], convergence, plain, compat, segments, scaling, rows)
    quick = [r for r in records if r and r.get("quick")]
    img = out.parent / "img"
    parts = ["# Benchmarks", "Written by `python -m bench.report` from the newest results; edit nothing here."]
    if quick:
        parts.append("**Some of these results come from a `--quick` trial and are not measurements.**")
    # Not of compat: a single thread's processor time does not wait for others.
    metas = [record["meta"] for record in (convergence, breakdown, plain, scaling) if record]
    metas += [speed["machine_info"]] if speed else []
    if any((meta.get("busy_elsewhere") or 0.0) > CROWDED for meta in metas):
        parts.append(
            "**Other programs were busy during a run below: its times, and what they say of targets, are void.**"
        )
    parts += target_section(speed, convergence, plain, compat, rows)
    if speed is not None:
        parts += speed_section(speed, img)
        parts += joint_section(speed)
    if breakdown is not None:
        parts += breakdown_section(breakdown)
    if convergence is not None:
        shown = [method for method in methods.SHOWN if method in convergence["counts"]]
        pictures.performance_profiles(convergence, shown, img / "performance_profiles.png")
        parts += convergence_section(convergence) + time_section(convergence)
    if plain is not None:
        parts += torch_section(plain)
    if compat is not None:
        parts += compat_section(compat)
    if rows is not None:
        parts += rows_section(rows)
    if segments is not None:
        parts += segments_section(segments)
    if scaling is not None:
        parts += scaling_section(scaling)
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
