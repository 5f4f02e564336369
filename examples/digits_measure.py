"""Counting and residuals for digits.py: one code for every library, outside of all of them.

Symbols: x the injection, z the state, f(z, x) = tanh(W z + x) the cell, D = diag(1 - f^2), g = dL/dz at the returned z.
Forward residual ||f(z) - z|| / ||f(z)||. The adjoint u solves u = W^T D u + g, and has the residual of that equation.
What a user receives is the gradient at the injection, v = D u, which solves v = D (W^T v + g); so the gradient that a
library delivers is judged by the residual of v, without asking the library anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class CountedCell(nn.Module):
    """The cell, with its calls and its vector-Jacobian products counted (two additions a call: nothing beside f)."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell
        self.states: list[tuple[Tensor, Tensor]] | None = None  # (z, f(z)) of the solver's calls, while recording
        self.adjoints: list[Tensor] | None = None  # u of every product, while recording
        self.reset()

    def reset(self) -> None:
        self.calls = 0
        self.vjps = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.cell(z, x)
        if out.requires_grad:
            out.register_hook(self._count_vjp)
        elif self.states is not None:
            self.states.append((wide(z), wide(out)))
        return out

    def _count_vjp(self, u: Tensor) -> None:
        self.vjps += 1
        if self.adjoints is not None:
            self.adjoints.append(wide(u))


@dataclass
class Solved:
    """One batch taken forward and backward; everything in float64."""

    x: Tensor  # (B, N)
    z: Tensor  # (B, N), as the layer returned it
    gradient_z: Tensor  # (B, N), g
    gradient_x: Tensor  # (B, N), v
    states: list[tuple[Tensor, Tensor]]  # the solver's own calls of f
    adjoints: list[Tensor]  # the backward solver's own products


def solve_recorded(model: Any, pixels: Tensor, labels: Tensor) -> Solved:
    """One forward and backward pass of `model` with everything its solvers asked of the cell."""
    model.train()  # torchdeq gives no gradients in eval mode
    counted = model.counted
    counted.states, counted.adjoints = [], []
    x = model.inject(pixels).detach().requires_grad_()
    z = model.layer(x)
    z.retain_grad()
    nn.functional.cross_entropy(model.head(z), labels).backward()
    states, adjoints = counted.states, counted.adjoints[:-1]  # the last product carries u to the parameters
    counted.states = counted.adjoints = None
    model.zero_grad()
    x, z, gradient_z, gradient_x = (t.detach().double() for t in (x, z, z.grad, x.grad))
    return Solved(x, z, gradient_z, gradient_x, states, adjoints)


def final_residuals(model: Any, pixels: Tensor, labels: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Relative residuals (samples,) of the returned z and of the delivered gradient, in float64."""
    forward, backward = [], []
    weight = model.cell.linear.weight.detach().double()
    for rows in torch.arange(len(pixels), device=pixels.device).split(batch):
        solved = solve_recorded(model, pixels[rows], labels[rows])
        image = torch.tanh(solved.z @ weight.T + solved.x)
        forward.append(relative(image - solved.z, image))
        slope = 1 - image**2
        v = solved.gradient_x
        v_image = slope * (v @ weight + solved.gradient_z)
        backward.append(relative(v_image - v, v_image))
    return torch.cat(forward), torch.cat(backward)


def forward_curve(solved: Solved) -> Tensor:
    """Relative residual (evaluations, B) of every state the forward solver asked f about, in order."""
    return torch.stack([relative(image - z, image) for z, image in solved.states])


def backward_curve(solved: Solved, weight: Tensor) -> Tensor:
    """Relative residual (products, B) of every u the backward solver asked a product for, in order."""
    weight = weight.detach().double()
    slope = 1 - torch.tanh(solved.z @ weight.T + solved.x) ** 2
    return torch.stack(list(_adjoint_residuals(solved, slope, weight)))


def _adjoint_residuals(solved: Solved, slope: Tensor, weight: Tensor) -> Iterator[Tensor]:
    for u in solved.adjoints:
        image = (slope * u) @ weight + solved.gradient_z
        yield relative(image - u, image)


def relative(difference: Tensor, reference: Tensor) -> Tensor:
    return difference.norm(dim=1) / reference.norm(dim=1)


def wide(values: Tensor) -> Tensor:
    """A float64 copy: solvers may reuse the buffers they hand out."""
    return values.detach().to(torch.float64, copy=True)
