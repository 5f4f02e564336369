"""The GPU section of docs/benchmarks.md, from the newest bench/results/*/gpu.json of a run on a device."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import targets
from bench.report.markdown import number, table, verdict

Record = Mapping[str, Any]


def newest(folder: Path) -> Record | None:
    """The newest full run on a device, else the newest quick one; dry runs are none."""
    found = []
    for path in folder.glob("*/gpu.json"):
        record = json.loads(path.read_text())
        if record.get("kind") == "gpu" and not record["dry"]:
            found.append((not record["quick"], record["meta"]["date"], record))
    return max(found, key=lambda run: run[:2])[2] if found else None


def target_rows(record: Record) -> list[list[str]]:
    """Every target and what was measured for it."""
    rows: list[list[str]] = []
    for row in [*record.get("bandwidth", []), *record.get("joint", [])]:
        if row["floor_bytes"] >= targets.GPU_BANDWIDTH_FROM or record["dry"]:
            rows.append(
                [f"{_name(row)}: of a copy's bandwidth", _held(row, "copy_fraction", targets.GPU_COPY_FRACTION)]
            )
    for row in record.get("latency", []):
        limit = targets.GPU_SMALL_STEP_US.get(row["what"])
        if limit is not None:
            rows.append([f"{_name(row)}: us a step", _held(row, "us", limit, at_most=True)])
            launches = _held(row, "launches", targets.GPU_SMALL_STEP_LAUNCHES, at_most=True)
            rows.append([f"{_name(row)}: launches a step", launches])
    loop = record.get("device_loop")
    if loop is not None:
        told = _held(loop, "us_step", targets.GPU_DEVICE_LOOP_US, at_most=True)
        syncs = loop.get("host_syncs", "not measured")
        rows.append([f'mode="{loop["mode"]}", {loop["B"]} x {loop["N"]}: us a step beside f', f"{told}; {syncs} syncs"])
    rows += _solve_targets(record)
    rows += _history_targets(record)
    for entry in record.get("training", []):
        wanted = targets.GPU_TRAINING.get(entry["model"])
        if wanted is not None or record["dry"]:
            ratio, told = _training_ratio(entry["rows"])
            rows.append([f"training step, {entry['model']}: torchdeq / deqfast{told}", verdict(ratio, wanted or 1.0)])
    return rows


def _held(row: Record, key: str, target: float, *, at_most: bool = False) -> str:
    why = row.get("skipped") or (row.get("why") if row.get(key) is None else None)
    return verdict(row.get(key), target, at_most=at_most) + (f": {why}" if why else "")


def _name(row: Record) -> str:
    return f"{row['what']}, {row['history']} history, {row['B']} x {row['N']}, {row['backend']}"


def fastest(rows: Mapping[str, Record], prefix: str) -> tuple[str, Record] | None:
    """The quickest row whose name begins with ``prefix``."""
    found = [(name, row) for name, row in rows.items() if name.startswith(prefix)]
    return min(found, key=lambda item: item[1]["us"]) if found else None


def _solve_targets(record: Record) -> list[list[str]]:
    rows = []
    for entry in record.get("solves", []):
        size, facts = entry["size"], entry["rows"]
        for width in ("float32", "bfloat16"):
            own = fastest(facts, f"Type II m=6, {width}")
            aims = {
                "torchdeq anderson": targets.GPU_TORCHDEQ.get(size) if width == "float32" else None,
                "torch.compile": targets.GPU_COMPILED.get(size, {}).get(width),
            }
            for rival, wanted in aims.items():
                if wanted is None:
                    continue
                if own is None or rival not in facts:
                    told = verdict(None, wanted) + f": {entry['skipped'].get(rival, 'no row of deqfast')}"
                else:
                    told = verdict(facts[rival]["us"] / own[1]["us"], wanted)
                    if own[1]["residual"] > max(2 * facts[rival]["residual"], 1e-6):
                        told += ", but a worse residual: no win"
                label = own[0] if own else f"Type II m=6, {width}"
                rows.append([f"solve of {size}: {rival} / {label}", told])
    return rows


def _history_targets(record: Record) -> list[list[str]]:
    by_width = {row["history"]: row for row in record.get("histories", []) if "us" in row}
    full = by_width.get("float32")
    rows = []
    for width, row in by_width.items():
        if full is None or width == "float32":
            continue
        name = f"{row['B']} x {row['N']}, m={row['m']}, {width} history: float32 / {width}"
        memory = full["history_bytes"] / row["history_bytes"]
        # a scale of four bytes for every 1,024 numbers is part of what int8 takes
        rows.append([f"{name}, memory", verdict(round(memory, 1), targets.GPU_HISTORY_MEMORY[width])])
        rows.append([f"{name}, time of a step", verdict(full["us"] / row["us"], targets.GPU_HISTORY_SPEED[width])])
    return rows


def _training_ratio(rows: Mapping[str, Record]) -> tuple[float | None, str]:
    own, other = fastest(rows, "deqfast"), fastest(rows, "torchdeq")
    if own is None or other is None:
        return None, ""
    return other[1]["us"] / own[1]["us"], f" ({other[0]} / {own[0]})"


def section(record: Record | None) -> list[str]:
    """Markdown parts of the GPU section."""
    if record is None:
        return ["## On a GPU", "No run on a GPU has been made; [gpu-notes.md](gpu-notes.md) says how to make one."]
    device = record["device"]
    versions = ", ".join(f"{name} {device[name]}" for name in ("torch", "cuda", "triton", "driver") if device.get(name))
    parts = ["## On a GPU", f"`{record['meta']['command']}` on {device['name']}, {record['meta']['date']}; {versions}."]
    if record["quick"]:
        parts.append("**A `--quick` trial, not a measurement.**")
    bandwidth = record.get("copy_bytes_per_second")
    if bandwidth:
        parts.append(f"A copy moves {number(bandwidth / 1e12)} TB/s here, read plus written.")
    held = target_rows(record)
    met = sum("(met" in row[1] for row in held)
    parts += [f"{met} of {len(held)} targets met.", table(["figure", "measured"], held)]
    parts += _step_tables(record)
    for key, title, name in (("solves", "Solve of", "size"), ("training", "Training step,", "model")):
        for entry in record.get(key, []):
            parts += _wall_table(entry, f"### {title} {entry[name]}")
    parts += [f"Not measured: {what} ({why})." for what, why in record["without"].items()]
    parts += [f"Not there: {name} ({why})." for name, why in record["missing_backends"].items()]
    return parts


def _step_tables(record: Record) -> list[str]:
    rows: list[Sequence[str]] = []
    for row in [row for name in ("latency", "bandwidth", "histories", "joint") for row in record.get(name, [])]:
        if "us" not in row:
            rows.append([_name(row), row["skipped"], "", "", ""])
            continue
        launches = "-" if row["launches"] is None else number(row["launches"])
        spread = f"{number(row['us'])} ({number(row['us_low'])} to {number(row['us_high'])})"
        rows.append([_name(row), spread, launches, number(row["floor_bytes"] / 1e6), number(row["copy_fraction"])])
    header = ["step", "us of device time (quartiles)", "launches", "floor, MB", "of a copy's bandwidth"]
    return ["### Steps", table(header, rows)] if rows else []


def _wall_table(entry: Record, title: str) -> list[str]:
    quality = "residual" if "size" in entry else "gradient_error"
    rows: Iterable[Sequence[str]] = [
        [name, f"{number(row['us'])} ({number(row['us_low'])} to {number(row['us_high'])})", f"{row[quality]:.0e}"]
        for name, row in sorted(entry["rows"].items(), key=lambda item: item[1]["us"])
    ]
    parts = [title, table(["row", "us of wall time (quartiles)", quality.replace("_", " ")], rows)]
    return parts + [f"Not run: {name} ({why})." for name, why in entry["skipped"].items()]
