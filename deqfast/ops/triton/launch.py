"""How kernels are launched: with what they are compiled for, and with the arguments that every op needs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..layout import Leaf

ALIGNMENT = 16  # bytes; how a kernel reads may depend on it, and the order of its sums with that

COMPILER = {"enable_fp_fusion": True}  # said outright: Triton's default differs between versions

Launch = Callable[..., None]


def load(name: str) -> Any:
    """A module of the kernels; importing the first one imports Triton."""
    return importlib.import_module(f"deqfast.kernels.{name}")


def bound(kernel: Any, grid: int, warps: int, **options: Any) -> Launch:
    """The launches of a kernel by so many programs: what is compiled in is said here, the arguments at each launch."""
    return functools.partial(kernel[(grid,)], **options, num_warps=warps, **COMPILER)


def doubles(numbers: list[float], device: torch.device) -> Tensor:
    """Numbers for kernels to read, in float64: as arguments they would be rounded to float32."""
    there = torch.empty(len(numbers), dtype=torch.float64, device=device)
    for place, value in zip(there.unbind(), numbers, strict=True):
        place.fill_(value)  # a copy of host memory would wait for the device
    return there


def dense(t: Tensor, leaf: Leaf) -> Tensor:
    """``t`` as dense, aligned rows: a copy where it is not stored like that."""
    rows = leaf.rows(t.resolve_neg()).resolve_neg()
    if not rows.is_contiguous():
        return rows.contiguous()
    return rows.clone() if rows.data_ptr() % ALIGNMENT else rows


def share(sizes: list[int]) -> list[Any]:
    """How programs share samples with tensors of these sizes: the ``Chunks`` of each."""
    size = load("shapes").chunk_size(sizes)
    own = [math.ceil(n / size) for n in sizes]
    return [load("arguments").Chunks(n, size, sum(own[:i]), own[i], sum(own)) for i, n in enumerate(sizes)]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Where launches for tensors of this device are made."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
