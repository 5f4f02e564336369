"""Where the time of a solve goes, size by size: `python -m bench.breakdown`.

For each size and method: one evaluation of a whole solve, f's own part of it, what a solve costs once (the time of a
solve of one evaluation), and the step alone.  Beside them the same floor bytes at the speed of a plain copy between
buffers of the size that the step touches: in cache for the middle sizes, in memory for the large ones.  What is left
of the step above that line is arithmetic and latency; where the step reaches it, only moving fewer bytes can help.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import deqfast as dq
from bench import floor, free, meta, targets, timing
from bench.peers import Map

SOLVERS: dict[str, tuple[dq.Anderson | dq.Broyden, int, int]] = {  # solver, columns, bytes a history number
    targets.LIKE_FOR_LIKE: (dq.Anderson(m=6, type=2, history_dtype=torch.float32), 6, 4),
    targets.BFLOAT16: (dq.Anderson(m=6, type=2, history_dtype=torch.bfloat16), 6, 2),
    targets.DEFAULT: (dq.Anderson(), 10, 2),
}
STEADY = 14  # steps after which every history is full


def step_seconds(solver: dq.Anderson | dq.Broyden, f: Map, z0: torch.Tensor, evaluations: int) -> float:
    """Median seconds of `state.step` once the history is full."""
    state = solver.init(z0, rtol=0.0)
    taken = []
    for k in range(evaluations):
        fz = f(state.z)
        start = time.perf_counter()
        state.step(fz)
        if k >= STEADY:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def copy_bandwidth(nbytes: int) -> float:
    """Bytes a second, read plus written, of a copy between buffers of nbytes in all."""
    source = torch.ones(max(nbytes // 8, 1))
    target = torch.zeros_like(source)
    repeat = max(1, int(2e7 / nbytes))
    taken = []
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(repeat):
            target.copy_(source)
        taken.append((time.perf_counter() - start) / repeat)
    return 2 * source.numel() * 4 / statistics.median(taken)


def measure(size: str, row: str) -> dict[str, Any]:
    """Microseconds an evaluation, by part."""
    solver, columns, h = SOLVERS[row]
    B, N = free.SIZES[size]
    columns = min(columns, N)
    f, z0 = free.diagonal_map(B, N)
    evaluations = free.evaluations(size, "anderson")

    def solve(limit: int) -> Callable[[], object]:
        return lambda: dq.fixed_point(f, z0, solver=solver, rtol=0.0, max_iter=limit)

    taken = timing.alternate({"solve": solve(evaluations), "once": solve(1), "f": lambda: f(z0)}, rounds=9, budget=4.0)
    with timing.no_collection():
        step = statistics.median(step_seconds(solver, f, z0, evaluations) for _ in range(5))
    step_bytes = floor.step_bytes(B * N, columns, h, mixed=row == targets.DEFAULT)
    touched = B * N * (5 * 4 + 2 * columns * h)
    return {
        "size": size,
        "row": row,
        "us": 1e6 * taken["solve"].median / evaluations,
        "us_f": 1e6 * taken["f"].median,
        "us_once": 1e6 * taken["once"].median,
        "us_step": 1e6 * step,
        "floor_bytes": step_bytes,
        "touched_MB": touched / 2**20,
        "us_floor_at_copy_speed": 1e6 * step_bytes / copy_bandwidth(touched),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.breakdown", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    bystanders = meta.Bystanders()
    rows = []
    with torch.no_grad():
        for size in free.SIZES:
            for row in SOLVERS:
                rows.append(measure(size, row))
                print(json.dumps(rows[-1]), flush=True)
    record = {"kind": "breakdown", "meta": meta.describe("python -m bench.breakdown", bystanders), "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
