"""A solve in progress as a dict of tensors and numbers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import canonical
from ..ops.shared import Group
from ..ops.shares import Cut, Share, local
from ..ops.workspace import Workspace
from .outputs import Outputs

# What has to be the same in the state that takes it up; the first that is not is named.
SAME = ("options", "layout", "columns", "scales")
ENTRIES = (
    *SAME,
    "nfe",
    "before",
    "running",
    "wakings",
    "copies_f",
    "copies_z",
    "has_previous",
    "has_products",
    "has_origin",
    "has_residual",
    "tensors",
)


def description(method: Any, ws: Workspace, cut: Cut | None) -> dict[str, Any]:
    """``SAME`` of a state."""
    layout = repr(ws.layout) if cut is None else cut.layout
    columns = getattr(ws.parts[0] if ws.parts else ws, "method", ())[:1]  # m, or memory, in either method
    scales = "none"
    if ws.is_scaled:  # a scale is of numbers that lie together, and they do on one rank
        scales = "of whole samples" if cut is None else cut.shown
    return {"options": repr(method), "layout": layout, "columns": int(columns[0]) if columns else 0, "scales": scales}


def cut_of(group: Group, ws: Workspace, said: dict[str, Any]) -> Cut:
    """How ranks have cut the solve; on every rank at once, each with what it has to say."""
    scales = getattr(ws, "scales", None)
    return Cut(group, ws.layout, said, 0 if scales is None else scales.shape[3])


def tensors(ws: Workspace, outputs: Outputs, largest: Tensor | None) -> dict[str, Tensor]:
    """Copies of every tensor that a later step reads; of what there is not now, but may be, zeros."""
    found = {name: t.clone() for name, t in canonical.views(ws).items()}
    if outputs.uses_previous:
        found |= canonical.named("previous", _previous(ws, outputs))
    found["largest"] = found["reals"].new_zeros(ws.layout.B) if largest is None else largest.clone()
    return found


def _previous(ws: Workspace, outputs: Outputs) -> list[Tensor]:
    """Copies of f at the previous iterate, of every sample, in the form of the iterates."""
    leaves, rows = ws.layout.empty(), outputs.previous_rows
    for i, t in enumerate(leaves):
        if outputs.previous is None:
            t.zero_()
        elif rows is None:
            t.copy_(outputs.previous[i])
        else:  # samples that f did not see have stopped
            t.copy_(outputs.previous[i].index_select(0, rows.clamp(min=0)))
    return leaves


def check(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``saved`` is of a solve that is described by ``own``."""
    for name in ENTRIES:
        if name not in saved:
            raise ValueError(f"state_dict has no entry {name!r}")
    check_same(saved, own)


def check_same(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """The part of ``check`` that needs no tensor."""
    for name in SAME:
        if saved[name] != own[name]:
            raise ValueError(f"state_dict was saved with {name} {saved[name]}, this state has {own[name]}")


def check_tensors(saved: Mapping[str, Any], ws: Workspace, outputs: Outputs, cut: Cut | None) -> None:
    """Raise ValueError unless the tensors are like those of ``ws``."""
    given: Mapping[str, Tensor] = saved["tensors"]
    expected = canonical.views(ws)
    if outputs.uses_previous:
        expected |= canonical.named("previous", ws.x[0])
    expected["largest"] = expected["reals"][0]
    for name, t in _with_residual(expected, saved, ws).items():
        own = t if cut is None else cut.of(name, t)
        got = given.get(name)
        if got is None or _place(got) != _place(own):
            what = "nothing" if got is None else _place(got)
            raise ValueError(f"state_dict entry {name!r}: expected {_place(own)}, got {what}")
    if ws.has_products != saved["has_products"] and not ws.makes_products:
        raise ValueError(
            "state_dict is of samples of at most 8 numbers, which are spread over ranks in the one state and not in "
            "the other: their products are kept in one of the two alone"
        )


def _with_residual(expected: dict[str, Tensor], saved: Mapping[str, Any], ws: Workspace) -> dict[str, Tensor]:
    """What is to be there of a residual of the caller's own, which has any size."""
    names = ("own_residual", "own_columns")
    if saved["has_residual"]:
        given = saved["tensors"]
        rows = given[names[0]].shape[1:] if names[0] in given else (0,)
        sizes = ((ws.layout.B, *rows), (ws.layout.B, ws.method[0], *rows))
        expected |= {name: torch.empty(size, dtype=ws.layout.acc) for name, size in zip(names, sizes, strict=True)}
    return expected


def _place(t: Tensor) -> str:
    """Shape and dtype, and where in the whole a part of it is."""
    shown = f"{tuple(t.shape)} {t.dtype}"
    if not isinstance(t, Share):
        return shown
    return f"{shown}, of it {tuple(t.local.shape)} from {t.offset} on" if t.local.numel() else f"{shown}, of it nothing"


def load(saved: Mapping[str, Any], ws: Workspace, outputs: Outputs, group: Group | None) -> None:
    """Put the tensors of a checked ``saved`` where the next step will look for them."""
    given = {name: local(t) for name, t in saved["tensors"].items()}
    layout = ws.layout
    canonical.take(ws, given)
    if ws.has_products and not saved["has_products"]:
        products = ws.make_products()
        if group is not None and group.spread:
            group.ranks.add(products)
        ws.take_products(products)
    previous = None
    if saved["has_previous"]:
        previous = layout.empty()
        for i, t in enumerate(previous):
            t.copy_(given[f"previous.{i}"].view_as(t))
    outputs.start = [] if saved["nfe"] else [t.clone() for t in ws.x[ws.cur]]
    outputs.copies_f, outputs.copies_z = saved["copies_f"], saved["copies_z"]
    outputs.hold(previous, None, settled=False)
