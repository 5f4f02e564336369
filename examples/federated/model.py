"""The models that are sent round: an equilibrium network, and the same network with its layers written out.

All of them inject the pixels, x = U p + b, and read a state with a linear head.

    equilibrium   z = tanh(W z + x), solved with the evaluations that a device can afford
    explicit      z <- tanh(W_k z + b_k + x) for DEPTH layers with weights of their own, from z = tanh(x)
    shallow       z = tanh(x), no layers: what these digits need at least
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

import deqfast as dq

NUMBERS = 96  # in the state
DEPTH = 8
RTOL = 1e-3
# ||W||_2 stays at or below this on every client. An average of such matrices is one too, so what the server fuses has
# an equilibrium whatever the weights are.
NORM_BOUND = 0.95


class Cell(nn.Module):
    """f(z, x) = tanh(W z + x) for z and x of shape (B, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(NUMBERS, NUMBERS, bias=False)
        self.project()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)

    @torch.no_grad()
    def project(self) -> None:
        """Scale W back to the bound, once an optimiser step."""
        # Adam's first steps, on a client with few labels, add nearly a matrix of rank one: a few warm steps of power
        # iteration lag behind, the singular values do not.
        weight = self.linear.weight
        weight *= (NORM_BOUND / torch.linalg.matrix_norm(weight, 2)).clamp(max=1.0)


def deqfast_layer(cell: nn.Module, budget: int, rtol: float = RTOL) -> nn.Module:
    """x -> z* with at most ``budget`` evaluations of f forward and products backward."""
    backward = dq.Implicit(rtol=rtol, max_iter=budget)
    return dq.DEQ(cell, solver=dq.Anderson(), rtol=rtol, max_iter=budget, backward=backward, warn=False)


class Equilibrium(nn.Module):
    def __init__(self, budget: int, layer: Callable[[nn.Module, int], nn.Module] = deqfast_layer) -> None:
        super().__init__()
        self.budget = budget
        self.inject = nn.Linear(64, NUMBERS)
        self.cell = Cell()
        self.head = nn.Linear(NUMBERS, 10)
        self.layer = layer(self.cell, budget)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.layer(self.inject(pixels)))

    def project(self) -> None:
        self.cell.project()

    @torch.no_grad()
    def residual(self, pixels: Tensor) -> float:
        """||f(z) - z|| / ||f(z)|| where the budget leaves the solve, the mean over the samples."""
        x = self.inject(pixels)
        found = dq.fixed_point(
            self.cell, torch.zeros_like(x), args=(x,), rtol=RTOL, max_iter=self.budget, backward="none"
        )
        return found.residual.mean().item()


class Explicit(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inject = nn.Linear(64, NUMBERS)
        self.layers = nn.ModuleList(nn.Linear(NUMBERS, NUMBERS) for _ in range(depth))
        self.head = nn.Linear(NUMBERS, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.inject(pixels)
        z = torch.tanh(x)
        for layer in self.layers:
            z = torch.tanh(layer(z) + x)
        return self.head(z)

    def project(self) -> None:
        """Nothing to hold: it has no equilibrium."""

    def residual(self, pixels: Tensor) -> float:
        return 0.0


Model = Equilibrium | Explicit
MODELS = ("equilibrium", "explicit", "shallow")


def make(name: str, budget: int) -> Model:
    """A model by its name; ``budget`` is of the equilibrium network alone."""
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    if budget < 1:
        raise ValueError(f"budget: expected at least 1 evaluation, got {budget}")
    if name == "equilibrium":
        return Equilibrium(budget)
    return Explicit(DEPTH if name == "explicit" else 0)


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    """What is sent: every parameter once, by name."""
    return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}


@torch.no_grad()
def load(model: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Put weights of `weights_of` into a model of the same architecture."""
    own = dict(model.named_parameters())
    if own.keys() != weights.keys():
        raise ValueError(f"weights: expected {sorted(own)}, got {sorted(weights)}")
    for name, p in own.items():
        if tuple(p.shape) != weights[name].shape:
            raise ValueError(f"weights: expected {name} of shape {tuple(p.shape)}, got {weights[name].shape}")
        p.copy_(torch.tensor(weights[name]))
