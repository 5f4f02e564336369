"""Where a joint step starts: blocks, projections and a workspace that stands at them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from problems import DEVICE
from torch import Tensor

import deqfast as dq
from deqfast.ops.codes import BLOCKS
from deqfast.ops.joint import JointWorkspace, MapOptions, Part
from deqfast.ops.layout import Layout
from deqfast.ops.workspace import Stopping

F64, F32, BF16, F16, I8 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8
RULES = [(1e-3, 0.0, 1.0)] * 3
DAMPING = (0.8, 0.6)
PROJECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "undamped": {"damping": (1.0, 1.0)},
    "box": {"low": 0.1, "high": 0.6},
    "l2": {"ball": "l2", "radius": 0.7},
    "l2-centre": {"ball": "l2", "radius": 0.7, "center": True},
    "l2-wide": {"ball": "l2", "radius": 1e3, "center": True},
    "linf": {"ball": "linf", "radius": 0.2},
    "linf-box": {"ball": "linf", "radius": 0.2, "low": 0.1, "high": 0.6, "center": True},
    "normalised": {"normalize": True},
    "normalised-l2": {"normalize": True, "ball": "l2", "radius": 0.4, "center": True},
}


@dataclasses.dataclass
class Start:
    """(z, mu, x) as lists of tensors and the centre of a ball around x."""

    z: list[Tensor]
    mu: list[Tensor]
    x: list[Tensor]
    center: list[Tensor] | None = None

    def every(self) -> list[Tensor]:
        return [*self.z, *self.mu, *self.x]

    def change(self, use: Any) -> Start:
        lists = [None if part is None else [use(t) for t in part] for part in (self.z, self.mu, self.x, self.center)]
        return Start(*lists)

    def to(self, dtype: torch.dtype) -> Start:
        return self.change(lambda t: t.to(torch.complex128 if t.is_complex() and dtype == F64 else dtype))


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    double = torch.complex128 if dtype.is_complex else F64
    return torch.randn(*shape, dtype=double, generator=generator, device="cpu").to(DEVICE, dtype)


def start(B: int, nz: int, nx: int, dtype: torch.dtype = F32, center: bool = False) -> Start:
    return Start(
        [random(B, nz, dtype=dtype, seed=1)],
        [random(B, nz, dtype=dtype, seed=2)],
        [random(B, nx, dtype=dtype, seed=3)] if nx else [],
        [random(B, nx, dtype=dtype, seed=4)] if center else None,
    )


def workspace(
    at: Start,
    solver: Any = None,
    accelerate: tuple[str, ...] = BLOCKS,
    rules: list[tuple[float, float, float]] | None = None,
    max_iter: int = 0,
    **options: Any,
) -> JointWorkspace:
    """A workspace that stands at ``at``, as a joint solve would make it."""
    options.pop("center", None)
    every = at.every()
    kinds = [0] * len(at.z) + [1] * len(at.mu) + [2] * len(at.x)
    chosen = [i for i, kind in enumerate(kinds) if BLOCKS[kind] in accelerate]
    layout = Layout(every, "start")
    solver = solver or dq.Picard()
    core = solver.workspace(Layout([every[i] for i in chosen], "start"), Stopping(0.0, max_iter=max_iter))
    core.judge_blocks((rules or RULES)[: 3 if at.x else 2])
    around: list[Any] = at.center or [None] * len(at.x)
    centers = [None] * (len(at.z) + len(at.mu)) + around
    parts = [
        Part(
            kind,
            layout.leaves[i],
            chosen.index(i) if i in chosen else None,
            None if centers[i] is None else layout.leaves[i].rows(centers[i]).to(layout.acc).contiguous(),
        )
        for i, kind in enumerate(kinds)
    ]
    ws = JointWorkspace(core, parts, MapOptions(**{"damping": DAMPING, **options}))
    for i, t in enumerate(every):
        ws.value(i, 0).copy_(t)
        for buffer in ws.mapped:
            buffer[i].fill_(7)
    return ws


def given(at: Start, seed: int = 10) -> list[Tensor]:
    """Values of f, p and q near the iterate."""
    return [t + 0.1 * random(*t.shape, dtype=t.dtype, seed=seed + i) for i, t in enumerate(at.every())]


def rows(ws: JointWorkspace, leaves: list[Tensor]) -> list[Tensor]:
    return [part.leaf.rows(t).double() for part, t in zip(ws.parts, leaves, strict=True)]


def tree(B: int = 2) -> Start:
    """Several tensors in every block: channels_last, complex, without numbers, with a dimension of one."""
    image = functools.partial(random, B, 3, 4, 5)

    def block(seed: int) -> list[Tensor]:
        channels_last = image(seed=seed).to(memory_format=torch.channels_last)
        return [channels_last, random(B, 7, dtype=torch.complex64, seed=seed), torch.zeros(B, 0), random(B, seed=seed)]

    return Start(block(1), block(2), [image(seed=3), random(B, 6, 1, seed=3)], [image(seed=4), random(B, 6, 1, seed=4)])
