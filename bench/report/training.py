"""The section on whole training steps, and what is held against its targets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.report import pictures
from bench.report.markdown import Results, number, provenance, table, verdict

NOTE = """One training step each: forward solve, a loss, the backward solve, the gradients of all parameters; no
optimiser. float32, random weights, tolerance 1e-4 relative in both passes, asked of every row in its own way; what came
out stands beside the time: the worst sample's residual, and the distance of the gradient from that of a float64 solve
to 1e-10. Rows take turns within one run; JAX's, each one jitted program, in a process that waits for its turns. *f
compiled*: by torch.compile. *JAX by hand*: batched solvers written for one program (bench/training/jax_worker.py), with
custom_vjp. What is off by more than ten times the tolerance is not compared. banax is not on the package index."""

MEMORY = """Peak memory of the process during forward and backward solve, 30 evaluations each, beside what it held
before, in sizes of the state; 16 samples, float32. f(z) = tanh(a z + x) keeps two states for its own backward. Beside
them a solve holds the solution, three iterates, f's last two outputs and its columns: 2m of half a state for Anderson's
bfloat16 ones, m of a whole one for Broyden. torchdeq's Broyden ignores its m in this call, and its backward solves keep
columns of their own. The C library gives freed blocks back here (M_MMAP_THRESHOLD=262144; a program gets the same by
the variable MALLOC_MMAP_THRESHOLD_): left alone it keeps many of them, and a process may hold twice of this."""


def training_checks(record: Results) -> list[list[str]]:
    return [
        [held["what"], verdict(held["value"], held["asked"], at_most=held["at_most"])]
        for row in record["rows"]
        for held in row.get("held", [])
    ]


def training_section(record: Results, img: Path) -> list[str]:
    rows = record["rows"]
    timed: dict[str, dict[str, float]] = {}
    for row in rows:
        if "ms" in row:
            timed.setdefault(row["row"], {})[row["net"]] = row["ms"]
    pictures.training_bars(timed, img / "training_steps.png")
    header = ["net", "row", "evaluations", "ms (quartiles)", "residual", "gradient off by"]
    return [
        "## Training steps",
        provenance(record["meta"]),
        NOTE,
        table(header, [_cells(row) for row in rows]),
        "![Milliseconds a training step](img/training_steps.png)",
        table(["target", ""], training_checks(record)),
    ]


def memory_section(record: Results, img: Path) -> list[str]:
    rows = record["rows"]
    pictures.memory_lines(rows, img / "memory.png")
    sizes = sorted({(row["numbers"], row["m"]) for row in rows})
    header = ["row", *(f"{4 * numbers / 1e6:.3g} MB, m = {m}" for numbers, m in sizes)]
    found = {(row["row"], row["numbers"], row["m"]): row["states"] for row in rows}
    cells = [
        [name, *(number(found[name, numbers, m]) for numbers, m in sizes)]
        for name in dict.fromkeys(row["row"] for row in rows)
    ]
    return [
        "## Memory of a training step",
        provenance(record["meta"], of_the_processor=True),
        MEMORY,
        table(header, cells),
        "![Peak memory of a training step](img/memory.png)",
    ]


def _cells(row: Mapping[str, object]) -> list[str]:
    if "failed" in row:
        return [str(row["net"]), str(row["row"]), "-", f"failed: {row['failed']}", "-", "-"]
    took = f"{number(_f(row, 'ms'))} ({number(_f(row, 'ms_low'))} to {number(_f(row, 'ms_high'))})"
    residual = f"{_f(row, 'residual'):.0e}" if "residual" in row else "-"
    error = f"{_f(row, 'gradient_error'):.0e}" if "gradient_error" in row else "-"
    return [str(row["net"]), str(row["row"]), str(row["evaluations"]), took, residual, error]


def _f(row: Mapping[str, object], key: str) -> float:
    return float(row[key])  # type: ignore[arg-type]
