"""The sections on warm starts in training, and on evaluations in a narrow dtype first."""

from __future__ import annotations

from bench.report.markdown import Results, number, provenance, table

_WARM = """The dense network learning the digits, {epochs} epochs after the first at the rate given, batches of {batch},
rtol={rtol:g}; evaluations and vjps a batch."""


_COARSE = """Under autocast to bfloat16 to a residual of 2e-2 (*coarse*), and on from there (*then*), beside *plain*:
evaluations of eight samples in a batch. Below: one product (B, N) x (N, N), processor time of one thread, us."""


def coarse_section(record: Results) -> list[str]:
    names = ("plain", "coarse", "then")
    rows = [[r["problem"], f"{r['tolerance']:g}", *(str(r[name]) for name in names)] for r in record["solved"]]
    dtypes = ("float32", "bfloat16", "autocast")
    timed = [[f"{r['rows']} x {r['n']}", *(number(r[name]) for name in dtypes)] for r in record["products"]]
    out = ["## Coarse first", provenance(record["meta"], of_the_processor=True), _COARSE]
    return [*out, table(["network", "rtol", *names], rows), table(["B x N", *dtypes], timed)]


def warm_section(record: Results) -> list[str]:
    rows = [
        [f"{row['rate']:g}", f"{row['noise']:g}", row["start"], number(row["forward"]), number(row["vjps"])]
        for row in record["rows"]
    ]
    header = ["learning rate", "noise on images", "start", "evaluations", "vjps"]
    return [
        "## Warm starts in training",
        provenance(record["meta"], of_the_processor=True),
        _WARM.format(**record),
        table(header, rows),
    ]
