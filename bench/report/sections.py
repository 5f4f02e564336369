"""Turns the newest results into docs/benchmarks.md and pictures: `python -m bench.report`.

Reads bench/results/*.json, what pytest-benchmark, bench.convergence and bench.breakdown wrote, and the gpu.json of runs
on a GPU in folders below.  Full runs are preferred to quick ones.  No number in the document is typed by hand; targets
come from bench/targets.py and each is marked as met or not.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import free, joint, methods, targets
from bench.report import gpu, pictures, summary

Results = Mapping[str, Any]
CROWDED = 0.15  # cores in other programs' hands above which times are not to be trusted


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


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def provenance(meta: Results) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    busy = meta.get("busy_elsewhere")
    alone = "" if busy is None else f" Other programs kept {busy:.2f} cores busy meanwhile."
    if busy is not None and busy > CROWDED:
        alone = f" **Other programs kept {busy:.2f} cores busy meanwhile: read no time from this run.**"
    return (
        f"`{meta['command']}` on {meta['device']} ({meta['capability']}, {meta['cores']} cores, {meta['threads']} "
        f"torch threads), {meta['date']}; {packages}.{alone}"
    )


def number(value: float) -> str:
    """Three significant digits, plain notation."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def verdict(value: float | None, target: float, *, at_most: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return f"not measured (target {target:g})"
    met = value <= target if at_most else value >= target
    return f"{number(value)} ({'met' if met else '**missed**'}, target {target:g})"


def speed_rows(record: Results, method: str) -> dict[str, dict[str, Results]]:
    """facts[size][row], in the order of the sizes."""
    found: dict[str, dict[str, Results]] = {}
    for entry in record["benchmarks"]:
        facts = entry["extra_info"]
        if facts.get("method") != method:
            continue
        found.setdefault(facts["size"], {})[facts["row"]] = facts
        found[facts["size"]].update(facts.get("elsewhere", {}))
    return {size: found[size] for size in free.SIZES if size in found}


def _honest_ratio(facts: Results, rival: Results) -> float | None:
    """Ratio to torchdeq, or None where the row's residual is worse than the rival's.

    Worse means above twice the rival's and above float32's own floor of about 1e-6; a rival without a finite residual
    is beaten by any finite one.
    """
    own, other = facts["residual"], rival["residual"]
    good = own <= 1e-6 or own <= 2 * other or (math.isfinite(own) and not math.isfinite(other))
    return facts["ratio_to_torchdeq"] if good else None


def speed_section(record: Results, img: Path) -> list[str]:
    out = ["## Time of a solver step", provenance(record["machine_info"]), _SPEED_NOTE]
    for method, title in (("anderson", "Anderson"), ("broyden", "Broyden")):
        by_size = speed_rows(record, method)
        if not by_size:
            continue
        ratios: dict[str, dict[str, float]] = {}
        rows = []
        for size, facts_of in by_size.items():
            rival = facts_of[targets.TORCHDEQ]
            for name, facts in facts_of.items():
                if name != targets.TORCHDEQ:
                    ratios.setdefault(name, {})[size] = facts["ratio_to_torchdeq"]
                wanted = targets.SPEED.get(name, {}).get(size)
                ratio = number(facts["ratio_to_torchdeq"])
                if wanted is not None:
                    honest = _honest_ratio(facts, rival)
                    ratio = verdict(honest, wanted) if honest is not None else f"{ratio}, but a worse residual: no win"
                fraction = number(facts["floor_fraction"]) if "floor_fraction" in facts else ""
                spread = f"{number(facts['us'])} ({number(facts['us_low'])} to {number(facts['us_high'])})"
                residual = f"{facts['residual']:.0e}"
                rows.append(
                    [
                        size,
                        name,
                        str(facts["evaluations"]),
                        spread,
                        number(facts["us_without_f"]),
                        ratio,
                        fraction,
                        residual,
                    ]
                )
        header = [
            "B x N",
            "row",
            "evaluations",
            "us an evaluation (quartiles)",
            "without f",
            "torchdeq / row",
            "of the floor",
            "residual",
        ]
        out += [f"### {title}", table(header, rows)]
        picture = img / f"speed_{method}.png"
        pictures.speed_bars(ratios, picture, f"{title}, equal evaluations, float32")
        out.append(f"![{title}: times faster than torchdeq](img/{picture.name})")
        skipped = {
            row: why for facts in by_size.values() for row, why in facts[targets.TORCHDEQ].get("skipped", {}).items()
        }
        out += [f"Not run: {row} ({why})." for row, why in skipped.items()]
    return out


_SPEED_NOTE = (
    "float32, f(z) = a z + b as one elementwise kernel, every row the same number of evaluations, rows timed in "
    "turns within one run. *Without f* subtracts f's own time, measured in the same run. *Of the floor*: floor "
    "bytes of the method (bench/floor.py) over the time without f, divided by the bandwidth of a 256 MB copy in the "
    "same run, for states that leave the cache. *torchdeq / row* is the ratio of medians; a row whose residual is "
    "above twice torchdeq's is not counted as a win. jaxopt runs in an interpreter of its own, not in turns."
)


def joint_rows(record: Results) -> dict[str, dict[str, Results]]:
    """facts[shape][row], in the order of the shapes."""
    found: dict[str, dict[str, Results]] = {}
    for entry in record["benchmarks"]:
        facts = entry["extra_info"]
        if facts.get("method") == "joint":
            found.setdefault(facts["size"], {})[facts["row"]] = facts
    return {size: found[size] for size in joint.SHAPES if size in found}


def joint_section(record: Results) -> list[str]:
    """The joint step alone, beside the same in torch."""
    rows = []
    for size, facts_of in joint_rows(record).items():
        for row, facts in facts_of.items():
            own = row in joint.HISTORY
            cut = "" if facts["B"] == facts["B_published"] else f" (published {facts['B_published']})"
            rows.append(
                [
                    size,
                    f"{facts['B']}{cut} x {facts['N']:,}, m={facts['m']}",
                    f"deqfast, {row} history" if own else "torch, blocks joined by cat",
                    f"{number(facts['us'])} ({number(facts['us_low'])} to {number(facts['us_high'])})",
                    verdict(facts["floor_fraction"], targets.JOINT_FLOOR_FRACTION) if own else "",
                    verdict(facts["ratio_to_torch"], targets.JOINT_TORCH) if own else "",
                ]
            )
    if not rows:
        return []
    header = ["shape", "B x N, columns", "row", "us (quartiles)", "of the floor", "torch / row"]
    return ["## The joint step alone", provenance(record["machine_info"]), _JOINT_NOTE, table(header, rows)]


_JOINT_NOTE = (
    "One step at the shapes of joint inference and input optimisation (bench/joint.py), float32 state, every column in "
    "use, rows in turns within one run; batches that do not fit are cut. *Of the floor*: bytes of Anderson's step and "
    "of one more write, the mapped state (bench/joint.py), over the time, divided by the bandwidth of 256 MB copies "
    "between the rows. The map is a pass of its own, which moves two state-sized reads more than the floor has."
)


def breakdown_section(record: Results) -> list[str]:
    """What one evaluation of an Anderson solve is made of."""
    rows = []
    for facts in record["rows"]:
        parts = ("us", "us_f", "us_step", "us_floor_at_copy_speed", "us_once")
        rows.append([facts["size"], facts["row"], *(number(facts[part]) for part in parts)])
    header = [
        "B x N",
        "row",
        "solve / evaluations",
        "f",
        "full step",
        "its floor at copy speed",
        "solve of one evaluation",
    ]
    return ["## Where the time goes", provenance(record["meta"]), _BREAKDOWN_NOTE, table(header, rows)]


_BREAKDOWN_NOTE = (
    "Microseconds. *Full step*: one step with a full history, alone. *Its floor at copy speed*: the bytes of that "
    "step's floor, at the bandwidth of a copy between buffers as large as what the step touches, in whichever cache "
    "those fit. *Solve of one evaluation*: workspace, checks, first step and result, paid once a solve. "
    "[limits.md](limits.md#what-bounds-a-step) says what follows from it."
)


def floor_checks(record: Results) -> list[list[str]]:
    rows = []
    for size, facts_of in speed_rows(record, "anderson").items():
        B, N = free.SIZES[size]
        compiled = facts_of.get(targets.COMPILED)
        for name in (targets.LIKE_FOR_LIKE, targets.BFLOAT16, targets.DEFAULT):
            facts = facts_of.get(name)
            if facts is None:
                continue
            if compiled and name != targets.DEFAULT:
                rows.append([f"{name}, {size}: torch.compile / row", verdict(compiled["us"] / facts["us"], 1.0)])
            if B * N >= targets.FLOOR_FROM and "floor_fraction" in facts:
                rows.append(
                    [f"{name}, {size}: fraction of the floor", verdict(facts["floor_fraction"], targets.FLOOR_FRACTION)]
                )
    return rows


def joint_checks(record: Results) -> list[list[str]]:
    rows = []
    for size, facts_of in joint_rows(record).items():
        for row in [row for row in joint.HISTORY if row in facts_of]:
            facts, what = facts_of[row], f"joint step, {size}, {row} history"
            fraction = verdict(facts["floor_fraction"], targets.JOINT_FLOOR_FRACTION)
            rows.append([f"{what}: fraction of the floor", fraction])
            rows.append([f"{what}: torch / row", verdict(facts["ratio_to_torch"], targets.JOINT_TORCH)])
    return rows


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


def target_section(speed: Results | None, convergence: Results | None) -> list[str]:
    rows: list[list[str]] = []
    if convergence is not None and methods.DEFAULT in convergence["counts"]:
        headline = convergence["headline"]
        own = summary.geometric_mean(convergence, methods.DEFAULT, headline)
        for rival, wanted in targets.EVALUATION_RATIO.items():
            ratio = summary.geometric_mean(convergence, rival, headline) / own
            rows.append([f"fewer evaluations than {rival}", verdict(ratio, wanted)])
        failed = summary.failed_percent(convergence, methods.DEFAULT, headline)
        rows.append(["failed samples, %", verdict(failed, targets.FAILED_PERCENT, at_most=True)])
        tightest = min(convergence["tolerances"])
        stalls = min(summary.failed_percent(convergence, rival, (tightest,)) for rival in methods.TORCHDEQ)
        failed = summary.failed_percent(convergence, methods.DEFAULT, (tightest,))
        rows.append(
            [f"failed samples at {tightest:g}, %, against torchdeq's best", verdict(failed, stalls, at_most=True)]
        )
        if "time" in convergence:
            times = convergence["time"]["summary"]
            told = (
                f"time to tolerance, best of torchdeq's three / deqfast ({times['rows']} rows; beside them "
                f"{times['only_deqfast']} that only deqfast solves, {times['only_torchdeq']} that only torchdeq solves)"
            )
            rows.append([told, verdict(times["geometric_mean"], targets.TIME_RATIO)])
        for kind, allowed in targets.SCALING_CHANGE.items():
            changes = [row["largest_change"] for row in convergence.get("scaling", []) if row["factors"] == kind]
            if changes:
                rows.append([f"change of counts when scaled, {kind}", verdict(max(changes), allowed, at_most=True)])
    if speed is not None:
        for method in ("anderson", "broyden"):
            for size, facts_of in speed_rows(speed, method).items():
                for name in targets.SPEED:
                    goal = targets.SPEED[name].get(size)
                    if name in facts_of and goal is not None:
                        honest = _honest_ratio(facts_of[name], facts_of[targets.TORCHDEQ])
                        rows.append([f"{name}, {size}: torchdeq / row", verdict(honest, goal)])
        rows += floor_checks(speed)
        rows += joint_checks(speed)
    met = sum("(met" in row[1] for row in rows)
    head = f"{met} of {len(rows)} met; the sections below say how each was measured."
    return ["## Targets of this project", head, table(["figure", "measured"], rows)]


def write(results: Path, out: Path) -> None:
    speed, convergence, breakdown = newest(results)
    if speed is None and convergence is None:
        raise SystemExit(f"no results in {results}: run `make bench` or `python -m bench.convergence` first")
    quick = [r for r in (speed and speed["machine_info"], convergence) if r and r.get("quick")]
    img = out.parent / "img"
    parts = ["# Benchmarks", "Written by `python -m bench.report` from the newest results; edit nothing here."]
    if quick:
        parts.append("**Some of these results come from a `--quick` trial and are not measurements.**")
    metas = [record["meta"] for record in (convergence, breakdown) if record]
    metas += [speed["machine_info"]] if speed else []
    if any((meta.get("busy_elsewhere") or 0.0) > CROWDED for meta in metas):
        parts.append(
            "**Other programs were busy during a run below: its times, and what they say of targets, are void.**"
        )
    parts += target_section(speed, convergence)
    if speed is not None:
        parts += speed_section(speed, img)
        parts += joint_section(speed)
    if breakdown is not None:
        parts += breakdown_section(breakdown)
    if convergence is not None:
        shown = [method for method in methods.SHOWN if method in convergence["counts"]]
        pictures.performance_profiles(convergence, shown, img / "performance_profiles.png")
        parts += convergence_section(convergence) + time_section(convergence)
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
