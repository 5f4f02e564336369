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

import torch
from torch import Tensor

from .anderson import SCALED_DTYPES, AndersonWorkspace
from .broyden import BroydenWorkspace
from .codes import Int
from .layout import Leaf
from .workspace import Workspace, tile, untile

ITERATES = ("x", "x_prev", "saved")


def views(ws: Workspace) -> dict[str, Tensor]:
    """Every tensor that a later step reads, by name; views where memory allows it."""
    B = ws.layout.B
    ws.settle()
    found = {"ints": ws.ints[:, :B], "reals": ws.reals[:, :B]}
    if not _known(ws):
        found |= ws.own()
    else:
        found |= _small(ws)
        found |= {f"history.{i}": t for i, t in enumerate(_split(_rows(ws), ws.layout.leaves))}
    for name, leaves in zip(ITERATES, (ws.x[ws.cur], ws.x[1 - ws.cur], ws.saved), strict=True):
        found |= named(name, leaves)
    if isinstance(ws, AndersonWorkspace) and ws.own_residual is not None and ws.own_columns is not None:
        found |= {"own_residual": ws.own_residual, "own_columns": ws.own_columns}
    return found


def named(name: str, leaves: list[Tensor]) -> dict[str, Tensor]:
    """Views of leaves (B, ...), each with at least one dim of numbers."""
    return {f"{name}.{i}": t if t.dim() > 1 else t[:, None] for i, t in enumerate(leaves)}


def take(ws: Workspace, saved: Mapping[str, Tensor]) -> None:
    """The inverse of ``views``."""
    found = views(ws)
    tiled = _take_tiled(ws, saved) if _known(ws) else []
    for name, t in found.items():
        if name not in tiled and t.numel():
            t.copy_(saved[name])


def keeps_products(ws: Workspace) -> bool:
    """Whether ``gram`` and ``matrix`` are there, and not made anew at every step."""
    if isinstance(ws, AndersonWorkspace):
        return ws.keeps_products
    return isinstance(ws, BroydenWorkspace) and ws.gram.shape[1] > 0


def _known(ws: Workspace) -> bool:
    return not ws.parts and isinstance(ws, (AndersonWorkspace, BroydenWorkspace))


def is_scaled(ws: Workspace) -> bool:
    """Whether its columns have scales."""
    return isinstance(ws, AndersonWorkspace) and ws.history.dtype in SCALED_DTYPES


def make_gram(ws: BroydenWorkspace) -> Tensor:
    """(B, memory, memory) double: products of the steps with each other, of the numbers that are here."""
    count = ws.int_row(Int.COUNT)
    kept = torch.arange(ws.method.memory, device=count.device) < count[:, None]
    steps = ws.history.double().masked_fill(~kept[:, :, None], 0)  # the others may be anything
    return torch.bmm(steps, steps.mT)


def _small(ws: Workspace) -> dict[str, Tensor]:
    B = ws.layout.B
    if isinstance(ws, BroydenWorkspace):
        k = ws.method.memory
        return {"norms": ws.norms[:, None], "gram": ws.gram if keeps_products(ws) else ws.norms.new_zeros(B, k, k)}
    assert isinstance(ws, AndersonWorkspace)
    small = {name: untile(getattr(ws, name), B) for name in ("norms", "ages", "matrix", "gram")}
    if not ws.keeps_products:
        m = ws.method.m
        side = m if ws.method.test_space else 0
        small |= {"matrix": ws.norms.new_zeros(B, side, side), "gram": ws.norms.new_zeros(B, m, m)}
    return {**small, "scales": ws.scales}


def _take_tiled(ws: Workspace, saved: Mapping[str, Tensor]) -> list[str]:
    """Read what is no view; its names."""
    if isinstance(ws, BroydenWorkspace):
        return [] if keeps_products(ws) else ["gram"]  # which is not wanted
    assert isinstance(ws, AndersonWorkspace)
    small = ["norms", "ages", "matrix", "gram"]
    for name in small if ws.keeps_products else small[:2]:
        getattr(ws, name).copy_(tile(saved[name], ws.tiles))
    if ws.keeps_products:
        return small
    for i, columns in enumerate(ws.history):
        columns.copy_(tile(saved["history.0"][i].reshape(ws.layout.B, ws.method.m, ws.layout.N), ws.tiles))
    return [*small, "history.0"]


def _rows(ws: Workspace) -> Tensor:
    """(2 or 1, B, columns, N)."""
    if isinstance(ws, BroydenWorkspace):
        return ws.history[None]
    assert isinstance(ws, AndersonWorkspace)
    return ws.history if ws.keeps_products else torch.stack([ws.columns(0), ws.columns(1)])


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
