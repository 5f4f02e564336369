"""Tables, targets and the picture of masks.py, from its record alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from frame import INK, OURS, RIVALS, TIMES, columns
from joint_common import target

Run = dict[str, Any]
# Of Student's t, two-sided, at 95 %, for 2, 3, ... seeds.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
COLOURS = {"tied": INK, "masked": OURS, "one mask": RIVALS[1], "untied": RIVALS[2], "implicit": RIVALS[0]}
COLOURS |= {"phantom": RIVALS[3], "penalised": RIVALS[4]}
LABELS = {"tied": "weight-tied", "masked": "masked", "one mask": "one mask for all steps"}
LABELS |= {"untied": "untied, equal parameters", "implicit": "DEQ, implicit"}
DIFFERENCES = [("masked 0.25", "weight-tied"), ("masked 0.25", "one mask 0.25"), ("masked 0.25, scores", "masked 0.25")]
DIFFERENCES += [("untied, equal parameters", "weight-tied"), ("DEQ, implicit", "weight-tied")]
AXES = {"density": "density", "depth": "steps K", "width": "width", "samples": "training samples"}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval; 0 for a single seed."""
    n = len(values)
    if n < 2:
        return values[0], 0.0
    quantile = QUANTILES[min(n - 2, len(QUANTILES) - 1)]
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(n)


def chosen(runs: Sequence[Run], **wanted: Any) -> list[Run]:
    """Those with these values, by seed."""
    found = [run for run in runs if all(run[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda run: run["seed"])


def paired(runs: Sequence[Run], others: Sequence[Run], key: str) -> list[tuple[float, float]]:
    """(value, other value) for every seed that both have."""
    known = {run["seed"]: run[key] for run in others}
    return [(run[key], known[run["seed"]]) for run in runs if run["seed"] in known]


def main_table(record: dict[str, Any], data: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each model on one set of data."""
    runs = chosen(record["runs"], data=data, axis="main")
    key, unit = ("bits", "bits a character") if data == "text" else ("accuracy", "accuracy, %")
    scale = 1 if data == "text" else 100
    header = [data, unit, "parameters", "f", "multiply-adds of f", "and of the ends", "peak MB", "s", "time"]
    tied = chosen(runs, way="tied")
    rows = []
    for name in dict.fromkeys(run["name"] for run in sorted(runs, key=order)):
        mine = chosen(runs, name=name)
        mean, half = interval([scale * run[key] for run in mine])
        f, block, whole, peak = (statistics.mean(r[k] for r in mine) for k in ("evaluations", "block", "whole", "peak"))
        ratio = statistics.median(a / b for a, b in paired(mine, tied, "seconds"))
        value = f"{mean:.2f}" + (f" ± {half:.2f}" if len(mine) > 1 else "")
        cells = [value, f"{mine[0]['parameters']:,}", f"{f:.1f}", f"{block:,.0f}", f"{whole:,.0f}", f"{peak / 1e6:.2f}"]
        rows.append([name, *cells, f"{statistics.median(r['seconds'] for r in mine):.2f}", f"{ratio:.1f}{TIMES}"])
    return header, rows


def differences(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Of pairs of models, seed by seed: accuracy in points, or bits of the text."""
    sets = list(dict.fromkeys(run["data"] for run in record["runs"]))
    rows = []
    for name, other in DIFFERENCES:
        cells = []
        for data in sets:
            runs = chosen(record["runs"], data=data, axis="main")
            key, scale = ("bits", 1) if data == "text" else ("accuracy", 100)
            pairs = paired(chosen(runs, name=name), chosen(runs, name=other), key)
            mean, half = interval([scale * (a - b) for a, b in pairs]) if pairs else (0.0, 0.0)
            cells.append(f"{mean:+.2f} ± {half:.2f}" if pairs else "")
        rows.append([f"{name} - {other}", *cells])
    units = ["bits" if data == "text" else "points" for data in sets]
    return ["difference", *(f"{data}, {unit}" for data, unit in zip(sets, units, strict=True))], rows


def order(run: Run) -> tuple[Any, ...]:
    """Of rows: weight-tied first, each rival after the DEQ that it solves."""
    return (
        list(COLOURS).index(run["way"]),
        ("fixed", "magnitude", "scores").index(run["learn"]),
        run["solver"] != "deqfast",
    )


def series(record: dict[str, Any], data: str, axis: str, way: str) -> list[tuple[float, float, float]]:
    """(value, mean accuracy in %, half interval) along an axis, with the points of the main table."""
    runs = chosen(record["runs"], data=data, way=way, learn="fixed", solver="deqfast")
    main = chosen(runs, axis="main")
    swept = chosen(runs, axis=axis)
    if way == "tied" and axis == "density":
        points = {1.0: main}
    elif not swept or not main:
        return []
    else:
        everything = max(run["used"] for run in main)
        own = everything if axis == "samples" else main[0][axis]
        points = {own: main}
    for run in swept:
        points.setdefault(run["value"], []).append(run)
    return sorted((value, *interval([100 * run["accuracy"] for run in found])) for value, found in points.items())


def sweep_table(record: dict[str, Any], data: str, axis: str) -> tuple[list[str], list[list[str]]]:
    """Accuracies along an axis, a column a value; no rows where it was not swept."""
    lines = {way: series(record, data, axis, way) for way in LABELS}
    values = sorted({value for line in lines.values() for value, *_ in line})
    rows = []
    for way, line in lines.items():
        known = {value: f"{mean:.1f} ± {half:.1f}" for value, mean, half in line}
        if len(known) > 1 or (axis == "density" and way == "tied"):
            rows.append([LABELS[way], *(known.get(value, "") for value in values)])
    return [f"{data}: {AXES[axis]}", *(f"{value:g}" for value in values)], rows if len(values) > 1 else []


def storage_table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The density below which a sparse matrix is the faster one."""
    cells = {(cell["size"], cell["rows"]): cell for cell in record["storage"]["cells"]}
    sizes, rows = (sorted({key[i] for key in cells}) for i in (0, 1))
    lowest = min(record["storage"]["densities"])

    def said(cell: dict[str, Any]) -> str:
        found = cell["overtakes"]
        highest = max(record["storage"]["densities"])
        return f"< {lowest:g}" if found is None else f"> {highest:g}" if found == highest else f"{found:.2g}"

    table = [[f"{size} x {size}", *(said(cells[size, count]) for count in rows)] for size in sizes]
    return ["weight", *(f"{count} row" + ("s" if count > 1 else "") for count in rows)], table


def reversible_table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["dtype", "steps", "damping", "state", "gradient", "drift", "GradientWarning"]
    rows = []
    for row in record["reversible"]:
        errors = [f"{row[key]:.0e}" for key in ("state", "gradient", "drift")]
        rows.append([row["dtype"], str(row["steps"]), f"{row['damping']:g}", *errors, "yes" if row["warned"] else "no"])
    return header, rows


def memory_table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    found = record["memory"]
    rows = [[name, *(f"{n / 1e6:.2f}" for n in sizes)] for name, sizes in found["bytes"].items()]
    return ["MB, by steps", *map(str, found["depths"])], rows


def targets(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What was asked for, and whether it came out."""
    found = []
    for data in ("digits", "photographs"):
        runs = chosen(record["runs"], data=data, axis="main")
        tied, masked = chosen(runs, way="tied"), chosen(runs, way="masked", learn="fixed")
        mean, half = interval([100 * (a - b) for a, b in paired(masked, tied, "accuracy")])
        less = tied[0]["block"] / masked[0]["block"]
        what = (
            f"{data}: accuracy of density 0.25 against dense weight-tied, at {less:.1f}{TIMES} fewer multiply-adds of f"
        )
        measured = f"{mean:+.2f} ± {half:.2f} points, {len(tied)} seeds"
        found.append(target(what, "at most 0.5 points below, 4x fewer", measured, mean >= -0.5 and less >= 3.99))
    for data, ways in record["torchdeq"].items():
        for way, race in ways.items():
            runs = chosen(record["runs"], data=data, axis="main", way=way)
            rival = [run for run in runs if run["solver"] != "deqfast"]
            times = [a / b for a, b in paired(rival, chosen(runs, solver="deqfast"), "seconds")]
            what = f"{data}: training time of DEQ, {way}, by torchdeq ({race['fastest']}) over deqfast's"
            ratio = statistics.median(times)
            found.append(target(what, "above 1x", f"{ratio:.1f}{TIMES}", ratio > 1))
    exact = next(row for row in record["reversible"] if row["dtype"] == "float64" and row["steps"] == 20)
    met = exact["gradient"] <= 1e-10
    found.append(target("reversible gradient, float64, 20 steps", "1e-10", f"{exact['gradient']:.0e}", met))
    return found


def printed(record: dict[str, Any]) -> str:
    """All tables, as plain text."""
    parts = [columns(*main_table(record, data)) for data in dict.fromkeys(run["data"] for run in record["runs"])]
    parts.append(columns(*differences(record)))
    parts += [columns(header, rows) for header, rows in sweep_tables(record)]
    parts.append("Peak memory of a training step\n\n" + columns(*memory_table(record)))
    parts.append("Density below which a sparse matrix is faster than a dense one\n\n" + columns(*storage_table(record)))
    parts.append("unroll(reversible=True): relative errors\n\n" + columns(*reversible_table(record)))
    asked = [
        f"{'met   ' if t['met'] else 'MISSED'}  {t['what']}: {t['measured']} (target {t['target']})"
        for t in record["targets"]
    ]
    return "\n\n".join(["", *parts, "\n".join(asked)])


def sweep_tables(record: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    found = [sweep_table(record, data, axis) for data in ("digits", "photographs") for axis in AXES]
    return [(header, rows) for header, rows in found if rows]
