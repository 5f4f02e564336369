"""A few steps of every kernel at small odd sizes, for compute-sanitizer: `device_smoke.py [device [backend]]`.

Every regime, dtype and way of reading f, and the reference beside it: a program that the sanitizer finds clean has done
something, and the right thing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import deqfast as dq
from deqfast import ops
from deqfast.ops import contract
from deqfast.ops.native import extension as native
from deqfast.ops.native import plan as plan_module

F64, F32, BF16, F16, I8, C64 = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.complex64,
)  # fmt: skip
ERROR = {F64: 1e-9, F32: 1e-3, BF16: 0.1, F16: 0.02, C64: 1e-3}
STEPS = 4


def anderson(**options: Any) -> dq.Anderson:
    return dq.Anderson(**{"m": 2, "ridge": 1e-3, **options})


def cases() -> Iterator[tuple[Any, torch.dtype, tuple[tuple[int, ...], ...]]]:
    """Solver, dtype, and the shapes of the leaves."""
    for dtype in (F64, F32, BF16, F16):
        yield anderson(), dtype, ((3, 5),)  # a thread a sample
        yield anderson(type=2, evict="oldest"), dtype, ((17, 8),)
        yield anderson(), dtype, ((3, 37),)  # a block a sample
        yield dq.Broyden(memory=3), dtype, ((3, 37),)  # z in registers
    for history in (F32, BF16, F16, I8):
        yield anderson(history_dtype=history), F32, ((2, 1029),)
        yield anderson(type=2, history_dtype=history), F32, ((2, 1029),)
        yield anderson(type=1, mixing=0.7, history_dtype=history), F32, ((1, 16_389),)  # a block a chunk
    yield anderson(m=5), F32, ((2, 41),)
    yield anderson(), C64, ((3, 19),)
    yield anderson(), F32, ((2, 3, 5), (2, 0), (2, 7))
    yield anderson(), F32, ((1, 4099), (1, 13_001))
    yield dq.Picard(damping=0.7), F32, ((3, 33),)
    yield dq.Picard(), F32, ((1, 16_389),)
    yield dq.Broyden(memory=3, scale="first_step"), F32, ((2, 5003),)  # z in shared memory
    yield dq.Broyden(memory=3), F32, ((1, 20_003),)  # the Gram form
    yield dq.Broyden(memory=3), F32, ((1, 135_171),)  # and its sums in groups
    yield dq.Broyden(memory=3), F32, ((2, 9), (2, 4, 3))


def f_of(z: list[Tensor], drive: list[Tensor], k: int) -> list[Tensor]:
    """A contraction; every other output is strided, or lies one number off."""
    found = [0.4 * t.flip(-1) + x for t, x in zip(z, drive, strict=True)]
    if k % 2:
        return [torch.stack([t, t], dim=-1)[..., 1] for t in found]
    return found


class Halves(contract.BoundStep):
    """A native step as its two halves, one after the other."""

    counts_writes = False

    def __init__(self, ws: Any) -> None:
        super().__init__(ws)
        self.plan, self.memory = plan_module.make_plan(ws, halves=True)

    def __call__(self, f: Any, f_prev: Any, f_rows: Any, f_prev_rows: Any) -> int:
        sources = (f, f_prev, f_rows, f_prev_rows)
        plan_module.general_step(self.plan, self.ws, *sources, phase=native._C.REDUCE)
        return plan_module.general_step(self.plan, self.ws, *sources, phase=native._C.APPLY)


def solve(solver: Any, drive: list[Tensor], backend: str, halves: bool = False) -> list[Tensor]:
    state = solver.init([torch.zeros_like(t) for t in drive], rtol=0.0, backend=backend)
    if halves:
        state._outputs.bind(Halves(state.ws))
    with torch.no_grad():
        for k in range(STEPS):
            state.step(f_of(state.z, drive, k))
    return [t.clone() for t in state.z]


def check(name: str, got: list[Tensor], expected: list[Tensor], error: float) -> None:
    """Raise unless both agree."""
    for a, b in zip(got, expected, strict=True):
        gap = float((a - b).abs().double().norm()) if a.numel() else 0.0
        if not gap <= error * (1 + float(b.abs().double().norm())):
            raise AssertionError(f"{name}: {gap} away from the reference")


def joint_cases() -> Iterator[tuple[torch.dtype, tuple[int, int, int], dict[str, Any]]]:
    """Dtype, samples and numbers of z and x, options of a joint solve."""
    left_out: dict[str, Any] = {"accelerate": ("z", "mu")}
    yield F32, (3, 41, 7), {"returns": "cost", "safeguard": True}
    yield F32, (3, 41, 7), {**left_out, "normalize": True, "project": dq.project.L2Ball(0.5)}
    yield F64, (2, 5, 3), {**left_out, "returns": "last", "project": dq.project.Box(-0.3, 0.3)}
    yield BF16, (17, 33, 6), {**left_out, "returns": "cost", "project": dq.project.LinfBall(0.4)}
    yield C64, (2, 9, 4), {"solver": dq.Picard()}
    yield F32, (1, 20_003, 4099), {**left_out, "returns": "cost", "project": dq.project.L2Ball(2.0)}
    yield F16, (2, 9001, 5), {"solver": anderson(type=2), "safeguard": True}


def joint(dtype: torch.dtype, sizes: tuple[int, int, int], options: dict[str, Any], device: torch.device, backend: str):
    """z, mu and x after a few steps; sample 0's cost is no number at the third."""
    B, n, inputs = sizes
    generator, calls = torch.Generator().manual_seed(1), []
    drive = torch.randn(B, n, generator=generator).to(dtype).to(device)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return 0.4 * z.flip(-1) + drive + 0.1 * x.sum(1, keepdim=True)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        calls.append(1)
        cost = (z.abs().square().float().mean(1) + x.abs().square().float().sum(1)).to(drive.abs().dtype)
        return torch.cat([cost[:1] * float("nan"), cost[1:]]) if len(calls) == 3 and B > 1 else cost

    z0, x0 = torch.zeros(B, n, dtype=dtype, device=device), torch.zeros(B, inputs, dtype=dtype, device=device)
    settings = {"solver": anderson(), "step_size": 0.1, "rtol": 0.0, "max_iter": STEPS, "backward": "none", **options}
    s = dq.joint_solve(f, loss, z0, x0, backend=backend, **settings)
    return [s.z, s.mu, s.x]


def main() -> int:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    asked = sys.argv[2:] or ["native", "triton"]
    backends = [name for name in asked if ops.why_not(name, device) is None]
    if not backends:
        print(f"no kernels serve {device}: {ops.why_not(asked[0], device)}")
        return 1
    generator, done = torch.Generator().manual_seed(0), 0
    for solver, dtype, shapes in cases():
        drive = [torch.randn(shape, generator=generator, dtype=F32).to(dtype).to(device) for shape in shapes]
        expected = solve(solver, drive, "reference")
        for backend in backends:
            check(f"{solver} {dtype} {shapes} {backend}", solve(solver, drive, backend), expected, ERROR[dtype])
            done += 1
    if "native" in backends:
        for solver, N in ((anderson(), 37), (anderson(type=2), 16_389), (dq.Broyden(memory=3), 65_539)):
            drive = [torch.randn(1, N, generator=generator).to(device)]
            check(f"halves of {solver}", solve(solver, drive, "native", True), solve(solver, drive, "reference"), 1e-3)
            done += 1
    for dtype, sizes, options in joint_cases():
        expected = joint(dtype, sizes, options, device, "reference")
        for backend in backends:
            got = joint(dtype, sizes, options, device, backend)
            check(f"joint {dtype} {sizes} {options} {backend}", got, expected, ERROR[dtype])
            done += 1
    p = torch.linspace(0.1, 0.9, 20)[:, None].to(device)
    for backend in backends:
        z = dq.fixed_point(
            lambda z, p: p * z + 1, torch.zeros(20, 33, device=device), (p,), backend=backend, compact=True
        ).z
        check(f"compacted {backend}", [z], [(1 / (1 - p)).expand(20, 33)], 2e-3)
        done += 1
    print(f"{done} solves on {device} by {', '.join(backends)} agree with the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
