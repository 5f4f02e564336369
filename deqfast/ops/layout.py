"""How a batched state lies in memory: leaves, order of their dimensions, rows.

A state is a pytree of tensors that share what counts samples (``samples.py``: dim 0, several leading dims, none, or
segments of rows). Inside, each tensor is a "leaf" (B, ...): batch-outermost and dense, with its inner dimensions in the
order in which ``z0`` stores them, so that a channels_last state stays channels_last. A sample is then one dense row per
leaf; nothing is ever concatenated. Trees have the caller's shapes, lists of leaves those of the samples, and
``flatten`` and ``unflatten`` are the only way between them.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .samples import FIRST_DIM, Group, Samples
from .segments import samples_of

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

    def resized(self, batch: int) -> Leaf:
        """The same leaf of so many samples."""
        leaf = copy.copy(self)
        leaf.shape = torch.Size((batch, *self.shape[1:]))
        return leaf

    def rows(self, t: Tensor) -> Tensor:
        """``t`` as (B, n) real numbers in memory order: a view where ``t`` is dense in that order, else a copy."""
        t = t.permute(self.order)
        if self.complex:
            t = torch.view_as_real(t.resolve_conj())
        return t.reshape(t.shape[0], self.n)


def layout_of(z0: Any, batch_dims: int, segments: Any = None, name: str = "z0", pads: bool | None = None) -> Layout:
    """The layout of a state whose samples are counted by options that have been checked.

    ``pads``: how segments of unequal length are laid out, see ``segments.py``.
    """
    if batch_dims == 1 and segments is None:
        return Layout(z0, name)
    first = z0 if isinstance(z0, Tensor) else next(iter(pytree.tree_leaves(z0)), None)
    return Layout(z0, name, samples_of(batch_dims, segments, first if isinstance(first, Tensor) else None, pads))


class Layout:
    """Structure and memory layout of a batched state.

    ``B`` samples of ``N`` real numbers each, counted by ``batch_shape``; ``dtype`` is the real dtype they are stored
    in, ``acc`` the one in which dot products and small solves run. Of samples of unequal length ``N`` is the longest's,
    leaves are the rows of all, and ``parts`` has a layout for those of each length.
    """

    def __init__(self, z0: Any, name: str = "z0", samples: Samples = FIRST_DIM) -> None:
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
        first = leaves[0]
        samples.check(leaves, name)
        for t in leaves[1:]:
            if real_dtype(t.dtype) != real_dtype(first.dtype):
                raise TypeError(f"tensors of {name} must share one precision, got {first.dtype} and {t.dtype}")
            if t.device != first.device:
                raise ValueError(f"tensors of {name} must be on one device, got {first.device} and {t.device}")
        if first.is_meta:
            raise ValueError(f"{name} must hold data, got a tensor on device meta")
        self.samples = samples.of(first)
        self.shapes = [t.shape for t in leaves]
        self.leaves = [Leaf(self.samples.split(t)) for t in leaves]
        self.batch_shape = (first.shape[0],) if self.samples is FIRST_DIM else self.samples.shape
        self.B = math.prod(self.batch_shape)
        self.N = sum(leaf.n for leaf in self.leaves)
        self.spread_n = 0  # numbers a sample on all ranks, where samples are spread over some; 0: they are whole here
        self.dtype = real_dtype(first.dtype)
        self.acc = accumulation_dtype(self.dtype)
        self.device = first.device
        self.parts: list[tuple[Group, Layout]] = []
        if self.samples.groups:
            rows = self.empty()
            self.parts = [(group, self._part(group, rows)) for group in self.samples.groups]
            self.N = max(part.N for _, part in self.parts)

    def __repr__(self) -> str:
        return self.described([(tuple(leaf.shape), leaf.order) for leaf in self.leaves])

    def described(self, leaves: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
        """Structure, dtypes and samples, with these shapes and orders of the leaves."""
        samples = "" if self.samples is FIRST_DIM else f", {self.samples!r}"
        pairs = zip(leaves, self.leaves, strict=True)
        shown = ", ".join(f"{shape} {leaf.dtype} in order {order}" for (shape, order), leaf in pairs)
        return f"{self._describe()}: {shown}{samples}"

    def _part(self, group: Group, rows: list[Tensor]) -> Layout:
        """The layout of the samples of one group, whose rows are views."""
        part = copy.copy(self)
        leaves = [group.of(t) for t in rows]
        part.samples, part.leaves, part.shapes = FIRST_DIM, [Leaf(t) for t in leaves], [t.shape for t in leaves]
        part.B, part.batch_shape = group.count, (group.count,)
        part.N = self.N * group.length
        return part

    def resized(self, rows: int) -> Layout:
        """The layout of such a state with so many rows of dim 0.

        Raises:
            ValueError: samples are no rows of dim 0.
        """
        layout = copy.copy(self)
        layout.samples = self.samples.resized(rows)
        layout.batch_shape = (rows, *self.batch_shape[1:])
        layout.B = math.prod(layout.batch_shape)
        layout.shapes = [torch.Size((rows, *shape[1:])) for shape in self.shapes]
        layout.leaves = [leaf.resized(layout.B) for leaf in self.leaves]
        return layout

    def flatten(self, tree: Any, name: str, batch: int | None = None) -> list[Tensor]:
        """The leaves of ``tree``, checked against this layout; under autocast a narrower float is accepted.

        ``batch`` replaces the size of dim 0 when converged samples have been dropped.

        Raises:
            TypeError, ValueError: naming ``name``, what was expected and what came.
        """
        tensors, spec = ([tree], _LEAF) if isinstance(tree, Tensor) else pytree.tree_flatten(tree)
        if spec != self.spec and not self._alike(tree):
            hint = f"; the keys of a dict must come in {self.name}'s order" if isinstance(tree, dict) else ""
            got = _kind(tree) + hint
            raise TypeError(f"{name} must have the structure of {self.name}, expected {self._describe()}, got {got}")
        for t, leaf, own in zip(tensors, self.leaves, self.shapes, strict=True):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must hold tensors, got a {type(t).__name__}")
            shape = own if batch is None else (batch, *own[1:])
            if t.shape != shape:
                sizes = f"expected {tuple(shape)}, got {tuple(t.shape)}"
                raise ValueError(f"{name} must have the shape of {self.name}, {sizes}")
            if t.dtype != leaf.dtype and not self._autocast_made(t, leaf):
                raise TypeError(f"{name} must have the dtype of {self.name}, expected {leaf.dtype}, got {t.dtype}")
            if t.device != self.device:
                raise ValueError(f"{name} must be on the device of {self.name}, expected {self.device}, got {t.device}")
            if t.layout != torch.strided:
                raise TypeError(f"{name} must be a dense (strided) tensor, got layout {t.layout}")
        return tensors if self.samples is FIRST_DIM else [self.samples.split(t) for t in tensors]

    def tensors(self, tree: Any) -> list[Tensor]:
        """The leaves of a tree that is known to be like z0."""
        tensors = [tree] if self.single else pytree.tree_leaves(tree)
        return tensors if self.samples is FIRST_DIM else [self.samples.split(t) for t in tensors]

    def unflatten(self, leaves: list[Tensor]) -> Any:
        """The tree of z0 with these leaves."""
        if self.samples is not FIRST_DIM:
            leaves = [self.samples.join(t) for t in leaves]
        return leaves[0] if self.single else pytree.tree_unflatten(leaves, self.spec)

    @property
    def total(self) -> int:
        """Numbers a sample, wherever they are."""
        return self.spread_n or self.N

    def counted(self, t: Tensor) -> Tensor:
        """(..., B) numbers, one a sample, in the shape and order that count samples."""
        return self.samples.counted(t)

    def counted_rows(self, t: Tensor) -> Tensor:
        """(rows, B and more) numbers as they are, but for the order of samples."""
        return self.samples.counted(t[:, : self.B]) if self.parts else t

    def spread(self, t: Tensor) -> Tensor:
        """(B,) numbers, one a sample, as one for each row of the leaves."""
        return self.samples.spread(t)

    def numbers(self) -> Tensor:
        """(B,) how many numbers each sample has, in the accumulation dtype."""
        if not self.parts:
            return torch.full((self.B,), self.total, dtype=self.acc, device=self.device)
        of_parts = [torch.full((part.B,), part.N, dtype=self.acc) for _, part in self.parts]
        return torch.cat(of_parts).to(self.device)

    def finite(self, leaves: list[Tensor]) -> Tensor:
        """(B,) bool: samples all of whose numbers are finite."""
        broken = torch.stack([~torch.isfinite(t.reshape(t.shape[0], -1)).all(1) for t in leaves]).any(0)
        for_each = [group.of(broken).any(1) for group, _ in self.parts]
        return ~(torch.cat(for_each) if for_each else broken)

    def empty(self, batch: int | None = None) -> list[Tensor]:
        """Uninitialised leaves in this layout."""
        return [leaf.empty(self.device, batch) for leaf in self.leaves]

    def select(self, leaves: list[Tensor], which: Tensor) -> list[Tensor]:
        """Copies of some samples, in the memory order of the leaves, which ``index_select`` alone would not keep."""
        chosen = self.empty(which.numel())
        for out, t in zip(chosen, leaves, strict=True):
            torch.index_select(t, 0, which, out=out)
        return chosen

    def rows(self, leaves: list[Tensor]) -> list[Tensor]:
        """Each leaf as (B, n) real numbers in memory order."""
        return [leaf.rows(t) for t, leaf in zip(leaves, self.leaves, strict=True)]

    def _autocast_made(self, t: Tensor, leaf: Leaf) -> bool:
        narrower = not leaf.complex and t.dtype in _NARROWER[leaf.dtype]
        return narrower and torch.is_autocast_enabled(self.device.type)

    def _alike(self, tree: Any) -> bool:
        """Whether a tree differs from z0 in what is a list and what a tuple, and in nothing else."""
        own = pytree.tree_unflatten(["*"] * len(self.leaves), self.spec)
        return pytree.tree_structure(as_tuples(tree)) == pytree.tree_structure(as_tuples(own))

    def _describe(self) -> str:
        return "one tensor" if self.single else str(pytree.tree_unflatten(["*"] * len(self.leaves), self.spec))


def as_tuples(tree: Any) -> Any:
    """The tree with tuples for its lists."""
    if type(tree) in (list, tuple):
        return tuple(map(as_tuples, tree))
    return {key: as_tuples(value) for key, value in tree.items()} if type(tree) is dict else tree


def _kind(tree: Any) -> str:
    return "one tensor" if isinstance(tree, Tensor) else f"a {type(tree).__name__}: {pytree.tree_structure(tree)}"
