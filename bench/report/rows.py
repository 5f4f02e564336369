"""The section on batches that pay for their slowest sample."""

from __future__ import annotations

from typing import Any

from bench.report.markdown import Results, number, provenance, table, verdict

NOTE = """One thread, processor time, rows in turns. *Evaluations*: of the slowest sample, and the mean of all. *Rows of
f*: rows of the batch that f was evaluated at, over all evaluations; in brackets, over those that the samples
need by themselves. *Rows of vjps*: the same of the backward solve. Training steps make the gradient of all
weights. *Digits*: tanh(W z + x) with 128 numbers, trained on scikit-learn's digits with nothing to bound W,
solved to 1e-4. *Hard*: samples that contract by 0.975 along an orthogonal matrix, where the others contract by
0.55. *Dear f*: the same map by a product that is eight times as large."""
SWEEP = """Other ladders of sizes and other prices of the first shrinking. *Step*: from one size to the next the batch
loses one part in so many. *Price*: rows evaluated for nothing before the batch shrinks first, as a part of the
whole batch, which the last look will cost. A quarter and a quarter are what `compact=` takes."""
DRAWN = """Rows of f over those of the plain solve where samples need nearly the same: drawn from a normal distribution
around 16 evaluations, the mean of 40 batches, and the worst."""


def rows_checks(record: Results) -> list[list[str]]:
    """What is held against targets, as rows of their table."""
    held = [told for row in record["rows"] for told in row.get("held", [])]
    return [[told["what"], verdict(told["value"], told["asked"], at_most=told["at_most"])] for told in held]


def rows_section(record: Results) -> list[str]:
    cells = []
    for row in record["rows"]:
        vjps = f"{row['vjp_rows']:,d}" if "vjp_rows" in row else ""
        faster = number(row["faster"]["ratio"]) if "faster" in row else ""
        asked = [verdict(told["value"], told["asked"], at_most=told["at_most"]) for told in row.get("held", [])]
        cells.append(
            [
                row["case"],
                row["row"],
                f"{row['evaluations']} (mean {row['mean']:.1f})",
                f"{row['rows']:,d} ({row['rows'] / row['own']:.2f})",
                vjps,
                f"{number(row['ms'])} ({number(row['ms_low'])} to {number(row['ms_high'])})",
                faster,
                "; ".join(asked),
            ]
        )
    header = ["batch", "", "evaluations", "rows of f", "rows of vjps", "ms", "times faster", "target"]
    out = ["## Batches and their slowest sample", provenance(record["meta"], of_the_processor=True), NOTE]
    out.append(table(header, cells))
    return out + _sweep(record) + _drawn(record)


def _sweep(record: Results) -> list[str]:
    if not record.get("sweep"):
        return []
    cells = [
        [
            row["case"],
            f"1/{row['rung']}",
            number(row["trust"]),
            str(row["shapes"]),
            f"{row['rows']:,d} ({row['rows'] / row['own']:.3f})",
            f"{row['vjp_rows']:,d}" if "vjp_rows" in row else "",
            number(row["ms"]),
        ]
        for row in record["sweep"]
    ]
    header = ["batch", "step", "price", "sizes that f sees", "rows of f", "rows of vjps", "ms"]
    return ["### When a batch shrinks", SWEEP, table(header, cells)]


def _drawn(record: Results) -> list[str]:
    if not record.get("drawn"):
        return []
    by: dict[tuple[int, float], dict[float, Any]] = {}
    for row in record["drawn"]:
        by.setdefault((row["samples"], row["spread"]), {})[row["trust"]] = f"{row['mean']:.3f} ({row['worst']:.3f})"
    prices = list(next(iter(by.values())))
    cells = [[str(B), f"{spread:g}", *found.values()] for (B, spread), found in by.items()]
    return [DRAWN, table(["samples", "standard deviation", *(f"price {price:g}" for price in prices)], cells)]
