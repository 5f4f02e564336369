"""``root``: the fixed point of z + g(z)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import compiled
from .naming import check_names
from .ops.layout import as_tuples
from .options import check_callable
from .solution import Solution
from .solve import fixed_point, unpacked

_OPTIONS = [name for name, p in inspect.signature(fixed_point).parameters.items() if p.kind is p.KEYWORD_ONLY]


@compiled.skip
def root(g: Callable[..., Any], z0: Any, args: tuple[Any, ...] = (), **options: Any) -> Solution:
    """Solve g(z, *args) = 0 as the fixed point of z + g(z, *args).

    Takes every option of ``fixed_point``; stops a sample on ||g(z)|| <= atol + rtol ||z + g(z)||.
    """
    check_callable("g", g)
    check_names("root", options, _OPTIONS)
    unpack = options.pop("unpack", False)
    if unpack is not False:
        g = unpacked(g, z0, unpack)
    way = _shifted_beside_aux if options.get("has_aux") is True else _shifted
    return fixed_point(functools.partial(way, g), z0, args, **options)


@compiled.skip
def _shifted_beside_aux(g: Callable[..., Any], z: Any, *args: Any, **kwargs: Any) -> Any:
    found = g(z, *args, **kwargs)
    if not isinstance(found, tuple) or len(found) != 2:
        return found  # which is refused where aux is taken off
    return _sum(z, found[0]), found[1]


@compiled.skip
def _shifted(g: Callable[..., Any], z: Any, *args: Any, **kwargs: Any) -> Any:
    return _sum(z, g(z, *args, **kwargs))


@compiled.skip
def _sum(z: Any, value: Any) -> Any:
    expected, got = pytree.tree_structure(z), pytree.tree_structure(value)
    if expected != got and pytree.tree_structure(as_tuples(z)) != pytree.tree_structure(as_tuples(value)):
        raise TypeError(f"g(z) must have the structure of z0, expected {expected}, got {got}")
    pairs = list(zip(pytree.tree_leaves(z), pytree.tree_leaves(value), strict=True))
    for t, v in pairs:
        if not isinstance(v, Tensor) or v.shape != t.shape:
            shape = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"g(z) must have the shape of z0, expected {tuple(t.shape)}, got {shape}")
        # The sum has the wider dtype, so that f's own check could not see a narrower one.
        if v.dtype is not t.dtype and not torch.is_autocast_enabled(t.device.type):
            raise TypeError(f"g(z) must have the dtype of z0, expected {t.dtype}, got {v.dtype}")
    return pytree.tree_unflatten([t + v for t, v in pairs], expected)
