"""Where f's output lies, told to a plan: dense, narrower than the state, or through strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layout import Leaf
from .extension import CODES

MAX_DIMS = 16  # that the kernels walk through; outputs of more are copied


def place(source: Callable[..., None], t: Tensor, leaf: Leaf) -> Tensor:
    """Tell a plan where f's output for a leaf lies; returns the tensor to keep alive until the step is launched."""
    if leaf.plain and t.is_contiguous() and not t.is_neg():
        source(t.data_ptr(), CODES[t.dtype], leaf.n, True, [leaf.n], [1])
        return t
    view = _real_view(t, leaf)
    sizes, strides = _coalesce(view.shape[1:], view.stride()[1:])
    if len(sizes) > MAX_DIMS:
        view = view.contiguous()
        sizes, strides = [view[0].numel()], [1]
    dense = len(sizes) == 0 or (len(sizes) == 1 and strides[0] == 1)
    source(view.data_ptr(), CODES[view.dtype], view.stride(0), dense, sizes, strides)
    return view


def _real_view(t: Tensor, leaf: Leaf) -> Tensor:
    """``t`` with its inner dimensions in the leaf's memory order, complex numbers as pairs."""
    t = t.permute(leaf.order)
    return torch.view_as_real(t.resolve_conj()) if leaf.complex else t.resolve_neg()


def _coalesce(shape: Any, stride: Any) -> tuple[list[int], list[int]]:
    """Merge neighbouring dimensions that one stride walks through."""
    sizes: list[int] = []
    strides: list[int] = []
    for n, step in zip(shape, stride, strict=True):
        if n == 1:
            continue
        if sizes and strides[-1] == n * step:
            sizes[-1] *= n
            strides[-1] = step
        else:
            sizes.append(n)
            strides.append(step)
    return sizes, strides
