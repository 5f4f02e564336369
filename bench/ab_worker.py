"""One side of `bench.ab`: `python ab_worker.py CHECKOUT THREADS` times what it is asked, with CHECKOUT's deqfast.

A request and an answer are a line of JSON each: {"open": case} builds a case and tells what it computed,
{"calls": n} times n calls of it. Only public API, so that checkouts of any age can be compared; maps and numbers come
from the benchmarks beside this file, whichever deqfast is timed.
"""

from __future__ import annotations

import gc
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

CHECKOUT = Path(sys.argv[1]).resolve() if __name__ == "__main__" else Path(__file__).parents[1]
sys.path[0] = str(CHECKOUT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import deqfast as dq  # noqa: E402

sys.path[0] = str(Path(__file__).parents[1])

from bench import free  # noqa: E402

SIZES = [size for size in free.SIZES if size != "4x365000"]
SOLVERS: dict[str, dq.Anderson | dq.Broyden] = {
    "Anderson()": dq.Anderson(),
    "Anderson(m=6, type=2)": dq.Anderson(m=6, type=2),
    "Broyden()": dq.Broyden(),
}
PRICE = (64, 128)  # of a solve: a size at which one evaluation costs next to nothing
FED = 4  # outputs of f in turn, where steps are timed alone
Call = Callable[[], Tensor]


def steps(solver: Any, size: str, evaluations: int) -> Call:
    """A loop of one's own from its state on, without f: the outputs were drawn beforehand."""
    generator = torch.Generator().manual_seed(0)
    z0, *fed = (torch.randn(free.SIZES[size], generator=generator) for _ in range(1 + FED))

    def call() -> Tensor:
        state = solver.init(z0, rtol=0.0, atol=0.0, backend="native")
        for k in range(evaluations):
            state.step(fed[k % FED])
        assert bool(state.running.all()), "a sample that stopped is no work"
        z: Tensor = state.z
        return z

    return call


def solve(solver: Any, size: str, evaluations: int) -> Call:
    """A whole solve with a nearly free f."""
    f, z0 = free.diagonal_map(*free.SIZES[size])
    options: dict[str, Any] = {"solver": solver, "rtol": 0.0, "atol": 0.0, "max_iter": evaluations}

    def call() -> Tensor:
        sol = dq.fixed_point(f, z0, backward="none", backend="native", **options)
        assert sol.nfe == evaluations
        z: Tensor = sol.z
        return z

    return call


def price(differentiated: bool) -> Call:
    """A solve of one evaluation, which meets its tolerance, and the implicit backward that follows, of one product."""
    a, b = free.coefficients(*PRICE)
    a, z0 = a.clamp(-0.9, 0.9), torch.zeros_like(b)
    x = b.clone().requires_grad_(differentiated)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.addcmul(x, a, z)

    def call() -> Tensor:
        backward = dq.Implicit() if differentiated else "none"
        sol = dq.fixed_point(f, z0, (x,), rtol=2.0, max_iter=1, backward=backward, backend="native")
        z: Tensor = sol.z
        if not differentiated:
            return z
        x.grad = None
        z.backward(b)
        assert x.grad is not None
        return x.grad

    return call


def cases() -> Iterator[tuple[str, Callable[[], Call], bool]]:
    """(name, what builds it, whether autograd is on)."""
    for differentiated in (False, True):
        what = "forward and implicit backward" if differentiated else "forward"
        yield f"one evaluation, {what}, {PRICE[0]}x{PRICE[1]}", partial(price, differentiated), differentiated
    for size in SIZES:
        for name, solver in SOLVERS.items():
            evaluations = free.evaluations(size, "broyden" if name == "Broyden()" else "anderson")
            yield f"steps, {name}, {size}", partial(steps, solver, size, evaluations), False
            yield f"solve, {name}, {size}", partial(solve, solver, size, evaluations), False


def timed(call: Call, calls: int) -> float:
    """Median seconds of a call; of several, one more goes first, untimed, because the other side had the caches."""
    if calls > 1:
        call()
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def serve(threads: int) -> None:
    """Answer requests until there are none."""
    out, sys.stdout = sys.stdout, sys.stderr
    if threads:
        torch.set_num_threads(threads)
    known = {name: (build, grad) for name, build, grad in cases()}
    call: Call | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "open" in request:
            call = None  # the last case's memory goes first
            gc.collect()
            build, grad = known[request["open"]]
            torch.set_grad_enabled(grad)
            call = build()
            found = call().detach().contiguous().view(torch.uint8).numpy().tobytes()
            answer: dict[str, Any] = {"digest": hashlib.sha256(found).hexdigest(), "seconds": timed(call, 1)}
        else:
            assert call is not None
            gc.disable()
            answer = {"seconds": timed(call, request["calls"])}
            gc.enable()
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    assert Path(dq.__file__).parents[1] == CHECKOUT, f"imported {dq.__file__}, not {CHECKOUT}'s"
    serve(int(sys.argv[2]))
