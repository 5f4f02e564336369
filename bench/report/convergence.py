"""The sections on evaluations to tolerance and on time to tolerance."""

from __future__ import annotations

import math

from bench import methods
from bench.report import summary
from bench.report.markdown import Results, number, provenance, table


def convergence_section(record: Results) -> list[str]:
    tolerances, headline = record["tolerances"], record["headline"]
    out = ["## Evaluations to tolerance", provenance(record["meta"])]
    out.append(
        f"{len(record['problems'])} problems (bench/problems.py), float32, at most {record['cap']} evaluations. A "
        "count is the first evaluation whose iterate has ||f(z) - z|| <= tolerance ||f(z)||, measured in float64 "
        "from outside every solver, per sample; a sample that never gets there counts as failed and as the cap. "
        f"Mean: geometric, every problem weighing the same, over {' and '.join(f'{t:g}' for t in headline)}."
    )
    default = summary.geometric_mean(record, methods.DEFAULT, headline)
    rows = []
    for method in record["counts"]:
        mean = summary.geometric_mean(record, method, headline)
        row = [method, number(mean), f"{summary.failed_percent(record, method, headline):.1f}", f"{mean / default:.2f}"]
        for t in tolerances:
            one, failed = summary.geometric_mean(record, method, (t,)), summary.failed_percent(record, method, (t,))
            row.append(f"{number(one)} / {failed:.1f} %")
        rows.append(row)
    header = ["method", "mean evaluations", "failed %", "/ default", *(f"{t:g}: mean / failed" for t in tolerances)]
    out += [table(header, rows), "![performance profiles](img/performance_profiles.png)", "### Problem by problem"]
    shown = [method for method in methods.SHOWN if method in record["counts"]]
    rows = []
    for problem, facts in record["problems"].items():
        row = [problem, f"{facts['B']} x {facts['N']}", facts["notes"]]
        for method in shown:
            counts = summary.counts_at(record, method, problem, 1e-5) or summary.counts_at(
                record, method, problem, 1e-3
            )
            counts = counts or []
            mean = math.exp(sum(math.log(k or record["cap"]) for k in counts) / len(counts))
            failed = sum(k == 0 for k in counts)
            row.append(number(mean) + (f" ({failed} failed)" if failed else ""))
        rows.append(row)
    out.append("At 1e-5, or 1e-3 where f itself has noise above 1e-5.")
    out.append(table(["problem", "B x N", "what", *shown], rows))
    return out


def time_section(record: Results) -> list[str]:
    if "time" not in record:
        return []
    shown = [method for method in methods.SHOWN if method in record["counts"]]
    rows = []
    for entry in record["time"]["rows"]:
        facts = entry["methods"]
        row = [entry["problem"], f"{entry['tolerance']:g}"]
        row += [number(1e3 * facts[m]["seconds"]) if "seconds" in facts.get(m, {}) else "failed" for m in shown]
        rivals = [facts[m]["seconds"] for m in methods.TORCHDEQ if "seconds" in facts.get(m, {})]
        own = facts[methods.DEFAULT].get("seconds")
        row.append(number(min(rivals) / own) if rivals and own else "-")
        rows.append(row)
    note = (
        "Whole solves, stop tests included, in milliseconds; methods in turns. A rival that does not reach the "
        "tolerance on every sample has failed; each rival gets no more evaluations than it needs. The ratio is to "
        "the best of torchdeq's Anderson, Anderson with lam=1e-8 and Broyden."
    )
    return ["## Time to tolerance, f nearly free", note, table(["problem", "tolerance", *shown, "ratio"], rows)]
