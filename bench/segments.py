"""Samples of unequal length as `segments=`: `python -m bench.segments --out FILE.json`.

Segments of one length against the batch that they are; of unequal lengths against one block padded to the longest, as
they were solved at first, and against rows as samples. Equal evaluations of a nearly free f.

One thread, processor time, rows in turns within one run: the cores may have other work. A block that takes more than
1 GB of history is not solved; its memory stands there all the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deqfast as dq
from bench import meta, targets, timing
from bench.compat_training import Row, held, times
from deqfast.loop.state import SolverState
from deqfast.ops import grouped
from deqfast.ops.layout import Layout, layout_of
from deqfast.ops.workspace import Stopping

WIDTH = 16
EVALUATIONS = 20
LARGEST_BLOCK = 1 << 30  # bytes of history
RULE = Stopping(0.0, max_iter=EVALUATIONS)
SOLVERS = {"anderson": dq.Anderson(), "broyden": dq.Broyden(EVALUATIONS - 1)}


def lengths_of(count: int, low: int, high: int) -> list[int]:
    g = torch.Generator().manual_seed(count)
    drawn: list[int] = torch.randint(low, high + 1, (count,), generator=g).tolist()
    return drawn


CASES = {
    "100 of 20 rows": [20] * 100,
    "32 of 10 to 60 rows": lengths_of(32, 10, 60),
    "200 of 5 to 100 rows": lengths_of(200, 5, 100),
    "1 of 1,000 rows, 99 of 10": [1_000] + [10] * 99,
    "1 of 10,000 rows, 999 of 10": [10_000] + [10] * 999,
}
QUICK = ("100 of 20 rows", "1 of 1,000 rows, 99 of 10")


def solve(f: Callable[[Any], Any], solver: Any, backend: str, layout: Layout, z0: Tensor) -> SolverState:
    """To the last evaluation, with the layout that it is told."""
    state = SolverState(solver, z0, RULE, backend=backend, layout=layout)
    with torch.no_grad():
        while not state.done:
            state.step(f(state.z))
    state.release()
    return state


def history_bytes(solver: Any, layout: Layout) -> int:
    """Of a solve; nothing is allocated for it."""
    columns, size = (2 * solver.m, 2) if isinstance(solver, dq.Anderson) else (solver.memory, 4)
    groups = [part for _, part in layout.parts] or [layout]
    return sum(part.B * part.N for part in groups) * columns * size


def case_rows(name: str, lengths: list[int], backend: str, rounds: int) -> list[Row]:
    """Every way to solve one batch of segments."""
    bounds = [0, *accumulate(lengths)]
    z0 = torch.zeros(bounds[-1], WIDTH)
    g = torch.Generator().manual_seed(0)
    a, b = torch.empty(bounds[-1], 1).uniform_(-0.9, 0.95, generator=g), torch.randn(bounds[-1], WIDTH, generator=g)
    f = partial(torch.addcmul, b, a)
    pads = grouped.pads(backend, z0)
    ways: dict[str, tuple[Callable[[Any], Any], Layout, Tensor]] = {
        "segments=": (f, layout_of(z0, 1, bounds, pads=pads), z0),
        "padded to the longest": (f, layout_of(z0, 1, bounds), z0),
        "rows are samples": (f, Layout(z0), z0),
    }
    equal = len(set(lengths)) == 1
    if equal:
        shape = (len(lengths), lengths[0])
        start = z0.unflatten(0, shape)
        dense = partial(torch.addcmul, b.unflatten(0, shape), a.unflatten(0, shape))
        ways["padded to the longest"] = (dense, Layout(start), start)
        ways = {"a batch" if way == "padded to the longest" else way: told for way, told in ways.items()}
    rows = []
    for method, solver in SOLVERS.items():
        fits = {way: told for way, told in ways.items() if history_bytes(solver, told[1]) <= LARGEST_BLOCK}
        calls = {way: partial(solve, f, solver, backend, layout, z) for way, (f, layout, z) in fits.items()}
        taken = timing.alternate(calls, rounds=rounds, budget=8.0, clock=time.process_time)
        for way, (_, layout, _) in ways.items():
            row: Row = {"case": name, "backend": backend, "solver": method, "row": way, "segments": len(lengths)}
            row.update(groups=len(layout.parts) or 1, history_bytes=history_bytes(solver, layout))
            row["state_history_bytes"] = history_bytes(solver, Layout(z0.view(1, -1)))
            if way in taken:
                row.update(times(taken[way]))
            rows.append(row)
        rest = [way for way in taken if way not in ("segments=", "rows are samples")]
        if rest:
            found = timing.ratio(taken["segments="].seconds, taken[rest[0]].seconds)
            asked = targets.SEGMENTS_EQUAL if equal else targets.SEGMENTS_UNEQUAL.get(name)
            first = rows[-len(ways)]
            if asked is None:
                first["over_padded"] = vars(found)
            else:
                first["held"] = held(f"segments= / {rest[0]}", found, asked, at_most=True)
        first = rows[-len(ways)]
        first["held_memory"] = first["history_bytes"] / first["state_history_bytes"]
    return rows


def told(row: Row) -> str:
    took = f"{row['ms']:>10,.3f} ms" if "ms" in row else f"{'not solved':>13s}"
    label = ", ".join(str(row[key]) for key in ("case", "backend", "solver", "row"))
    line = f"{label:<80s}{took}{row['history_bytes'] / 2**20:>10,.1f} MB"
    if "held" in row:
        line += f"  {row['held']['what']}: {row['held']['value']:.3f} ({'met' if row['held']['met'] else 'MISSED'})"
    elif "over_padded" in row:
        line += f"  over padded: {row['over_padded']['ratio']:.3f}"
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.segments", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="few cases and rounds: a trial, not a measurement")
    parser.add_argument("--backends", nargs="+", default=["native", "torch"])
    options = parser.parse_args(arguments)
    bystanders, rows = meta.Bystanders(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in QUICK if options.quick else CASES:
            for backend in options.backends:
                new = case_rows(name, CASES[name], backend, 3 if options.quick else 25)
                rows += new
                for row in new:
                    print(told(row), flush=True)
        about = meta.describe("OMP_NUM_THREADS=1 python -m bench.segments", bystanders)
    finally:
        torch.set_num_threads(threads)
    record = {"kind": "segments", "quick": options.quick, "clock": "processor", "rows": rows, "meta": about}
    record["evaluations"] = EVALUATIONS
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
