"""What the tests that need a GPU share: which backends it has, maps, and a guard against waiting for the device.

DEQFAST_TEST_DRY=1 runs them on CPU tensors, with stand-ins for ``torch.cuda``: see dry.py.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import problems
import pytest
import torch
from problems import Problem
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import deqfast as dq
from deqfast import ops

DRY = bool(os.environ.get("DEQFAST_TEST_DRY"))
GPU = torch.device("cpu") if DRY else torch.device("cuda", 0)
HAS_GPU = DRY or torch.cuda.is_available()
cuda: Any = torch.cuda
if DRY:
    import dry as cuda

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="torch sees no CUDA device")
not_dry = pytest.mark.skipif(DRY, reason="asks for what CPU tensors have not")


def some(*values: Any) -> tuple[Any, ...]:
    """The values that a test runs for; a trial takes the first two."""
    return values[:2] if DRY else values


def _missing(backend: str) -> str | None:
    return ops.why_not(backend, GPU) if HAS_GPU else "torch sees no CUDA device"


def backends(*names: str) -> Any:
    """The marker that runs a test once for each backend, and says why one is left out."""
    found = ((name, _missing(name)) for name in names)
    params = [pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=str(why))) for name, why in found]
    return pytest.mark.parametrize("backend", params)


every_backend = backends("native", "triton")
native_only = backends("native")

SOLVERS = {
    "mixed": dq.Anderson(),
    "type-2": dq.Anderson(m=5, type=2, evict="oldest"),
    "broyden": dq.Broyden(),
    "picard": dq.Picard(),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def problem(B: int, *shape: int, **options: Any) -> Problem:
    """``problems.problem`` on the GPU."""
    return to_gpu(problems.problem(B, *shape, **options))


def to_gpu(p: Problem) -> Problem:
    return Problem(*(pytree.tree_map(lambda t: t.to(GPU), part) for part in (p.z0, p.x, p.rate)))


class Cell(nn.Module):
    """A dense layer that halves distances."""

    def __init__(self, n: int = 24) -> None:
        super().__init__()
        self.inner = nn.Linear(n, n)
        with torch.no_grad():
            self.inner.weight.mul_(0.5 / torch.linalg.matrix_norm(self.inner.weight, 2))
        self.to(GPU)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """torch raises where it waits for the device; the module's own kernels have no call that waits."""
    cuda.synchronize()
    _debug_mode("error")
    try:
        yield
    finally:
        _debug_mode("default")


def _debug_mode(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the mode is a prototype
        cuda.set_sync_debug_mode(mode)


def on_stream(stream: Any, run: Callable[[], Any]) -> Any:
    """What ``run`` returns, made on another stream, in order with the current one."""
    stream.wait_stream(cuda.current_stream(GPU))
    with cuda.stream(stream):
        found = run()
    cuda.current_stream(GPU).wait_stream(stream)
    return found
