"""Where and how Anderson's columns are kept: memory and time a step: `python -m bench.history --out FILE.json`.

One sample of 4 or of 16 million float32 numbers. Memory: by how much the process grows at the most while a solve fills
its history, with the outputs that f returns. Time: of a step with f after that, one thread, processor time, rows in
turns within one run; the cores may have other work. Linux alone, whose kernel tells the sizes.

"host" keeps the columns in the host's memory (`history_device="cpu"`), with a CPU in the place of the device: what it
has beside them is what a device would hold. Its time is that of the same operations without a link.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import deqfast as dq
from bench import meta, timing
from bench.compat_training import Row, times
from deqfast.loop.state import SolverState
from deqfast.ops import hosted, pool
from deqfast.ops.plain import streamed
from deqfast.ops.plain.streamed import StreamedStep

CASES = ((4_000_000, 6), (4_000_000, 10), (16_000_000, 10))  # numbers, columns
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
# backend, where the columns are, how they are stored
WAYS = [
    *(("native", "device", dtype) for dtype in DTYPES),
    *(("torch", "device", dtype) for dtype in DTYPES),
    *(("torch", "pieces", dtype) for dtype in ("bfloat16", "int8")),
    *(("torch", "host", dtype) for dtype in ("float32", "bfloat16")),
]
LARGE = 10_000_000  # numbers from which the slowest ways are left out,
SLOW = (("torch", "device", "int8"), ("torch", "host", "float32"))  # which others tell enough of


@contextlib.contextmanager
def way_of(where: str) -> Iterator[None]:
    """Backend "torch" as a whole or piece by piece, whatever the size; and a CPU that may be a device."""
    most, shared = streamed.WIDE_MOST, hosted.SHARED
    streamed.WIDE_MOST = -1 if where == "pieces" else 1 << 60
    hosted.SHARED = () if where == "host" else shared
    try:
        yield
    finally:
        streamed.WIDE_MOST, hosted.SHARED = most, shared


def start(way: tuple[str, str, str], N: int, m: int) -> SolverState:
    """A solve that has no tolerance."""
    backend, where, dtype = way
    solver = dq.Anderson(m=m, history_dtype=DTYPES[dtype], history_device="cpu" if where == "host" else None)
    with way_of(where):
        state = solver.init(torch.zeros(1, N), rtol=0.0, backend=backend)
    assert isinstance(state.bound, StreamedStep) == (where != "device")
    return state


def nearly_free(N: int) -> Callable[[Any], Any]:
    """An f with outputs of its own."""
    b = torch.randn(1, N, generator=torch.Generator().manual_seed(0))
    rate = torch.linspace(-0.9, 0.99, 1000).repeat(-(-N // 1000))[:N]
    return partial(torch.addcmul, b, rate)


def step(state: SolverState, f: Callable[[Any], Any]) -> None:
    state.step(f(state.z))


_libc = ctypes.CDLL(None)
_MMAP_THRESHOLD = -3  # of mallopt: what is larger goes back to the kernel when it is freed


class Growth:
    """How much larger the process has been since it was made; what nobody uses is given back first."""

    def __init__(self) -> None:
        gc.collect()
        pool.clear()
        _libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._read("VmRSS")

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

    def bytes(self) -> int:
        return self._read("VmHWM") - self._before


def filled(way: tuple[str, str, str], N: int, m: int, f: Callable[[Any], Any]) -> SolverState:
    """A solve whose history is full."""
    state = start(way, N, m)
    for _ in range(m + 2):
        step(state, f)
    return state


def peak(way: tuple[str, str, str], N: int, m: int, f: Callable[[Any], Any]) -> int:
    """Bytes that such a solve takes at the most."""
    _libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
    growth = Growth()
    filled(way, N, m, f)
    most = growth.bytes()
    _libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
    return most


def case_rows(N: int, m: int, rounds: int) -> list[Row]:
    """Every way to keep so many columns of so many numbers."""
    f = nearly_free(N)
    ways = [way for way in WAYS if N < LARGE or way not in SLOW]
    grown = {way: peak(way, N, m, f) for way in ways}
    calls = {str(way): partial(step, filled(way, N, m, f), f) for way in ways}
    taken = timing.alternate(calls, rounds=rounds, least_rounds=3, budget=15.0, clock=time.process_time)
    rows = []
    for way in ways:
        backend, where, dtype = way
        row: Row = {"N": N, "m": m, "backend": backend, "where": where, "dtype": dtype}
        row["state_bytes"], row["history_bytes"] = 4 * N, 2 * m * N * DTYPES[dtype].itemsize
        row["peak_bytes"] = grown[way]
        row["device_bytes"] = grown[way] - (row["history_bytes"] if where == "host" else 0)
        rows.append({**row, **times(taken[str(way)])})
    return rows


def told(row: Row) -> str:
    label = f"{row['N']:>12,} m={row['m']:<3d}{row['backend']:<8s}{row['where']:<8s}{row['dtype']:<10s}"
    sizes = "".join(f"{row[key] / 2**20:>10,.0f} MB" for key in ("history_bytes", "peak_bytes", "device_bytes"))
    return f"{label}{row['ms']:>10,.1f} ms{sizes}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.history", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one small state: a trial, not a measurement")
    options = parser.parse_args(arguments)
    bystanders, rows = meta.Bystanders(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        case_rows(100_000, 2, 3)  # what is made once in a process is made here
        for N, m in ((400_000, 4),) if options.quick else CASES:
            new = case_rows(N, m, 3 if options.quick else 9)
            rows += new
            for row in new:
                print(told(row), flush=True)
        about = meta.describe("OMP_NUM_THREADS=1 python -m bench.history", bystanders)
    finally:
        torch.set_num_threads(threads)
    record = {"kind": "history", "quick": options.quick, "clock": "processor", "rows": rows, "meta": about}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
