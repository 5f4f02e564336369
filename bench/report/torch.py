"""The section on plain torch, and what is held against its targets."""

from __future__ import annotations

from bench import targets
from bench.report.markdown import Results, number, provenance, table, verdict

HELD = {targets.LIKE_FOR_LIKE: targets.TORCH_LIKE_FOR_LIKE, targets.DEFAULT: targets.TORCH_DEFAULT}


def torch_checks(record: Results) -> list[list[str]]:
    rows = []
    for facts in record["rows"]:
        if facts["row"] in HELD:
            label = f'{facts["row"]}, backend "{record["backend"]}", {facts["size"]}'
            wanted = HELD[facts["row"]][facts["size"]]
            rows.append([f"{label}: row / torchdeq", verdict(facts["ratio"], wanted, at_most=True)])
            rows.append([f"{label}: ops a step", verdict(facts["ops"], targets.TORCH_OPS, at_most=True)])
    return rows


def torch_section(record: Results) -> list[str]:
    rows = []
    for facts in record["rows"]:
        own = facts["row"] in HELD
        ratio = f"{number(facts['ratio'])} ({number(facts['low'])} to {number(facts['high'])})" if own else ""
        spread = f"{number(facts['us'])} ({number(facts['us_low'])} to {number(facts['us_high'])})"
        evaluations, residual = str(facts["evaluations"]), f"{facts['residual']:.0e}"
        rows.append([facts["size"], facts["row"], evaluations, spread, ratio, number(facts["ops"]), residual])
    header = ["B x N", "row", "evaluations", "us an evaluation (quartiles)", "row / torchdeq", "ops a step", "residual"]
    return [f'## Backend "{record["backend"]}"', provenance(record["meta"]), _NOTE, table(header, rows)]


_NOTE = (
    "float32, f(z) = a z + b as one elementwise kernel, its time included; every row the same number of evaluations, "
    "rows in turns within one run. *Row / torchdeq* is the median over the turns, with its 95 % interval. *Ops a "
    "step*: what torch dispatches for one more evaluation of a solve whose history is full; f's own and views are left "
    "out."
)
