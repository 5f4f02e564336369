"""Training steps of a DEQ under DDP and FSDP2; each rank is given its rank and how many there are."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import deqfast as dq


class Cell(nn.Module):
    def __init__(self, N: int, starts: bool) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(N, N), nn.Linear(N, N)
        nn.init.orthogonal_(self.inner.weight, 0.5)
        self.first = nn.Linear(N, N) if starts else None

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(z) + self.outer(x))


class Starting(Cell):
    def init(self, x: torch.Tensor) -> torch.Tensor:
        assert self.first is not None
        return self.first(x)


class Model(nn.Module):
    def __init__(self, N: int, starts: bool, checkpointed: bool, **options: Any) -> None:
        super().__init__()
        cell = (Starting if starts else Cell)(N, starts)
        self.deq = dq.DEQ(cell, rtol=1e-9, **options)
        self.head = nn.Linear(N, 3)
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = checkpoint(self.deq, x, use_reentrant=False) if self.checkpointed else self.deq(x)
        return self.head(z)


CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, static graph": {"wrap": {"static_graph": True}},
    "ddp, accumulated": {"parts": 2},
    "ddp, checkpointed": {"checkpointed": True},
    "ddp, a start of its own": {"starts": True, "wrap": {"find_unused_parameters": True}},
    "ddp, consensus": {"stop": "consensus"},
    "ddp, phantom": {"backward": "phantom"},
    "fsdp": {"fsdp": True},
    "fsdp, checkpointed": {"fsdp": True, "checkpointed": True},
    "fsdp, accumulated": {"fsdp": True, "parts": 2},
}
N, B = 12, 8


def _model(given: dict[str, Any], stop: str) -> Model:
    torch.manual_seed(0)
    options = {"stop": stop, "backward": dq.Phantom() if given.get("backward") else None}
    return Model(N, given.get("starts", False), given.get("checkpointed", False), **options).double()


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, N, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-1, 1, B, dtype=torch.float64)[:, None]  # ranks need unequally many evaluations
    return x, torch.randn(B, 3, generator=generator, dtype=torch.float64)


def alone(name: str) -> dict[str, torch.Tensor | None]:
    """The gradients of one process."""
    model = _model(CASES[name], "all" if CASES[name].get("stop") else "each")
    x, y = _data()
    (model(x) - y).square().mean().backward()
    return {key: p.grad for key, p in model.named_parameters()}


def train(rank: int, size: int) -> dict[str, dict[str, torch.Tensor | None]]:
    """The gradients of this rank, in each case."""
    return {name: _step(given, rank, size) for name, given in CASES.items()}


def _step(given: dict[str, Any], rank: int, size: int) -> dict[str, torch.Tensor | None]:
    model = _model(given, given.get("stop", "each"))
    wrapped: Any = model
    if given.get("fsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (size,))
        fully_shard(model.deq, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        wrapped = DistributedDataParallel(model, **given.get("wrap", {}))
    x, y = (t[rank::size] for t in _data())
    parts = given.get("parts", 1)
    for i, (a, b) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
        last = i + 1 == parts
        waiting: Any = contextlib.nullcontext()
        if given.get("fsdp"):
            wrapped.set_requires_gradient_sync(last)
        elif not last:
            waiting = wrapped.no_sync()
        with waiting:
            ((wrapped(a) - b).square().mean() / parts).backward()
    grads = {key.removeprefix("module."): p.grad for key, p in wrapped.named_parameters()}
    return {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in grads.items()}
