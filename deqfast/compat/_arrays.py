"""NumPy arrays or torch tensors of any shape outside, flat tensors inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Arrays:
    """F from flat tensor to flat tensor, by what the caller's takes and returns.

    What F is given is a copy of its own, so that it may keep it.

    Args:
        F: the caller's.
        xin: its start; integers become float64.
        batched: dim 0 counts systems.

    Attributes:
        x: the start, (N,), or (B, N) if batched.
        evaluations: of F.
    """

    def __init__(self, F: Callable[[Any], Any], xin: Any, batched: bool) -> None:
        self._F = F
        self._torch = isinstance(xin, Tensor)
        x: Any = xin.detach() if self._torch else np.asarray(xin)
        inexact = x.is_floating_point() or x.is_complex() if self._torch else np.issubdtype(x.dtype, np.inexact)
        if not inexact:
            x = x.double() if self._torch else x.astype(np.float64)
        if batched and x.ndim < 1:
            raise ValueError("a batch has systems in dim 0, got a single number")
        self._shape = tuple(x.shape)
        if 0 in self._shape:
            raise ValueError(f"x must hold numbers, got shape {self._shape}")
        self._flat = (self._shape[0], x[0].size if not self._torch else x[0].numel()) if batched else (-1,)
        self.x: Tensor = self._inside(x)
        self.evaluations = 0

    def start(self) -> Tensor:
        """F at the start, which takes the precision of what it returns if that is higher."""
        found = self._call(self.x)
        fx = self._inside(found) if isinstance(found, Tensor) else self._inside(np.asarray(found))
        if not (fx.is_floating_point() or fx.is_complex()):
            fx = fx.to(self.x.dtype)
        self.x = self.x.to(torch.promote_types(self.x.dtype, fx.dtype))
        return fx.to(self.x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        found = self._call(x)
        fx = self._inside(found if self._torch else np.asarray(found))
        if fx.dtype == x.dtype:
            return fx
        if fx.is_complex() and not x.is_complex():
            raise TypeError(f"F(x) must be of the dtype of x, expected {x.dtype}, got {fx.dtype}")
        return fx.to(x.dtype)

    def _call(self, x: Tensor) -> Any:
        self.evaluations += 1
        found = self._F(self.user(x))
        if isinstance(found, Tensor) is not self._torch:
            if not self._torch:
                raise TypeError("F must return an array for an array, got a tensor")
            raise TypeError(f"F must return a tensor for a tensor, got {type(found).__name__}")
        size = found.numel() if isinstance(found, Tensor) else np.size(found)
        if size != self.x.numel():
            raise ValueError(f"F(x) must have the shape of x, expected {self._shape}, got {tuple(np.shape(found))}")
        return found

    def _inside(self, found: Any) -> Tensor:
        if not self._torch:
            found = torch.from_numpy(found if found.flags.writeable and found.flags.c_contiguous else found.copy("C"))
        return found.detach().reshape(self._flat)

    def user(self, x: Tensor) -> Any:
        """A copy, shaped and typed as the caller's."""
        if self._torch:
            return x.clone().view(self._shape)
        return x.numpy().copy().reshape(self._shape)

    def user_rows(self, rows: Tensor) -> Any:
        """One value a system, typed as the caller's."""
        return rows if self._torch else rows.numpy()

    def normed(self, norm: Callable[[Any], Any]) -> Callable[[Tensor], Any]:
        """The caller's norm of a flat tensor; of a batch a tensor (B,)."""
        batched = len(self._flat) == 2

        def of(v: Tensor) -> Any:
            found = norm(v if self._torch else v.numpy())
            return torch.as_tensor(found, device=v.device) if batched else float(found)

        return of
