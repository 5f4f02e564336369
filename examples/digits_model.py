"""The model of digits.py, and the equilibrium layer written with deqfast and with torchdeq."""

from __future__ import annotations

from collections.abc import Callable

import torch
from digits_measure import CountedCell
from torch import Tensor, nn

import deqfast as dq

try:
    import torchdeq
except ImportError:
    torchdeq = None
HAS_TORCHDEQ = torchdeq is not None

# ||W||_2 stays at or below this, so f contracts: z* exists, is unique, and the adjoint system is solvable. Close to 1
# on purpose: a model held far below 1 is hardly implicit, and plain iteration would do.
NORM_BOUND = 0.95
MAX_ITER = 60


class Cell(nn.Module):
    """f(z, x) = tanh(W z + x) for z and x of shape (B, N), with the spectral norm of W bounded by `project`."""

    direction: Tensor

    def __init__(self, hidden: int):
        super().__init__()
        self.linear = nn.Linear(hidden, hidden, bias=False)
        self.register_buffer("direction", torch.randn(hidden))
        self.project(steps=50)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)

    @torch.no_grad()
    def project(self, steps: int = 2) -> None:
        """Scale W back to the bound. Power iteration, warm-started from the last call, once an optimiser step: unlike a
        parametrisation it costs f nothing."""
        weight = self.linear.weight
        for _ in range(steps):
            image = weight @ self.direction
            back = weight.T @ (image / image.norm())
            norm = back.norm()
            self.direction.copy_(back / norm)
        weight *= (NORM_BOUND / norm).clamp(max=1.0)


class DeqfastLayer(nn.Module):
    """x -> z* with deqfast: its default Anderson solver in both passes."""

    def __init__(self, cell: nn.Module, rtol: float):
        super().__init__()
        self.deq = dq.DEQ(
            cell,
            solver=dq.Anderson(),
            rtol=rtol,
            max_iter=MAX_ITER,
            backward=dq.Implicit(rtol=rtol, max_iter=MAX_ITER),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.deq(x)


class TorchdeqLayer(nn.Module):
    """x -> z* with torchdeq: implicit gradients and relative stops, which are not its defaults."""

    def __init__(self, cell: nn.Module, rtol: float, forward_solver: str, backward_solver: str):
        super().__init__()
        self.cell = cell
        self.deq = torchdeq.get_deq(
            ift=True,
            f_solver=forward_solver,
            b_solver=backward_solver,
            f_tol=rtol,
            b_tol=rtol,
            f_stop_mode="rel",
            b_stop_mode="rel",
            f_max_iter=MAX_ITER,
            b_max_iter=MAX_ITER,
        )

    def forward(self, x: Tensor) -> Tensor:
        z, _ = self.deq(lambda z: self.cell(z, x), torch.zeros_like(x))
        return z[-1]


class Classifier(nn.Module):
    """Pixels (B, 64) -> logits (B, 10) through the fixed point of `Cell`."""

    def __init__(self, hidden: int, make_layer: Callable[[nn.Module], nn.Module]):
        super().__init__()
        self.inject = nn.Linear(64, hidden)
        self.head = nn.Linear(hidden, 10)
        self.cell = Cell(hidden)
        self.counted = CountedCell(self.cell)
        self.layer = make_layer(self.counted)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.layer(self.inject(pixels)))

    def copy_weights(self, other: Classifier) -> None:
        for mine, theirs in ((self.inject, other.inject), (self.cell, other.cell), (self.head, other.head)):
            mine.load_state_dict(theirs.state_dict())
