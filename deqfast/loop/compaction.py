"""Dropping converged samples from what f sees, when f treats samples independently.

The cost of a solve becomes the sum of the samples' own evaluations instead of B times the slowest. The batch shrinks
by halves, so that f meets few distinct shapes; a shrunk batch is filled up with finished samples, whose rows the ops
ignore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .state import SolverState


class Compactor:
    """Gathers z and batch-first args for the running samples, and feeds f's smaller output back.

    Args:
        state: the solve.
        args: what f receives after z.
        follow: True: every tensor of args whose dim 0 is that of z follows; or a pytree of bools shaped like args.

    Raises:
        ValueError: ``follow`` is not shaped like args, names a tensor whose dim 0 is not that of z, or is True where a
            tensor's shape does not say whether it follows.
    """

    def __init__(self, state: SolverState, args: tuple[Any, ...], follow: Any) -> None:
        self.state = state
        self.args = args
        self._leaves, self._spec = pytree.tree_flatten(args)
        self._all = self._size = state.layout.batch_shape[0]  # rows of dim 0, and how many f sees
        self._inner = state.layout.B // max(1, self._all)  # samples a row
        self._follows = self._who_follows(follow)
        self._confirms = follow is True
        self._independent = True
        self._chosen: Tensor | None = None  # samples that f sees, None: all
        self._rows: Tensor | None = None  # sample -> row of what f sees, -1: dropped

    def _who_follows(self, follow: Any) -> list[bool]:
        B = self._all
        if follow is True:
            self._refuse_ambiguous()
            return [isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == B for t in self._leaves]
        flags, spec = pytree.tree_flatten(tuple(follow) if isinstance(follow, list) else follow)
        if spec != self._spec or not all(isinstance(b, bool) for b in flags):
            raise ValueError(
                f"compact must be a bool or a tree of bools shaped like args ({self._spec}), got {follow!r}"
            )
        for t, follows in zip(self._leaves, flags, strict=True):
            if follows and not (isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == B):
                got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
                raise ValueError(
                    f"compact says that an argument follows the batch; expected dim 0 to be {B}, got {got}"
                )
        return flags

    def _refuse_ambiguous(self) -> None:
        """Raise ValueError where a shape does not say whether dim 0 of an argument is the batch."""
        B = self._all
        inner = [tuple(shape[1:]) for shape in self.state.layout.shapes]
        for i, t in enumerate(self._leaves):
            if not (isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == B > 1):
                continue
            shape = tuple(t.shape)
            why = None
            if shape.count(B) > 1:
                why = f"{shape.count(B)} of its dims are {B}"
            elif any(0 < len(shape) <= len(dims) and dims[len(dims) - len(shape) :] == shape for dims in inner):
                why = f"it fits the last dims of a sample, {shape}, as well"
            if why is not None:
                names = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == B for leaf in self._leaves]
                tree = pytree.tree_unflatten(names, self._spec)
                names[i] = False
                raise ValueError(
                    f"compact=True cannot tell whether dim 0 of an argument of shape {shape} counts the {B} samples: "
                    f"{why}. Say which arguments follow the batch, such as compact={tree!r} if it does, or "
                    f"compact={pytree.tree_unflatten(names, self._spec)!r} if it does not"
                )

    def evaluate(self, f: Callable[..., Any]) -> tuple[list[Tensor], Tensor | None]:
        """Evaluate f at the running samples and step; its leaves, and where the samples are in them (None: all)."""
        state = self.state
        if self.unsure:
            # Where that wakes a sample f is none that treats them independently: nothing is dropped from then on.
            self._independent = False
            self._size, self._chosen, self._rows = self._all, None, None
            fz = f(state.z, *self.args)
            state.verify(fz)
            return state.layout.flatten(fz, "f(z)"), None
        z, args = self._inputs()
        leaves = state.layout.flatten(f(z, *args), "f(z)", self._size)
        state.advance(leaves, self._rows)
        return leaves, self._rows

    @property
    def unsure(self) -> bool:
        """Every sample has stopped, f has not seen all of them for a while, and nobody but a shape said it need not."""
        return self._confirms and self._rows is not None and self.state.done

    def _inputs(self) -> tuple[Any, tuple[Any, ...]]:
        """The iterate and args for the samples that f has to see now."""
        state, layout = self.state, self.state.layout
        if self._independent:
            alive = state.known_running
            if self._inner > 1:  # samples share a row
                alive = int(self._running_rows().sum())
            size = self._size
            while size > 1 and (size + 1) // 2 >= alive:
                size = (size + 1) // 2
            if size < self._size:
                self._shrink(size)
        if self._chosen is None:
            return state.z, self.args
        some = layout.empty(self._size * self._inner)  # keeps the memory format, which index_select alone would not
        for out, t in zip(some, layout.tensors(state.z), strict=True):
            torch.index_select(t, 0, self._chosen, out=out)
        return layout.unflatten(some), self._args_now

    def _running_rows(self) -> Tensor:
        """Which rows of dim 0 hold a sample that runs."""
        return self.state.running.reshape(self._all, self._inner).any(1)

    def _shrink(self, size: int) -> None:
        self._size = size
        order = torch.argsort(self._running_rows().int(), descending=True, stable=True)
        chosen = order[:size].sort().values
        B, inner, device = self.state.layout.B, self._inner, chosen.device
        every = torch.arange(inner, device=device)
        self._chosen = (chosen[:, None] * inner + every).flatten()
        self._rows = torch.full((B,), -1, dtype=torch.int32, device=device)
        self._rows[self._chosen] = torch.arange(size * inner, dtype=torch.int32, device=device)
        gathered = [
            t.index_select(0, chosen) if follows else t for t, follows in zip(self._leaves, self._follows, strict=True)
        ]
        self._args_now = pytree.tree_unflatten(gathered, self._spec)
