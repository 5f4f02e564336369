"""The models of masks.py: one block applied K times, in six ways, or solved for its fixed point; what they cost.

The state starts at x. Step k of a model without a solver is z <- f_k(z, x) = tanh(W_k z + x), where W_k is

    tied      W, the same at every step
    masked    W with a mask of its own for every step (``dq.nn.StepMasked``)
    one mask  W with one mask for all of them
    untied    K matrices, narrower, so that all of them have as many parameters as the tied model

and a DEQ returns z* = f(z*, x): with implicit gradients, with phantom ones (||W||_2 <= 0.95 in both), or with a
Jacobian penalty in the loss. For a sequence, W acts on a position and the one before it: a trellis network.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from digits_measure import CountedCell
from digits_model import NORM_BOUND
from torch import Tensor, nn

import deqfast as dq

RTOL, MAX_ITER, PHANTOM = 1e-3, 40, 5
PENALTY = 1.0  # times the penalty, which is ||df/dz||_F^2 by the size of the state
SOLVED = ("implicit", "phantom", "penalised")
# torchdeq's solvers, forward and backward, as in digits.py. "ridge": Anderson with a small one, often faster.
TORCHDEQ = (
    "anderson, anderson",
    "ridge, ridge",
    "broyden, broyden",
    "fixed_point_iter, fixed_point_iter",
    "ridge, broyden",
)


@dataclass(frozen=True)
class Kind:
    """What a model is made of; ``solver`` is that of a DEQ: "deqfast", or torchdeq's pair "forward, backward"."""

    way: str
    width: int = 128
    depth: int = 6
    density: float = 1.0
    learn: str = "fixed"
    solver: str = "deqfast"

    @property
    def name(self) -> str:
        if self.way in SOLVED:
            return f"DEQ, {self.way}" + ("" if self.solver == "deqfast" else ", by torchdeq")
        if self.way in ("masked", "one mask"):
            return f"{self.way} {self.density:g}" + ("" if self.learn == "fixed" else f", {self.learn}")
        return {"tied": "weight-tied", "untied": "untied, equal parameters"}[self.way]

    def but(self, **changes: Any) -> Kind:
        return replace(self, **changes)


@dataclass(frozen=True)
class Task:
    """Shapes: ``inputs`` numbers or characters, ``outputs`` classes; ``sequence``: one of each a position."""

    inputs: int
    outputs: int
    sequence: bool = False


class Cell(nn.Module):
    """f(z, x, step) = tanh(W_step z + x) for z and x of shape (..., N)."""

    direction: Tensor

    def __init__(self, kind: Kind, width: int, sequence: bool, generator: torch.Generator) -> None:
        super().__init__()
        reach = 2 * width if sequence else width
        self.kind, self.sequence = kind, sequence
        count = kind.depth if kind.way == "untied" else 1
        linears = [nn.Linear(reach, width, bias=False) for _ in range(count)]
        self.layers = nn.ModuleList(linears)
        if kind.way in ("masked", "one mask"):
            with torch.no_grad():  # what is kept is as large, in the mean square, as the whole would be
                linears[0].weight.div_(math.sqrt(kind.density))
            masks = kind.depth if kind.way == "masked" else 1
            self.layers[0] = dq.nn.StepMasked(linears[0], masks, kind.density, kind.learn, "auto", generator)
        self.register_buffer("direction", torch.randn(reach, generator=generator))

    def forward(self, z: Tensor, x: Tensor, step: int = 0) -> Tensor:
        if self.sequence:
            z = torch.cat([F.pad(z, (0, 0, 1, 0))[..., :-1, :], z], -1)
        layer = self.layers[step if self.kind.way == "untied" else 0]
        z = layer(z, step if self.kind.way == "masked" else 0) if isinstance(layer, dq.nn.StepMasked) else layer(z)
        return torch.tanh(z + x)

    @torch.no_grad()
    def project(self, steps: int = 2) -> None:
        """Bound ||W||_2 where a fixed point is solved for. Power iteration, warm-started from the last call."""
        if self.kind.way not in ("implicit", "phantom"):
            return
        (weight,) = self.parameters()
        # ||W_1 e^{iw} + W_2|| <= sqrt(2) ||(W_1 W_2)||: what a shift and a position do together.
        bound = NORM_BOUND / math.sqrt(2) if self.sequence else NORM_BOUND
        for _ in range(steps):
            image = weight @ self.direction
            back = weight.T @ (image / image.norm())
            norm = back.norm()
            self.direction.copy_(back / norm)
        weight.mul_((bound / norm).clamp(max=1.0))


class Model(nn.Module):
    """Inputs -> logits. ``counted`` counts the evaluations of f."""

    def __init__(self, kind: Kind, task: Task, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind, self.task = kind, task
        width = equal_width(kind, task) if kind.way == "untied" else kind.width
        self.inject = nn.Embedding(task.inputs, width) if task.sequence else nn.Linear(task.inputs, width)
        if task.sequence:
            nn.init.normal_(self.inject.weight, std=0.5)  # 1, the default, saturates tanh
        self.head = nn.Linear(width, task.outputs)
        # Another seed: masks from the numbers that weights are made of would keep the largest.
        self.cell = Cell(kind, width, task.sequence, torch.Generator().manual_seed(1000 + seed))
        self.cell.project(steps=50)
        self.counted = CountedCell(self.cell)
        self.solve = _solver(kind) if kind.way in SOLVED else None
        self.penalty: Tensor | None = None
        self.options: dict[str, Any] = {}  # of dq.unroll

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.inject(inputs)
        if self.solve is None:
            z = dq.unroll(self.cell, x, self.kind.depth, (x,), pass_step=True, **self.options)
            self.counted.calls += self.kind.depth
        else:
            z = self.solve(self.counted, x)
            if self.kind.way == "penalised" and self.training:
                self.penalty = dq.jacobian_penalty(self.counted, z.detach(), args=(x,))
        return self.head(z)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(self(inputs).flatten(0, -2), labels.flatten())
        return loss if self.penalty is None else loss + PENALTY * self.penalty

    def masked_layers(self) -> Iterator[dq.nn.StepMasked]:
        return (m for m in self.modules() if isinstance(m, dq.nn.StepMasked))

    def parameters_used(self) -> int:
        """Without scores: they choose masks, and are not needed once these are chosen."""
        return sum(p.numel() for name, p in self.named_parameters() if "scores" not in name)

    def multiply_adds(self, evaluations: float) -> tuple[float, float]:
        """Of all evaluations of f, and of everything with injection and head; a sample, or a position of a sequence.

        What a mask drops is skipped. The solver's own are left out.
        """
        layer = self.cell.layers[0]
        if isinstance(layer, dq.nn.StepMasked):
            masks = range(self.kind.depth) if self.kind.way == "masked" else [0] * self.kind.depth
            block = float(sum(layer.multiply_adds(k) for k in masks))
        else:
            (weight,) = layer.parameters()
            block = evaluations * weight.numel()
        ends = self.head.weight.numel() + (0 if self.task.sequence else self.inject.weight.numel())
        return block, block + ends


def equal_width(kind: Kind, task: Task) -> int:
    """The width at which ``depth`` matrices have as many parameters as one of ``width``, ends included, or less."""
    reach, ends = (2 if task.sequence else 1), task.inputs + task.outputs + (0 if task.sequence else 1)

    def count(width: int, matrices: int) -> int:
        return matrices * reach * width**2 + ends * width

    return max(w for w in range(1, kind.width + 1) if w == 1 or count(w, kind.depth) <= count(kind.width, 1))


def _solver(kind: Kind) -> Callable[[Any, Tensor], Tensor]:
    if kind.solver != "deqfast":
        return _torchdeq(kind)
    implicit = dq.Implicit(rtol=RTOL, max_iter=MAX_ITER)
    backward = dq.Phantom(PHANTOM) if kind.way == "phantom" else implicit

    def solve(f: Any, x: Tensor) -> Tensor:
        return dq.fixed_point(f, x, args=(x,), rtol=RTOL, max_iter=MAX_ITER, backward=backward).z

    return solve


def _torchdeq(kind: Kind) -> Callable[[Any, Tensor], Tensor]:
    import torchdeq
    from torchdeq.solver import register_solver
    from torchdeq.solver.anderson import anderson_solver

    register_solver("ridge", functools.partial(anderson_solver, lam=1e-8))
    forward, backward = kind.solver.split(", ")
    gradient = {"ift": False, "grad": PHANTOM} if kind.way == "phantom" else {"ift": True}
    stops = {"f_tol": RTOL, "b_tol": RTOL, "f_stop_mode": "rel", "b_stop_mode": "rel"}
    limits = {"f_max_iter": MAX_ITER, "b_max_iter": MAX_ITER}
    deq = torchdeq.get_deq(f_solver=forward, b_solver=backward, **gradient, **stops, **limits)

    def solve(f: Any, x: Tensor) -> Tensor:
        deq.train(torch.is_grad_enabled())  # it gives no gradients in eval mode
        return deq(lambda z: f(z, x), x)[0][-1]

    return solve
