"""Markdown out of figures: tables, numbers, what a figure is held against, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]

CROWDED = 0.15  # cores in other programs' hands above which times are not to be trusted


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def provenance(meta: Results, *, of_the_processor: bool = False) -> str:
    """What was run on what; times of the processor, of one thread, stand where other programs were busy."""
    packages = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    busy = meta.get("busy_elsewhere")
    alone = "" if busy is None else f" Other programs kept {busy:.2f} cores busy meanwhile."
    if busy is not None and busy > CROWDED and not of_the_processor:
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
