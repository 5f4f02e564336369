"""What a solve asks of torch: operations, and memory beside what was there before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import pool
from .case import Case, Map

TENSORS = "bytes of the tensors alive, the most after any operation"
ALLOCATOR = "torch.cuda.max_memory_allocated"


class Tally(TorchDispatchMode):
    """Operations that are dispatched outside of f, and the tensors' memory.

    Attributes:
        operations: outside of f.
        peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.peak = 0
        self._within = False
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def of(self, f: Map) -> Map:
        """f, whose operations do not count."""

        def inside(z: Any) -> Any:
            self._within = True
            try:
                return f(z)
            finally:
                self._within = False

        return inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operations += not self._within
        given = {s._cdata for s in _storages((args, kwargs))}
        for storage in _storages(found):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return found


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def tally(case: Case, solve: Callable[[Map], Any], device: torch.device) -> tuple[int, int]:
    """Operations outside of f, and the peak of memory in bytes, of a solve without gradients."""
    with torch.no_grad():
        pool.clear()
        with Tally() as found:
            solve(found.of(case.f))
        if device.type != "cuda":
            return found.operations, found.peak
        pool.clear()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        solve(case.f)
        torch.cuda.synchronize(device)
        return found.operations, torch.cuda.max_memory_allocated(device) - before
