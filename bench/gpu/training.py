"""A DEQ training step end to end, deqfast against torchdeq: forward solve, backward solve, optimiser."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import deqfast as dq
from bench import timing
from bench.gpu.device import Call, Place

TOLERANCE, LIMIT = 1e-3, 40


class Dense(nn.Module):
    """z -> tanh(W z + x), ||W||_2 = 0.9."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.inner = nn.Linear(n, n)
        with torch.no_grad():
            self.inner.weight.mul_(0.9 / torch.linalg.matrix_norm(self.inner.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


class Conv(nn.Module):
    """A residual block as in multiscale DEQs, one scale: two convolutions with group norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = 4
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(2))
        with torch.no_grad():
            self.second.weight.mul_(0.3)  # with the 0.3 below: a contraction, so that both solves converge

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.first(z)))
        return self.norms[1](torch.relu(0.3 * z + self.second(y) + x))


def cases(place: Place) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    if not place.cuda:
        return {"MLP 4 x 16": (Dense(16), (4, 16)), "conv 2 x 256": (Conv(4), (2, 4, 8, 8))}
    return {"MLP 64 x 512": (Dense(512), (64, 512)), "conv 32 x 61,440": (Conv(60), (32, 60, 32, 32))}


class Training:
    """A cell, an input, a target and an optimiser; a step is one call."""

    def __init__(
        self, cell: nn.Module, x: Tensor, target: Tensor, layer: Callable[[nn.Module, Tensor], Tensor]
    ) -> None:
        self.cell, self.layer, self.x, self.target = copy.deepcopy(cell), layer, x, target
        self.optimiser = torch.optim.SGD(self.cell.parameters(), lr=0.0)  # every step solves the same problem

    def __call__(self) -> Tensor:
        self.optimiser.zero_grad(set_to_none=False)
        loss = nn.functional.mse_loss(self.layer(self.cell, self.x), self.target)
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def gradient(self) -> Tensor:
        self()
        return torch.cat([p.grad.reshape(-1) for p in self.cell.parameters() if p.grad is not None]).double()


def ours(backend: str, mode: str, rtol: float = TOLERANCE, limit: int = LIMIT) -> Callable[[nn.Module, Tensor], Tensor]:
    def layer(cell: nn.Module, x: Tensor) -> Tensor:
        options: dict[str, Any] = {"backend": backend, "mode": mode, "rtol": rtol, "max_iter": limit}
        return dq.fixed_point(cell, torch.zeros_like(x), (x,), **options).z

    return layer


def theirs(**solver_kwargs: float) -> Callable[[nn.Module, Tensor], Tensor]:
    from torchdeq import get_deq

    deq = get_deq(
        f_solver="anderson", b_solver="anderson", f_max_iter=LIMIT, b_max_iter=LIMIT, f_tol=TOLERANCE, b_tol=TOLERANCE,
        f_stop_mode="rel", b_stop_mode="rel", ift=True,
    )  # fmt: skip

    def layer(cell: nn.Module, x: Tensor) -> Tensor:
        return deq(lambda z: cell(z, x), torch.zeros_like(x), solver_kwargs=dict(solver_kwargs))[0][-1]

    return layer


def measure(place: Place, backends: list[str], rounds: int) -> list[dict[str, Any]]:
    """A record a model: wall time of every row and how far its gradient is from that of a tight solve."""
    records = []
    for name, (cell, shape) in cases(place).items():
        if place.late(f"training of {name}"):
            continue
        cell.to(place.device)
        x, target = (torch.randn(shape, device=place.device) for _ in range(2))
        layers = {}
        for backend in backends:
            for mode in ("loop", "graph", "device") if place.cuda and backend == "native" else ("loop",):
                layers[f"deqfast, {backend}, {mode}"] = ours(backend, mode)
        skipped = {}
        try:
            layers["torchdeq"], layers["torchdeq lam=1e-8"] = theirs(), theirs(lam=1e-8)
        except ImportError as error:
            skipped["torchdeq"] = f"{error}; a folder or wheel that has it can be named in DEQFAST_BENCH_PATH"
        facts: dict[str, dict[str, float]] = {}
        calls: dict[str, Call] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backward solve at its limit; the gradient's error tells
            exact = Training(cell, x, target, ours(backends[0], "loop", 1e-6, 300)).gradient()
            for row, layer in layers.items():
                training = Training(cell, x, target, layer)
                try:
                    for _ in range(3):
                        found = training.gradient()
                except Exception as error:
                    skipped[row] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                    continue
                facts[row] = {"gradient_error": float((found - exact).norm() / exact.norm())}
                calls[row] = place.finished(training)
            taken = timing.alternate(calls, rounds=rounds, budget=6.0 if place.cuda else 2.0)
        for row, fact in facts.items():
            low, high = taken[row].quartiles
            fact.update(us=1e6 * taken[row].median, us_low=1e6 * low, us_high=1e6 * high)
        records.append({"model": name, "tolerance": TOLERANCE, "rows": facts, "skipped": skipped})
    return records
