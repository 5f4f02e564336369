"""Whole solves by wall time against torchdeq and against torch.compile, and the price of a step in mode="device"."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import deqfast as dq
from bench import free, peers, rival, timing
from bench.gpu.device import Call, Place
from bench.gpu.steps import F32

EVALUATIONS = 30
LIKE = {"solver": dq.Anderson(m=6, type=2, history_dtype=F32, evict="oldest"), "label": "Type II m=6, float32"}
NARROW = {"solver": dq.Anderson(m=6, type=2, history_dtype=torch.bfloat16, evict="oldest"),
          "label": "Type II m=6, bfloat16"}  # fmt: skip
DEFAULT = {"solver": dq.Anderson(), "label": "Anderson()"}
BROYDEN = {"solver": dq.Broyden(), "label": "Broyden()"}


def sizes(place: Place) -> dict[str, tuple[int, int]]:
    names = ("64x1024", "32x61440", "20000x8")
    return {name: free.SIZES[name] for name in names} if place.cuda else {"4x32": (4, 32), "50x4": (50, 4)}


def diagonal_map(place: Place, B: int, N: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """f(z) = a z + b as one kernel, on the device."""
    a, b = (t.to(place.device) for t in free.coefficients(B, N))
    return (lambda z: torch.addcmul(b, a, z)), torch.zeros_like(b)


def modes(place: Place, backend: str) -> tuple[str, ...]:
    if not place.cuda:
        return ("loop",)
    return ("loop", "graph", "device") if backend == "native" else ("loop", "graph")


def solve(f: Any, z0: Tensor, solver: Any, backend: str, mode: str, evaluations: int = EVALUATIONS) -> dq.Solution:
    with torch.no_grad():
        return dq.fixed_point(
            f, z0, solver=solver, rtol=0.0, max_iter=evaluations, backward="none", backend=backend, mode=mode
        )


class CompiledRival:
    """bench/rival.py's step by torch.compile, in memory that stays where it is, so that CUDA graphs can hold it."""

    def __init__(self, z0: Tensor, m: int, mode: str) -> None:
        B, N = z0.shape
        self.m, self.d_f, self.d_g = m, *z0.new_zeros(2, m, B, N).unbind()
        self.gram, self.start = z0.new_zeros(m, m, B), z0.new_zeros(m, B)
        self.slots = [torch.tensor([j], device=z0.device) for j in range(m)]
        for t in (self.d_f, self.d_g, self.gram, *self.slots):
            torch._dynamo.mark_static_address(t)
        torch._dynamo.config.recompile_limit = 64
        options: dict[str, Any] = {"mode": mode} if z0.is_cuda else {"backend": "eager"}
        self.step = torch.compile(rival.step, dynamic=False, fullgraph=True, **options)

    def __call__(self, f: Callable[[Tensor], Tensor], z0: Tensor, evaluations: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        for t in (self.d_f, self.d_g, self.gram):
            t.zero_()
        right, z_old = self.start, z0
        f_old = z = f(z0)
        for k in range(1, evaluations):
            fz = f(z)
            if k == evaluations - 1:
                break
            slot = self.slots[(k - 1) % self.m]
            z_next, right, _ = self.step(z, fz, z_old, f_old, self.d_f, self.d_g, self.gram, right, slot)
            z_old, f_old, z = z, fz, z_next
        return z.clone()


def rivals(place: Place, f: Any, z0: Tensor, size: str) -> tuple[dict[str, Call], dict[str, str]]:
    """Rows of others, and why some are not there."""
    rows: dict[str, Call] = {}
    skipped: dict[str, str] = {}
    for method in ("anderson", "broyden"):
        try:
            peer = peers.torchdeq(method, f"torchdeq {method}")
        except ImportError as error:
            skipped[f"torchdeq {method}"] = f"{error}; a folder or wheel that has it can be named in DEQFAST_BENCH_PATH"
            continue
        rows[peer.name] = partial(peer.solve, f, z0, EVALUATIONS, 0.0)
    if size == "20000x8":
        return rows, skipped  # compiling takes long, and the other two sizes show both regimes
    compiled = CompiledRival(z0, 6, "reduce-overhead")
    rows["torch.compile"] = partial(compiled, f, z0, EVALUATIONS)
    return rows, skipped


def _tried(rows: dict[str, Any], skipped: dict[str, str], z0: Tensor, f: Any) -> dict[str, dict[str, Any]]:
    """Facts of the rows that work; the others are taken out, with the reason. Three calls: recordings are warm then."""
    facts: dict[str, dict[str, Any]] = {}
    for name in list(rows):
        try:
            for _ in range(3):
                found = rows[name]()
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            del rows[name]
            continue
        z = found.z if isinstance(found, dq.Solution) else found
        facts[name] = {"residual": float(peers.relative_residual(z, f(z)).median())}
        if isinstance(found, dq.Solution):
            facts[name].update(mode=found.mode, nfe=found.nfe)
    return facts


def _repeated(f: Callable[[Tensor], Tensor], z0: Tensor) -> None:
    for _ in range(EVALUATIONS):
        f(z0)


def whole_solves(place: Place, backends: list[str], rounds: int) -> list[dict[str, Any]]:
    """A record a size: wall microseconds of every row, all with the same number of evaluations."""
    records = []
    for size, (B, N) in sizes(place).items():
        if place.late(f"solves of {size}"):
            continue
        f, z0 = diagonal_map(place, B, N)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what rivals and the compiler warn of; a mode that fell back shows below
            rows, skipped = rivals(place, f, z0, size)
            for backend in backends:
                for options in (LIKE, NARROW, DEFAULT, BROYDEN):
                    for mode in modes(place, backend):
                        if options is not LIKE and mode == "graph":
                            continue
                        name = f"{options['label']}, {backend}, {mode}"
                        rows[name] = partial(solve, f, z0, options["solver"], backend, mode)
            facts = _tried(rows, skipped, z0, f)
            timed: dict[str, Call] = {name: place.finished(call) for name, call in rows.items()}
            timed["f"] = place.finished(partial(_repeated, f, z0))
            taken = timing.alternate(timed, rounds=rounds, budget=6.0 if place.cuda else 1.0)
        for name, row in facts.items():
            low, high = taken[name].quartiles
            row.update(us=1e6 * taken[name].median, us_low=1e6 * low, us_high=1e6 * high)
        records.append({
            "size": size, "B": B, "N": N, "evaluations": EVALUATIONS, "us_f": 1e6 * taken["f"].median,
            "rows": facts, "skipped": skipped,
        })  # fmt: skip
    return records


def loop_on_device(place: Place, backends: list[str], rounds: int) -> dict[str, Any]:
    """Microseconds an evaluation in mode="device" beside f's own, and whether a solve ran without waiting."""
    B, N = (64, 512) if place.cuda else (4, 32)
    few, many = (101, 301) if place.cuda else (5, 25)
    mode, backend = ("device", "native") if place.cuda else ("loop", backends[0])
    record: dict[str, Any] = {"B": B, "N": N, "evaluations": many - few, "mode": mode, "backend": backend}
    if backend not in backends:
        return {**record, "skipped": f"the {backend} backend is not there"}
    f, z0 = diagonal_map(place, B, N)
    calls = {limit: partial(solve, f, z0, LIKE["solver"], backend, mode, limit) for limit in (few, many)}
    used = {limit: [call() for _ in range(2)][-1].mode for limit, call in calls.items()}
    if set(used.values()) != {mode}:
        return {**record, "skipped": "the solve fell back to the plain loop"}
    evaluate = place.capture(lambda: [f(z0) for _ in range(many - few)])
    taken = {
        **place.in_turns({str(limit): (call, 1) for limit, call in calls.items()}, rounds),
        "f": place.in_turns({"f": (evaluate, many - few)}, rounds)["f"],
    }
    try:
        with place.no_sync():
            calls[many]()
        record["host_syncs"] = 0
    except RuntimeError as error:
        record["host_syncs"] = str(error).splitlines()[0]
    middle = {name: statistics.median(values) for name, values in taken.items()}
    us = (middle[str(many)] - middle[str(few)]) / (many - few)
    return {**record, "us_evaluation": us, "us_f": middle["f"], "us_step": us - middle["f"]}
