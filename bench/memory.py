"""Peak memory of a training step over N and m: `python -m bench.memory --out FILE.json`; Linux only.

What the system says the process held at most during a step, less what it held before, in sizes of the state. f keeps
two states for its own backward, whichever solver calls it. One process; the peak is reset before every step, freed
memory is given back first, and the pool of histories is emptied, so that every step pays for its own. The C library is
told to give large blocks back when they are freed: left alone it keeps many of them, which doubles every row.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deqfast as dq
from bench import meta
from deqfast.ops import pool

M_MMAP_THRESHOLD, BLOCK = -3, 1 << 18  # of mallopt
SIZES = (1 << 18, 1 << 19, 1 << 20)  # numbers of a state, in 16 samples
COLUMNS = (4, 6, 10, 20)
EVALUATIONS = 30
SAMPLES = 16
Step = Callable[[Tensor, Tensor], None]


def held(key: str) -> int:
    """Bytes by a line of /proc/self/status."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def peak(step: Callable[[], None]) -> int:
    """Bytes that a step held at most beside what was there."""
    pool.clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = held("VmRSS")
    step()
    return held("VmHWM") - before


def f_of(a: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.tanh(a * z + x)


def own(solver: Any, backward: Any = None) -> Step:
    """By ``fixed_point``, exactly EVALUATIONS in both passes."""
    backward = backward or dq.Implicit(rtol=0.0, max_iter=EVALUATIONS)

    def step(a: Tensor, x: Tensor) -> None:
        solution = dq.fixed_point(
            f_of(a, x), torch.zeros_like(x), solver=solver, rtol=0.0, max_iter=EVALUATIONS, backward=backward
        )
        solution.z.sum().backward()

    return step


def torchdeqs(name: str, m: int) -> Step:
    """By torchdeq's module; the columns of its backward solve are those that it has."""
    from torchdeq import get_deq

    deq = get_deq(
        f_solver=name, b_solver=name, f_max_iter=EVALUATIONS, b_max_iter=EVALUATIONS, f_tol=0.0, b_tol=0.0, ift=True
    )
    options = {"m": m} if name == "anderson" else {"LBFGS_thres": m}

    def step(a: Tensor, x: Tensor) -> None:
        z = deq(f_of(a, x), torch.zeros_like(x), solver_kwargs=options)[0][-1]
        z.sum().backward()

    return step


def unrolled(a: Tensor, x: Tensor) -> None:
    """Plain iteration under autograd."""
    f, z = f_of(a, x), torch.zeros_like(x)
    for _ in range(EVALUATIONS):
        z = f(z)
    z.sum().backward()


def rows(m: int) -> dict[str, Step]:
    """Steps by row name; a solver that keeps no columns is there for every m."""
    return {
        "deqfast Anderson(m)": own(dq.Anderson(m=m)),
        "deqfast Anderson(m, history_dtype=float32)": own(dq.Anderson(m=m, history_dtype=torch.float32)),
        "deqfast Broyden(memory=m)": own(dq.Broyden(memory=m)),
        "deqfast Picard()": own(dq.Picard()),
        "torchdeq anderson": torchdeqs("anderson", m),
        "torchdeq broyden": torchdeqs("broyden", m),
        "unrolled by autograd": unrolled,
    }


def measure(sizes: Sequence[int], columns: Sequence[int]) -> list[dict[str, Any]]:
    """Every size at m = 6, every m at the largest size."""
    cases = [(n, 6) for n in sizes] + [(sizes[-1], m) for m in columns if m != 6]
    found = []
    for numbers, m in cases:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(SAMPLES, numbers // SAMPLES, generator=g)
        a = torch.full((numbers // SAMPLES,), 0.9, requires_grad=True)
        for name, step in rows(m).items():
            step(a.detach().requires_grad_(), x[:1].clone())  # libraries load, threads start
            most = peak(lambda step=step, a=a, x=x: step(a, x))  # type: ignore[misc]
            a.grad = None
            found.append({"row": name, "numbers": numbers, "m": m, "bytes": most, "states": most / (4 * numbers)})
            print(found[-1], flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="small states: a trial, not a measurement")
    options = parser.parse_args(arguments)
    bystanders = meta.Bystanders()
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, BLOCK)
    sizes, columns = ((1 << 18,), (4, 6)) if options.quick else (SIZES, COLUMNS)
    found = measure(sizes, columns)
    record = {
        "kind": "memory",
        "quick": options.quick,
        "meta": meta.describe("python -m bench.memory", bystanders),
        "rows": found,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
