"""What a workspace holds, in a form that does not tell how it lies in memory: what is saved, and read again.

The numbers of a sample keep the dims of the leaf that they belong to, in the order in which the caller has them, so
that a part of a sample, on one of several ranks, is a slice of each tensor, and so is a part of the batch:

    ints, reals                  (16, B), (8, B)
    norms                        (B, 2, m), of Broyden (B, 1, memory)
    matrix, gram                 (B, m, m), zero where the workspace keeps none
    ages                         (B, m)
    scales                       (2, B, m, blocks)
    history.i                    (2, B, m, ...), of Broyden (1, B, memory, ...)
    x.i, x_prev.i, saved.i       (B, ...)

Complex columns have a last dim of 2. What is of samples of unequal length, or of a workspace from elsewhere, is saved
as it lies.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .layout import Leaf
from .workspace import Workspace

ITERATES = ("x", "x_prev", "saved")


def views(ws: Workspace) -> dict[str, Tensor]:
    """Every tensor that a later step reads, by name; views where memory allows it."""
    return _views(ws)[0]


def _views(ws: Workspace) -> tuple[dict[str, Tensor], Tensor | None]:
    """``views``, and the columns that they are of."""
    B = ws.layout.B
    ws.settle()
    found = {"ints": ws.ints[:, :B], "reals": ws.reals[:, :B]}
    small, rows = ws.small(), None
    if small is None:
        found |= ws.own()
    else:
        found |= small
        rows = ws.rows()
        found |= {f"history.{i}": t for i, t in enumerate(_split(rows, ws.layout.leaves))}
    for name, leaves in zip(ITERATES, (ws.x[ws.cur], ws.x[1 - ws.cur], ws.saved), strict=True):
        found |= named(name, leaves)
    return found | ws.given(), rows


def named(name: str, leaves: list[Tensor]) -> dict[str, Tensor]:
    """Views of leaves (B, ...), each with at least one dim of numbers."""
    return {f"{name}.{i}": t if t.dim() > 1 else t[:, None] for i, t in enumerate(leaves)}


def take(ws: Workspace, saved: Mapping[str, Tensor]) -> None:
    """The inverse of ``views``."""
    found, rows = _views(ws)
    taken = () if rows is None else ws.take_small(saved)
    for name, t in found.items():
        if name not in taken and t.numel():
            t.copy_(saved[name])
    if rows is not None:
        ws.take_rows(rows)


def _split(rows: Tensor, leaves: list[Leaf]) -> list[Tensor]:
    """(..., N) as (..., numbers of a leaf in the order of its dims) for each leaf; views."""
    found, start = [], 0
    for leaf in leaves:
        part = rows.narrow(-1, start, leaf.n)
        start += leaf.n
        outer = part.dim() - 1
        inner = [leaf.shape[d] for d in leaf.order[1:]] or [1]
        back = sorted(range(len(inner)), key=lambda d: leaf.order[1:][d]) if len(leaf.shape) > 1 else [0]
        part = part.unflatten(-1, (*inner, 2) if leaf.complex else inner)
        last = [part.dim() - 1] if leaf.complex else []
        found.append(part.permute(*range(outer), *(outer + d for d in back), *last))
    return found
