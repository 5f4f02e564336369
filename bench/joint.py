"""The joint step alone at the shapes of joint inference and input optimisation: deqfast, and a careful author's torch.

Shapes: Gurumurthy, Bai, Manchester and Kolter, NeurIPS 2021. f, p and q are diagonal maps, evaluated outside of what is
timed. Batches that would hold more than LARGEST numbers are cut, and the facts say so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import deqfast as dq
from bench import timing
from deqfast.ops import choose
from deqfast.ops.codes import BLOCKS
from deqfast.ops.joint import JointWorkspace, MapOptions, Part
from deqfast.ops.joint_step import JointStep
from deqfast.ops.layout import Layout
from deqfast.ops.workspace import Stopping

LARGEST = 4_100_000  # numbers of a batch
DAMPING = (0.8, 0.6)
STEP_SIZE = 0.1
RIDGE = 1e-4


@dataclass(frozen=True)
class Shape:
    """N numbers a sample, ``inputs`` of them x and the rest z and mu; B samples and m columns as published."""

    N: int
    B: int
    m: int
    inputs: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of z, mu and x."""
        half = (self.N - self.inputs) // 2
        return half, half, self.N - 2 * half

    @property
    def batch(self) -> int:
        """The samples that are run."""
        return max(1, min(self.B, LARGEST // self.N))


SHAPES = {
    "MNIST": Shape(47_824, 48, 20, 784),
    "CIFAR small": Shape(64_512, 48, 20, 1000),
    "CIFAR large": Shape(125_952, 32, 20, 1000),
    "CelebA": Shape(491_648, 12, 40, 128),
    "ImageNet": Shape(491_776, 12, 20, 256),
    "Omniglot": Shape(753_040, 20, 10, 400),
}
QUICK = ("MNIST",)
HISTORY = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Maps:
    """f, p and q: an affine diagonal map for each block, into fresh tensors."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = shape.sizes
        self.rates = [0.95 * torch.rand(n, generator=generator) for n in sizes]
        self.offsets = [torch.randn(shape.batch, n, generator=generator) for n in sizes]
        self.start = [torch.zeros(shape.batch, n) for n in sizes]

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        return [torch.addcmul(b, a, t) for a, b, t in zip(self.rates, self.offsets, v, strict=True)]


def workspace(start: list[Tensor], solver: dq.Anderson) -> JointWorkspace:
    """Of a solve that stands at ``start``, tensors of z, mu and x, and never converges."""
    layout = Layout(start, "start")
    core = solver.workspace(layout, Stopping(0.0))
    core.judge_blocks([(0.0, 0.0, 1.0)] * len(BLOCKS))
    ws = JointWorkspace(core, [Part(i, leaf, i) for i, leaf in enumerate(layout.leaves)], MapOptions(DAMPING))
    for i, t in enumerate(start):
        ws.value(i, 0).copy_(t)
    return ws


class Own:
    """deqfast's joint step."""

    def __init__(self, shape: Shape, maps: Maps, solver: dq.Anderson) -> None:
        self.maps = maps
        self.ws = workspace(maps.start, solver)
        self._step = JointStep(self.ws, choose("native", self.ws.core.layout.device))
        self.running = shape.batch

    def evaluate(self) -> list[Tensor]:
        return self.maps([self.ws.value(i) for i in range(len(BLOCKS))])

    def step(self, values: list[Tensor]) -> None:
        self.running = self._step(values, STEP_SIZE)


class Torch:
    """The same step in torch: blocks joined by cat, mixed test space, incremental matrix, batched products and solve.

    It keeps no best iterate, judges nothing and freezes nothing.
    """

    def __init__(self, shape: Shape, maps: Maps) -> None:
        self.maps = maps
        B, N, m = shape.batch, shape.N, shape.m
        self.v = maps.start
        self.joined = torch.cat(maps.start, dim=1)
        self.d_f, self.d_g = torch.zeros(2, B, m, N)
        self.matrix = torch.zeros(B, m, m)
        self.q, self.w = torch.ones(2, B, m)
        self.f_prev: Tensor | None = None
        self.g_prev: Tensor | None = None
        self.k, self.m = 0, m

    def evaluate(self) -> list[Tensor]:
        return self.maps(self.v)

    def step(self, values: list[Tensor]) -> None:
        f, p, q = values
        z, mu, x = self.v
        mapped = [z + DAMPING[0] * (f - z), mu + DAMPING[1] * (p - mu), x - STEP_SIZE * q]
        self.residual = torch.stack(
            [(a - b).norm(dim=1) / a.norm(dim=1) for a, b in zip((f, p, mapped[2]), self.v, strict=True)]
        )
        joined = torch.cat(mapped, dim=1)
        g = joined - self.joined
        new = joined
        if self.f_prev is not None and self.g_prev is not None:
            slot = (self.k - 1) % self.m
            d_f, d_g = joined - self.f_prev, g - self.g_prev
            w = d_f - 2 * d_g
            self.d_f[:, slot], self.d_g[:, slot] = d_f, d_g
            from_f = torch.bmm(self.d_f, torch.stack([g, d_g], dim=2))
            from_g = torch.bmm(self.d_g, torch.stack([g, d_g, w], dim=2))
            self.q[:, slot], self.w[:, slot] = d_g.norm(dim=1), w.norm(dim=1)
            self.matrix[:, slot] = from_g[..., 2]
            self.matrix[:, :, slot] = from_f[..., 1] - 2 * from_g[..., 1]
            rho = -(from_f[..., 0] - 2 * from_g[..., 0]) / self.w
            scaled = -self.matrix / (self.w[:, :, None] * self.q[:, None, :]) + RIDGE * torch.eye(self.m)
            gamma = torch.linalg.solve(scaled, rho) / self.q
            new = joined - torch.bmm(gamma[:, None], self.d_f)[:, 0]
        self.f_prev, self.g_prev, self.joined = joined, g, new
        self.k += 1
        self.v = list(new.split([t.shape[1] for t in self.v], dim=1))


def floor_bytes(numbers: int, m: int, h: int) -> int:
    """Bytes of a step of a float32 state: Anderson's 5s + 3mh (mixed, streamed), and s for the mapped state."""
    return numbers * (6 * 4 + 3 * m * h)


def compare(name: str, rounds: int) -> tuple[dict[str, dict[str, Any]], dict[str, Own | Torch]]:
    """Facts by row, taken in turns once every history is full, and the rows.

    The bandwidth is that of copies made between the rows, as everything else a median over the rounds.
    """
    shape = SHAPES[name]
    maps = Maps(shape)
    facts: dict[str, dict[str, Any]] = {}
    rows: dict[str, Own | Torch] = {
        label: Own(shape, maps, dq.Anderson(m=shape.m, history_dtype=dtype)) for label, dtype in HISTORY.items()
    }
    rows["torch"] = Torch(shape, maps)
    with torch.no_grad(), timing.no_collection():
        for row in rows.values():
            for _ in range(shape.m + 3):
                row.step(row.evaluate())
        copy, copied = timing.copier()
        taken: dict[str, list[float]] = {label: [] for label in (*rows, "copy")}
        for _ in range(rounds):
            for label, row in rows.items():
                taken[label].append(_seconds(row.step, row.evaluate()))
            taken["copy"].append(_seconds(lambda _: copy(), None))
        for row in rows.values():
            assert not isinstance(row, Own) or row.running == shape.batch, "a frozen sample is no work"
    bandwidth = copied / statistics.median(taken["copy"])
    for label in rows:
        low, seconds, high = statistics.quantiles(taken[label], n=4)
        least = floor_bytes(shape.batch * shape.N, shape.m, 2 if label == "bfloat16" else 4)
        facts[label] = {
            "method": "joint",
            "size": name,
            "us": 1e6 * seconds,
            "us_low": 1e6 * low,
            "us_high": 1e6 * high,
            "floor_bytes": least,
            "floor_fraction": least / seconds / bandwidth,
            "ratio_to_torch": statistics.median(taken["torch"]) / seconds,
            "copy_GB_s": bandwidth / 1e9,
            "B": shape.batch,
            "B_published": shape.B,
            "N": shape.N,
            "m": shape.m,
        }
    return facts, rows


def _seconds(call: Callable[[Any], object], values: Any) -> float:
    start = time.perf_counter()
    call(values)
    return time.perf_counter() - start
