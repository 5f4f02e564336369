"""How a batched state lies in memory: leaves, order of their dimensions, rows.

A state is a pytree of tensors ("leaves") that share dim 0, the batch. Each leaf is kept batch-outermost and dense, with
its inner dimensions in the order in which ``z0`` stores them, so that a channels_last state stays channels_last. A
sample is then one dense row per leaf; nothing is ever concatenated.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

REAL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_REAL_OF_COMPLEX = {torch.complex128: torch.float64, torch.complex64: torch.float32, torch.complex32: torch.float16}
# A narrower float is what autocast hands back; the ops widen it while reading.
_NARROWER: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.bfloat16: (),
    torch.float16: (),
}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The real dtype in which numbers of ``dtype`` are stored."""
    return _REAL_OF_COMPLEX.get(dtype, dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 states, float32 for every narrower one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _widest(device_type: str) -> torch.dtype:
    try:
        torch.ones(1, dtype=torch.float64, device=device_type).sqrt()
    except (TypeError, RuntimeError):  # Apple's MPS
        return torch.float32
    return torch.float64


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have none."""
    return _widest(device.type)


_LEAF = pytree.tree_structure(0)


class Leaf:
    """One tensor of the state: shape, dtype and the memory order of its inner dimensions.

    ``plain``: real, and in the order of its dimensions.
    """

    __slots__ = ("complex", "dtype", "n", "order", "plain", "shape", "stride")

    def __init__(self, t: Tensor) -> None:
        self.shape = t.shape
        self.dtype = t.dtype
        self.complex = t.is_complex()
        self.order = tuple(range(t.dim()))
        self.plain = t.is_contiguous()
        if self.plain:
            self.stride = t.stride()
        else:
            self._sort(t)
        self.plain = self.plain and not self.complex
        self.n = math.prod(t.shape[1:]) * (2 if self.complex else 1)

    def _sort(self, t: Tensor) -> None:
        strides = t.stride()
        inner = self.order[1:]
        if not any(strides[d] == 0 and t.shape[d] > 1 for d in inner):  # expanded: no order to keep
            self.order = (0, *sorted(inner, key=lambda d: (-strides[d], d)))
        self.plain = self.order == tuple(range(t.dim()))
        stride = [0] * t.dim()
        step = 1
        for d in reversed(self.order):
            stride[d] = step
            step *= max(1, t.shape[d])
        self.stride = tuple(stride)

    def empty(self, device: torch.device, batch: int | None = None) -> Tensor:
        """An uninitialised tensor of this leaf's shape, dtype and memory order."""
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        return torch.empty_strided(shape, self.stride, dtype=self.dtype, device=device)

    def rows(self, t: Tensor) -> Tensor:
        """``t`` as (B, n) real numbers in memory order: a view where ``t`` is dense in that order, else a copy."""
        t = t.permute(self.order)
        if self.complex:
            t = torch.view_as_real(t.resolve_conj())
        return t.reshape(t.shape[0], self.n)


class Layout:
    """Structure and memory layout of a batched state.

    ``B`` samples of ``N`` real numbers each; ``dtype`` is the real dtype they are stored in, ``acc`` the one in which
    dot products and small solves run.
    """

    def __init__(self, z0: Any, name: str = "z0") -> None:
        self.name = name
        self.single = isinstance(z0, Tensor)
        leaves, self.spec = ([z0], _LEAF) if self.single else pytree.tree_flatten(z0)
        if not leaves:
            raise ValueError(f"{name} must hold at least one tensor, got an empty {type(z0).__name__}")
        for t in leaves:
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must hold only tensors, got a {type(t).__name__}")
            if real_dtype(t.dtype) not in REAL_DTYPES:
                raise TypeError(
                    f"{name} must be float64, float32, bfloat16, float16 or complex, got {t.dtype}; "
                    "convert it first, for example with .float()"
                )
            if t.layout != torch.strided:
                raise TypeError(f"{name} must be a dense (strided) tensor, got layout {t.layout}")
            if t.dim() == 0:
                raise ValueError(f"{name} must have a batch dimension (dim 0), got a 0-dimensional tensor")
        first = leaves[0]
        for t in leaves[1:]:
            if t.shape[0] != first.shape[0]:
                raise ValueError(
                    f"tensors of {name} must share dim 0 (the batch), got {first.shape[0]} and {t.shape[0]}"
                )
            if real_dtype(t.dtype) != real_dtype(first.dtype):
                raise TypeError(f"tensors of {name} must share one precision, got {first.dtype} and {t.dtype}")
            if t.device != first.device:
                raise ValueError(f"tensors of {name} must be on one device, got {first.device} and {t.device}")
        if first.is_meta:
            raise ValueError(f"{name} must hold data, got a tensor on device meta")
        self.leaves = [Leaf(t) for t in leaves]
        self.B = int(first.shape[0])
        self.N = sum(leaf.n for leaf in self.leaves)
        self.dtype = real_dtype(first.dtype)
        self.acc = accumulation_dtype(self.dtype)
        self.device = first.device

    def __repr__(self) -> str:
        leaves = ", ".join(f"{tuple(leaf.shape)} {leaf.dtype} in order {leaf.order}" for leaf in self.leaves)
        return f"{self._describe()}: {leaves}"

    def flatten(self, tree: Any, name: str, batch: int | None = None) -> list[Tensor]:
        """The leaves of ``tree``, checked against this layout; under autocast a narrower float is accepted.

        ``batch`` replaces B when converged samples have been dropped.

        Raises:
            TypeError, ValueError: naming ``name``, what was expected and what came.
        """
        tensors, spec = ([tree], _LEAF) if isinstance(tree, Tensor) else pytree.tree_flatten(tree)
        if spec != self.spec:
            hint = f"; the keys of a dict must come in {self.name}'s order" if isinstance(tree, dict) else ""
            got = _kind(tree) + hint
            raise TypeError(f"{name} must have the structure of {self.name}, expected {self._describe()}, got {got}")
        for t, leaf in zip(tensors, self.leaves, strict=True):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must hold tensors, got a {type(t).__name__}")
            shape = leaf.shape if batch is None else (batch, *leaf.shape[1:])
            if t.shape != shape:
                sizes = f"expected {tuple(shape)}, got {tuple(t.shape)}"
                raise ValueError(f"{name} must have the shape of {self.name}, {sizes}")
            if t.dtype != leaf.dtype and not self._autocast_made(t, leaf):
                raise TypeError(f"{name} must have the dtype of {self.name}, expected {leaf.dtype}, got {t.dtype}")
            if t.device != self.device:
                raise ValueError(f"{name} must be on the device of {self.name}, expected {self.device}, got {t.device}")
            if t.layout != torch.strided:
                raise TypeError(f"{name} must be a dense (strided) tensor, got layout {t.layout}")
        return tensors

    def unflatten(self, leaves: list[Tensor]) -> Any:
        """The tree of z0 with these leaves."""
        return leaves[0] if self.single else pytree.tree_unflatten(leaves, self.spec)

    def empty(self, batch: int | None = None) -> list[Tensor]:
        """Uninitialised leaves in this layout."""
        return [leaf.empty(self.device, batch) for leaf in self.leaves]

    def rows(self, leaves: list[Tensor]) -> list[Tensor]:
        """Each leaf as (B, n) real numbers in memory order."""
        return [leaf.rows(t) for t, leaf in zip(leaves, self.leaves, strict=True)]

    def _autocast_made(self, t: Tensor, leaf: Leaf) -> bool:
        narrower = not leaf.complex and t.dtype in _NARROWER[leaf.dtype]
        return narrower and torch.is_autocast_enabled(self.device.type)

    def _describe(self) -> str:
        return "one tensor" if self.single else str(pytree.tree_unflatten(["*"] * len(self.leaves), self.spec))


def _kind(tree: Any) -> str:
    return "one tensor" if isinstance(tree, Tensor) else f"a {type(tree).__name__}: {pytree.tree_structure(tree)}"
