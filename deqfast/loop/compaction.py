"""Dropping converged samples from what f sees, when f treats samples independently.

The cost of a solve becomes the sum of the samples' own evaluations instead of B times the slowest. The batch shrinks
by halves, so that f meets few distinct shapes; a shrunk batch is filled up with finished samples, whose rows the ops
ignore.
"""

from __future__ import annotations

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
        follow: True: every tensor of args whose dim 0 is B is batch-first; or a pytree of bools shaped like args.

    Raises:
        ValueError: ``follow`` is not shaped like args, or names a tensor whose dim 0 is not B.
    """

    def __init__(self, state: SolverState, args: tuple[Any, ...], follow: Any) -> None:
        self.state = state
        self.args = args
        self._leaves, self._spec = pytree.tree_flatten(args)
        self._follows = self._who_follows(follow)
        self._batch = state.layout.B
        self._chosen: Tensor | None = None  # samples that f sees, None: all
        self._rows: Tensor | None = None  # sample -> row of what f sees, -1: dropped

    def _who_follows(self, follow: Any) -> list[bool]:
        B = self.state.layout.B
        if follow is True:
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

    def inputs(self) -> tuple[Any, tuple[Any, ...]]:
        """The iterate and args for the samples that f has to see now."""
        alive = self.state.known_running
        size = self._batch
        while size > 1 and (size + 1) // 2 >= alive:
            size = (size + 1) // 2
        if size < self._batch:
            self._shrink(self.state.running, size)
        if self._chosen is None:
            return self.state.z, self.args
        layout = self.state.layout
        some = layout.empty(self._batch)  # keeps the memory format, which index_select alone would not
        for out, t in zip(some, pytree.tree_leaves(self.state.z), strict=True):
            torch.index_select(t, 0, self._chosen, out=out)
        return layout.unflatten(some), self._args_now

    def step(self, fz: Any) -> bool:
        """Feed f's output back; returns whether the solve is done."""
        leaves = self.state.layout.flatten(fz, "f(z)", self._batch)
        return self.state.advance(leaves, self._rows)

    def _shrink(self, running: Tensor, size: int) -> None:
        self._batch = size
        order = torch.argsort(running.int(), descending=True, stable=True)
        self._chosen = order[:size].sort().values
        self._rows = torch.full((running.shape[0],), -1, dtype=torch.int32, device=running.device)
        self._rows[self._chosen] = torch.arange(size, dtype=torch.int32, device=running.device)
        gathered = [
            t.index_select(0, self._chosen) if follows else t
            for t, follows in zip(self._leaves, self._follows, strict=True)
        ]
        self._args_now = pytree.tree_unflatten(gathered, self._spec)
