"""Spread samples and consensus over gloo processes on this machine: `python -m bench.scaling --out FILE.json`.

Pools of 1, 2 and 4 processes stand ready and take turns; a pool that waits takes no processor time. A single process
has as many threads as the machine has cores, the others one each. f is elementwise and local, so that what is measured
is the step and its all-reduce. Beside them, the all-reduce alone, small and large, and a copy between buffers, all
processes at once: bench/scaling_model.py predicts the other rows from these.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import deqfast as dq
from bench import meta, scaling_model, targets, timing
from bench.compat_training import held

STRONG, WEAK = 8_000_000, 2_000_000  # numbers of the one sample; a rank
CONSENSUS = (32, 61_440)
EVALUATIONS, M = 20, 10
POOLS = (1, 2, 4)
SHRINK = 64  # a quick run
ROWS = ("strong", "weak", "all-reduce", "all-reduce, large", "stream", "together", "consensus")


def _solve(rows: int, numbers: int, evaluations: int, **options: Any) -> Callable[[], object]:
    x = torch.linspace(0, 1, numbers).expand(rows, numbers).contiguous()
    z0 = torch.zeros(rows, numbers)
    slope = torch.linspace(0.2, 0.9, numbers)

    def f(z: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(x, slope, z)

    def run() -> object:
        return dq.fixed_point(
            f, z0, solver=dq.Anderson(m=M), rtol=0.0, max_iter=evaluations, backward="none", **options
        )

    return run


def calls(size: int, quick: bool) -> dict[str, Callable[[], object]]:
    """What a pool of so many processes can be asked to do."""
    shrink = SHRINK if quick else 1
    strong, weak = STRONG // shrink // size, WEAK // shrink
    rows, numbers = CONSENSUS[0], CONSENSUS[1] // shrink
    world = dist.group.WORLD
    buffer = torch.zeros(4 * M + 8, dtype=torch.float64)
    large = torch.zeros(scaling_model.LARGE, dtype=torch.float64)
    source = torch.ones(scaling_model.STREAM // shrink)
    copy = torch.empty_like(source)
    spread: dict[str, Any] = {"group": world}
    found = {
        "strong": _solve(1, strong, EVALUATIONS, **spread),
        "weak": _solve(1, weak, EVALUATIONS, **spread),
        "all-reduce": lambda: [dist.all_reduce(buffer) for _ in range(EVALUATIONS)],
        "all-reduce, large": lambda: [dist.all_reduce(large) for _ in range(EVALUATIONS)],
        "stream": lambda: [copy.copy_(source) for _ in range(EVALUATIONS)],
        "together": _solve(rows, numbers, EVALUATIONS, stop="all"),
        "consensus": _solve(rows, numbers, EVALUATIONS, stop="consensus"),
    }
    if size == 1:
        found |= {"alone, strong": _solve(1, strong, EVALUATIONS), "alone, weak": _solve(1, weak, EVALUATIONS)}
    return found


def worker(rank: int, size: int, store: str, quick: bool) -> None:
    """Do what each line of the input names, all ranks at once; the first one says how long it took."""
    torch.set_num_threads((os.cpu_count() or 1) if size == 1 else 1)
    limit = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    known = calls(size, quick)
    for line in sys.stdin:
        run = known[line.strip()]
        dist.barrier()
        begin = time.perf_counter()
        run()
        dist.barrier()
        if rank == 0:
            print(time.perf_counter() - begin, flush=True)
    dist.destroy_process_group()


class Pool:
    """Processes that wait for the name of what to do."""

    def __init__(self, size: int, folder: str, quick: bool) -> None:
        command = [sys.executable, "-m", "bench.scaling", "--worker", str(size), f"{folder}/{size}"]
        env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        env.pop("OMP_NUM_THREADS", None)
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), *(["--quick"] if quick else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if rank == 0 else None,
                text=True,
                env=env,
            )
            for rank in range(size)
        ]

    def run(self, name: str) -> float:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(name + "\n")
            process.stdin.flush()
        assert self._processes[0].stdout is not None
        return float(self._processes[0].stdout.readline())

    def end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(timeout=60)


def measure(rounds: int, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Microseconds an evaluation of every row, in turns; and what is held against targets."""
    with tempfile.TemporaryDirectory() as folder:
        pools = {size: Pool(size, folder, quick) for size in POOLS}
        rows = [(size, name) for size in POOLS for name in ROWS]
        rows += [(1, "alone, strong"), (1, "alone, weak")]
        for size, name in rows:
            pools[size].run(name)  # memory is touched, caches are warm
        seconds: dict[tuple[int, str], list[float]] = {row: [] for row in rows}
        for i in range(rounds):
            turn = i % len(rows)
            for row in rows[turn:] + rows[:turn]:
                seconds[row].append(pools[row[0]].run(row[1]))
        for pool in pools.values():
            pool.end()
    found = []
    for (size, name), taken in seconds.items():
        told = timing.Timing(taken)
        low, high = told.quartiles
        scale = 1e6 / EVALUATIONS
        found.append(
            {"processes": size, "row": name, "us": told.median * scale, "us_low": low * scale, "us_high": high * scale}
        )
    # The all-reduce's own latency is allowed for: one process has none.
    alone = [a + b for a, b in zip(seconds[1, "alone, strong"], seconds[2, "all-reduce"], strict=True)]
    spread = timing.ratio(seconds[2, "strong"], alone)
    agreed = timing.ratio(seconds[2, "consensus"], seconds[2, "together"])
    kept = [
        held("a spread sample on 2 processes / one process and the all-reduce", spread, targets.SPREAD, at_most=True),
        held('stop="consensus" / stop="all", 2 processes', agreed, targets.CONSENSUS, at_most=True),
    ]
    return found, kept


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--worker", nargs=3, metavar=("SIZE", "STORE", "RANK"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        size, store, rank = args.worker
        return worker(int(rank), int(size), store, args.quick)
    bystanders = meta.Bystanders()
    rows, held = measure(args.rounds, args.quick)
    found = {
        "kind": "scaling",
        "quick": args.quick,
        "held": held,
        "meta": meta.describe("python -m bench.scaling", bystanders),
        "strong": STRONG,
        "weak": WEAK,
        "consensus": CONSENSUS,
        "m": M,
        "evaluations": EVALUATIONS,
        "stream": scaling_model.STREAM // (SHRINK if args.quick else 1),
        "shrink": SHRINK if args.quick else 1,
        "rows": rows,
    }
    text = json.dumps(found, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n")
    for row in rows:
        print(f"{row['processes']} {row['row']:17} {row['us']:10.1f} us ({row['us_low']:.1f} to {row['us_high']:.1f})")


if __name__ == "__main__":
    main()
