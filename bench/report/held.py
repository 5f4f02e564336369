"""Every target of this project (bench/targets.py) and what was measured for it."""

from __future__ import annotations

from collections.abc import Mapping

from bench import free, joint, methods, targets
from bench.report import summary
from bench.report.compat import compat_checks
from bench.report.markdown import Results, table, verdict
from bench.report.rows import rows_checks
from bench.report.sections import honest_ratio, joint_rows, speed_rows
from bench.report.torch import torch_checks
from bench.report.training import training_checks

CHECKS = {"torch": torch_checks, "compat": compat_checks, "rows": rows_checks, "training": training_checks}


def target_section(records: Mapping[str, Results]) -> list[str]:
    rows: list[list[str]] = []
    speed, convergence = records.get("speed"), records.get("convergence")
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
                        honest = honest_ratio(facts_of[name], facts_of[targets.TORCHDEQ])
                        rows.append([f"{name}, {size}: torchdeq / row", verdict(honest, goal)])
        rows += floor_checks(speed)
        rows += joint_checks(speed)
    for kind, checks in CHECKS.items():
        rows += checks(records[kind]) if kind in records else []
    met = sum("(met" in row[1] for row in rows)
    head = f"{met} of {len(rows)} met; the sections below say how each was measured."
    return ["## Targets of this project", head, table(["figure", "measured"], rows)]


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
