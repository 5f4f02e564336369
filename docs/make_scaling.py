"""Fills docs/scaling.md from the newest bench/results/*-scaling.json: ``python docs/make_scaling.py``.

A quick run is left out. The picture goes to docs/img/scaling.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))

import measured_page as measured

from bench import scaling_model as model
from bench.report.markdown import number, provenance, verdict
from bench.report.newest import newest
from bench.report.pictures import scaling

ROOT = Path(__file__).resolve().parents[1]
LARGE_N, A_GPU, EVALUATIONS, M = 2_000_000_000, 20_000_000, 20, 10
CASES = {
    f"one sample of {LARGE_N:,}, bfloat16": lambda gpus: model.Problem(LARGE_N // gpus, 1, EVALUATIONS, M),
    f"one sample of {LARGE_N:,}, int8": lambda gpus: model.Problem(LARGE_N // gpus, 1, EVALUATIONS, M, h=1),
    f"one sample of {LARGE_N:,}, mix_every=4": lambda gpus: model.Problem(
        LARGE_N // gpus, 1, EVALUATIONS, M, mix_every=4
    ),
    f"64 samples, {A_GPU:,} numbers a GPU, bfloat16": lambda gpus: model.Problem(A_GPU, 64, EVALUATIONS, M),
}


def points(record: Mapping[str, Any]) -> str:
    """Measured beside predicted."""
    rows = [
        [row["row"], str(row["processes"]), number(row["us"]), number(row["predicted"]), number(row["ratio"])]
        for row in model.compared(record)
    ]
    return measured.table(["row", "processes", "us measured", "us predicted", "measured / predicted"], rows)


def fitted(record: Mapping[str, Any]) -> str:
    """What the predictions rest on."""
    rows = []
    for size in sorted({row["processes"] for row in record["rows"]}):
        c = model.measured_cluster(record, size)
        wire = "-" if size == 1 or c.wire == float("inf") else number(c.wire / 1e9)
        rows.append([str(size), number(c.bandwidth / 1e9), number(1e6 * c.latency), wire])
    return measured.table(["processes", "GB/s a process, copying", "us an all-reduce", "GB/s of a large one"], rows)


def asked(record: Mapping[str, Any]) -> str:
    """Targets."""
    rows = [[t["what"], verdict(t["value"], t["asked"], at_most=t["at_most"])] for t in record["held"]]
    return measured.table(["target", ""], rows)


def clusters() -> str:
    """Predictions for GPUs."""
    rows = []
    for name, of in CASES.items():
        for gpus, whole, share in model.predicted(of):
            rows.append([name, str(gpus), number(1e6 * whole), f"{100 * share:.0f} %"])
    return measured.table(["case", "GPUs", "us predicted", "not communication"], rows)


def block(record: Mapping[str, Any]) -> str:
    """All that is between the markers."""
    return "\n\n".join(
        [
            "![Measured against predicted, and the prediction to 1,024 GPUs](img/scaling.png)",
            asked(record),
            "What the predictions rest on, measured in the same run:",
            fitted(record),
            "An evaluation, measured and predicted:",
            points(record),
            "Assumed GPUs, none of them measured:",
            clusters(),
            provenance(record["meta"]),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite docs/scaling.md with what has been measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "scaling.md")
    options = parser.parse_args(arguments)
    record = newest(options.results, "scaling")
    if record is None or record["quick"] or "stream" not in record:
        raise SystemExit(f"nothing measured: no full run with a copy's speed in {options.results}")
    picture = options.page.parent / "img" / "scaling.png"
    scaling(model.compared(record), {name: model.predicted(of) for name, of in CASES.items()}, picture)
    options.page.write_text(measured.fill(options.page.read_text(), "scaling", block(record), options.page.name))
    print(f"filled {options.page.name}")


if __name__ == "__main__":
    main()
