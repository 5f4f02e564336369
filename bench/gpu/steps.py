"""Steps alone, by device time: the fraction of a copy's bandwidth, the latency of a small one, narrow histories.

A step is fed outputs of f that were drawn beforehand, four in turn: no evaluation stands between steps, none has to be
subtracted, and the residual neither vanishes nor grows. A captured graph holds a multiple of four steps, so that a
replay goes on where the last one ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

import deqfast as dq
from bench import floor, joint
from bench.gpu.device import Place, spread
from deqfast.ops import choose
from deqfast.ops.broyden import BroydenWorkspace
from deqfast.ops.codes import Int
from deqfast.ops.joint_step import JointStep

FED = 4  # outputs of f in turn
F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8
WIDTH = {F32: 4, BF16: 2, I8: 1}
MEMORY = 16  # Broyden's columns: a graph of as many steps is one period of its restarts


@dataclass(frozen=True)
class Case:
    """One step to be timed; ``h`` is the history's dtype, ``kind`` "broyden", "joint" or Anderson's type."""

    name: str
    B: int
    N: int
    kind: Any
    m: int
    h: torch.dtype
    backend: str
    evict: Literal["least_useful", "oldest"] = "oldest"

    @property
    def anderson(self) -> dq.Anderson:
        kind: Any = "mixed" if self.kind == "joint" else self.kind
        return dq.Anderson(m=self.m, type=kind, history_dtype=self.h, evict=self.evict)

    @property
    def solver(self) -> dq.Anderson | dq.Broyden:
        return dq.Broyden(memory=self.m) if self.kind == "broyden" else self.anderson

    @property
    def bytes(self) -> float:
        """Floor of a step with a full history; of Broyden the mean over a period."""
        numbers, one_pass = self.B * self.N, floor.fits_a_block(self.N)
        if self.kind == "broyden":
            chain = self.N < BroydenWorkspace.DEVICE_GRAM_MIN_N
            return sum(floor.broyden_device_bytes(numbers, k, chain) for k in range(self.m)) / self.m
        if self.kind == "joint":
            return joint.floor_bytes(numbers, self.m, WIDTH[self.h])
        streamed = self.kind != 2
        return floor.anderson_device_bytes(numbers, self.m, WIDTH[self.h], one_pass=one_pass, both=streamed)


def bandwidth_cases(place: Place, backends: list[str]) -> list[Case]:
    """Steps that move 256 MB and more: samples that fit a block, and samples that are split."""
    shapes = [(4096, 4096), (96, 61_440)] if place.cuda else [(8, 64), (2, 20_000)]
    cases = []
    for backend in backends:
        for B, N in shapes:
            for name, kind, m, h in (
                ("Type II m=6", 2, 6, F32),
                ("Type II m=6", 2, 6, BF16),
                ("Type II m=6", 2, 6, I8),
                ("mixed m=10", "mixed", 10, BF16),
            ):
                cases.append(Case(name, B, N, kind, m, h, backend))
        for B, N in [(4096, 4096), (48, 138_240)] if place.cuda else [(8, 64), (1, 70_000)]:
            cases.append(Case(f"Broyden, {MEMORY} columns", B, N, "broyden", MEMORY, F32, backend))
    return cases


def latency_cases(place: Place, backends: list[str]) -> list[Case]:
    """The step of a small state, where nothing but latency counts."""
    B, N = (64, 512) if place.cuda else (4, 32)
    cases = []
    for backend in backends:
        cases.append(Case("Type II m=6", B, N, 2, 6, F32, backend))
        cases.append(Case("defaults", B, N, "mixed", 10, BF16, backend, evict="least_useful"))
        cases.append(Case(f"Broyden, {MEMORY} columns", B, N, "broyden", MEMORY, F32, backend))
    return cases


def history_cases(place: Place, backends: list[str]) -> list[Case]:
    """The shape of joint inference on CelebA, Type I as published, three histories."""
    B, N, m = (12, 491_648, 40) if place.cuda else (2, 20_000, 5)
    return [Case("Type I", B, N, 1, m, h, backends[0]) for h in (F32, BF16, I8)]


def joint_cases(place: Place, backends: list[str]) -> list[Case]:
    """The joint step at the published shapes, batches whole."""
    small = {"small": joint.Shape(600, 3, 4, 50), "split": joint.Shape(40_000, 1, 4, 50)}
    shapes = joint.SHAPES if place.cuda else small
    return [
        Case(f"joint, {name}", shape.B, shape.N, "joint", shape.m, h, backend)
        for backend in backends
        for name, shape in shapes.items()
        for h in (F32, BF16)
    ]


class JointStepping:
    """A joint state with a full history that takes ``steps`` steps a call."""

    def __init__(self, place: Place, case: Case, steps: int) -> None:
        shapes = {(shape.B, shape.N): shape for shape in joint.SHAPES.values()}
        sizes = shapes.get((case.B, case.N), joint.Shape(case.N, case.B, case.m, 50)).sizes
        generator = torch.Generator(place.device).manual_seed(0)

        def draw() -> list[torch.Tensor]:
            return [torch.randn(case.B, n, device=place.device, generator=generator) for n in sizes]

        self.case, self.steps = case, steps
        self.fed = [draw() for _ in range(FED)]
        self.ws = joint.workspace(draw(), case.anderson)
        self._step = JointStep(self.ws, choose(case.backend, self.ws.core.layout.device))
        for _ in range(-(-(case.m + 2) // FED)):
            self.take(FED)

    def take(self, steps: int) -> None:
        with torch.no_grad():
            for k in range(steps):
                self._step(self.fed[k % FED], joint.STEP_SIZE)

    def __call__(self) -> None:
        self.take(self.steps)

    def history_bytes(self) -> int:
        return self.ws.core.history.numel() * self.ws.core.history.element_size()

    def still_running(self) -> bool:
        return not bool(self.ws.core.int_row(Int.STATUS).any())


class Stepping:
    """A state with a full history that takes ``steps`` steps a call."""

    def __init__(self, place: Place, case: Case, steps: int) -> None:
        generator = torch.Generator(place.device).manual_seed(0)
        shape = (case.B, case.N)
        drawn = [torch.randn(shape, device=place.device, generator=generator) for _ in range(FED + 1)]
        self.case, self.steps = case, steps
        self.fed = drawn[:FED]
        self.state = case.solver.init(drawn[FED], rtol=0.0, backend=case.backend)
        for _ in range(-(-(case.m + 2) // FED)):
            self.take(FED)

    def take(self, steps: int) -> None:
        with torch.no_grad():
            for k in range(steps):
                self.state.step(self.fed[k % FED])

    def __call__(self) -> None:
        self.take(self.steps)

    def history_bytes(self) -> int:
        ws = self.state.ws
        held = [ws.history, *([ws.scales] if hasattr(ws, "scales") else [])]
        return sum(t.numel() * t.element_size() for t in held)

    def still_running(self) -> bool:
        return bool(self.state.running.all())


def measure(place: Place, cases: list[Case], copy_bandwidth: float, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row a case; a case whose samples stopped meanwhile, or that a backend refuses, says so instead of a time."""
    rows = []
    for case in cases:
        if place.late(f"{case.name}, {case.B} x {case.N}, {case.backend}"):
            continue
        row: dict[str, Any] = {
            "what": case.name, "backend": case.backend, "B": case.B, "N": case.N, "m": case.m,
            "history": str(case.h).removeprefix("torch."), "floor_bytes": case.bytes,
        }  # fmt: skip
        try:
            row.update(_measure(place, case, copy_bandwidth, steps, rounds))
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
            row["skipped"] = str(error).splitlines()[0]
        rows.append(row)
    return rows


def _measure(place: Place, case: Case, copy_bandwidth: float, steps: int, rounds: int) -> dict[str, Any]:
    steps = MEMORY * max(1, steps // MEMORY) if case.kind == "broyden" else steps
    stepping = (JointStepping if case.kind == "joint" else Stepping)(place, case, steps)
    launches = place.kernels(lambda: stepping.take(FED), FED)
    replay = place.capture(stepping)
    taken = place.in_turns({"step": (replay, steps)}, rounds)["step"]
    if not stepping.still_running():
        return {"skipped": "samples stopped while they were timed"}
    found = {**spread(taken), **launches, "history_bytes": stepping.history_bytes()}
    found["copy_fraction"] = case.bytes / (1e-6 * found["us"]) / copy_bandwidth
    return found


def copy_bandwidth(place: Place, rounds: int) -> float:
    """Bytes a second, read plus written, of a copy that leaves every cache."""
    numbers = (1 << 28) if place.cuda else (1 << 20)
    source = torch.ones(numbers, device=place.device)
    target = torch.zeros_like(source)
    copy: Callable[[], object] = lambda: target.copy_(source)  # noqa: E731
    return 8 * numbers / (1e-6 * spread(place.microseconds(copy, 4, rounds))["us"])
