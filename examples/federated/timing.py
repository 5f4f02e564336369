"""One client's training with deqfast and with torchdeq's solvers, an epoch each in turns: same weights, same batches.

Both stop at the same relative tolerance or when the device's budget is used up, forward and backward.
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import data
import model as models
import torch
import training
from torch import Tensor, nn

import deqfast as dq

try:
    import torchdeq
except ImportError:
    torchdeq = None
HAS_TORCHDEQ = torchdeq is not None

SOLVERS = {
    "torchdeq Anderson": ("anderson", "anderson"),
    "torchdeq Anderson, lam 1e-8": ("anderson_small_ridge", "anderson_small_ridge"),
    "torchdeq Broyden": ("broyden", "broyden"),
    "torchdeq plain iteration": ("fixed_point_iter", "fixed_point_iter"),
    "torchdeq lam 1e-8, then Broyden": ("anderson_small_ridge", "broyden"),
}
TIMED_BUDGETS = (8, 40)


class TorchdeqLayer(nn.Module):
    """x -> z* with torchdeq: implicit gradients and relative stops, which are not its defaults."""

    def __init__(self, cell: nn.Module, budget: int, forward_solver: str, backward_solver: str) -> None:
        super().__init__()
        self.cell = cell
        self.deq = torchdeq.get_deq(
            ift=True,
            f_solver=forward_solver,
            b_solver=backward_solver,
            f_tol=models.RTOL,
            b_tol=models.RTOL,
            f_stop_mode="rel",
            b_stop_mode="rel",
            f_max_iter=budget,
            b_max_iter=budget,
        )

    def forward(self, x: Tensor) -> Tensor:
        z, _ = self.deq(lambda z: self.cell(z, x), torch.zeros_like(x))
        return z[-1]


def layers() -> dict[str, Callable[[nn.Module, int], nn.Module]]:
    """deqfast first; torchdeq as it comes and with everything known to make it faster here."""
    found: dict[str, Callable[[nn.Module, int], nn.Module]] = {"deqfast": models.deqfast_layer}
    # Each sample stops at the tolerance with deqfast; torchdeq's go on until all are there, and end more exact.
    found["deqfast at a tenth of the tolerance"] = functools.partial(models.deqfast_layer, rtol=models.RTOL / 10)
    if not HAS_TORCHDEQ:
        return found
    from torchdeq.solver import register_solver
    from torchdeq.solver.anderson import anderson_solver

    register_solver("anderson_small_ridge", functools.partial(anderson_solver, lam=1e-8))
    for name, (forward, backward) in SOLVERS.items():
        found[name] = functools.partial(TorchdeqLayer, forward_solver=forward, backward_solver=backward)
    return found


def measure(options: training.Options, budget: int, turns: int) -> list[dict[str, Any]]:
    """A row a solver: seconds of an epoch of the client with the most digits, and the ratio to deqfast's by turn."""
    part = max(data.split(options.seed, options.clients), key=lambda part: len(part.labels))
    players = {}
    for name, layer in layers().items():
        torch.manual_seed(options.seed)
        players[name] = models.Equilibrium(budget, layer).to(options.device)
    seconds: dict[str, list[float]] = {name: [] for name in players}
    order = list(players)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dq.GradientWarning)
        for turn in range(-1, turns):  # the first loads code and fills caches: it is timed for nobody
            for name in order:
                start = clock(options.device)
                training.fit(players[name], part, options, seed=turn + 1)
                if turn >= 0:
                    seconds[name].append((clock(options.device) - start) / options.epochs)
            order = order[1:] + order[:1]
    rows = []
    for name, model in players.items():
        ratios = [mine / ours for mine, ours in zip(seconds[name], seconds["deqfast"], strict=True)]
        found = {
            "name": name,
            "budget": budget,
            "examples": len(part.labels),
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(ratios),
            "ratios": sorted(ratios),
            "residual": returned_residual(model, part, options),
        }
        rows.append(found)
    return rows


def returned_residual(model: models.Equilibrium, part: data.Part, options: training.Options) -> float:
    """||f(z) - z|| / ||f(z)|| of the states that training gets, the mean over the client's digits."""
    x = model.inject(part.pixels.to(options.device)).detach()
    model.train()
    z = model.layer(x).detach()
    image = model.cell(z, x)
    return ((image - z).norm(dim=1) / image.norm(dim=1)).mean().item()


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
