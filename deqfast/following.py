"""Which arguments of f go with the batch when it shrinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .ops.layout import Layout


@dataclass(frozen=True)
class Following:
    """Which leaves of args follow the batch, and how far that is believed.

    Attributes:
        flags: of each leaf of args, in order.
        tries: before the batch shrinks first, f of some of its rows is held against f of all.
        confirms: f of the whole batch confirms at the end.
    """

    flags: tuple[bool, ...]
    tries: bool
    confirms: bool

    def gather(self, args: tuple[Any, ...], rows: Tensor) -> tuple[Any, ...]:
        """The args of these rows of dim 0."""
        leaves, spec = pytree.tree_flatten(args)
        chosen = [t.index_select(0, rows) if f else t for t, f in zip(leaves, self.flags, strict=True)]
        found: tuple[Any, ...] = pytree.tree_unflatten(chosen, spec)
        return found


def following(compact: Any, args: tuple[Any, ...], layout: Layout) -> Following:
    """What ``compact=`` says of args, for a state of this layout.

    Args:
        compact: True or "auto": every tensor of args whose dim 0 is that of z follows; or a pytree of bools.
        args: what f receives after z.
        layout: of the state.

    Raises:
        ValueError: ``compact`` is not shaped like args, names a tensor whose dim 0 is not that of z, or is True where a
            tensor's shape does not say whether it follows.
    """
    leaves, spec = pytree.tree_flatten(args)
    rows = layout.batch_shape[0]
    by_shape = [isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == rows for t in leaves]
    if isinstance(compact, str):
        return Following(tuple(by_shape), tries=True, confirms=True)
    if compact is True:
        _refuse_ambiguous(leaves, spec, by_shape, layout)
        return Following(tuple(by_shape), tries=False, confirms=True)
    flags, given = pytree.tree_flatten(tuple(compact) if isinstance(compact, list) else compact)
    if given != spec or not all(isinstance(b, bool) for b in flags):
        raise ValueError(f"compact must be a bool or a tree of bools shaped like args ({spec}), got {compact!r}")
    for t, follows, can in zip(leaves, flags, by_shape, strict=True):
        if follows and not can:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"compact says that an argument follows the batch; expected dim 0 to be {rows}, got {got}")
    return Following(tuple(flags), tries=False, confirms=False)


def _refuse_ambiguous(leaves: list[Any], spec: Any, by_shape: list[bool], layout: Layout) -> None:
    """Raise ValueError where a shape does not say whether dim 0 of an argument is the batch."""
    rows = layout.batch_shape[0]
    inner = [tuple(shape[1:]) for shape in layout.shapes]
    for i, t in enumerate(leaves):
        if not by_shape[i] or rows <= 1:
            continue
        shape = tuple(t.shape)
        why = None
        if shape.count(rows) > 1:
            why = f"{shape.count(rows)} of its dims are {rows}"
        elif any(0 < len(shape) <= len(dims) and dims[len(dims) - len(shape) :] == shape for dims in inner):
            why = f"it fits the last dims of a sample, {shape}, as well"
        if why is not None:
            tree = pytree.tree_unflatten(by_shape, spec)
            other = pytree.tree_unflatten([b and k != i for k, b in enumerate(by_shape)], spec)
            raise ValueError(
                f"compact=True cannot tell whether dim 0 of an argument of shape {shape} counts the {rows} samples: "
                f"{why}. Say which arguments follow the batch, such as compact={tree!r} if it does, or "
                f'compact={other!r} if it does not; compact="auto" tries it'
            )
