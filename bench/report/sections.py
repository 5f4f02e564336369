"""The sections on time: of a solver step, of the joint step, and what an evaluation is made of."""

from __future__ import annotations

import math
from pathlib import Path

from bench import free, joint, targets
from bench.report import pictures
from bench.report.markdown import Results, number, provenance, table, verdict


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


def honest_ratio(facts: Results, rival: Results) -> float | None:
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
                    honest = honest_ratio(facts, rival)
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
