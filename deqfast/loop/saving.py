"""A solve in progress as a dict of tensors and numbers, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.layout import Layout
from ..ops.workspace import Workspace
from .outputs import Outputs

ENTRIES = ("options", "layout", "nfe", "before", "running", "wakings", "copies_f", "copies_z", "tensors")


def save(method: Any, ws: Workspace, outputs: Outputs, nfe: int, running: int, wakings: int) -> dict[str, Any]:
    """Copies of everything a later step reads, and what they are of."""
    tensors = {name: t.clone() for name, t in ws.tensors().items()}
    for i, t in enumerate(outputs.previous or []):
        tensors[f"previous.{i}"] = t.clone()
    if outputs.previous_rows is not None:
        tensors["previous_rows"] = outputs.previous_rows.clone()
    return {
        "options": repr(method),
        "layout": repr(ws.layout),
        "nfe": nfe,
        "before": ws.before,
        "running": running,
        "wakings": wakings,
        "copies_f": outputs.copies_f,
        "copies_z": outputs.copies_z,
        "tensors": tensors,
    }


def check(saved: dict[str, Any], method: Any, ws: Workspace) -> None:
    """Raise ValueError unless ``saved`` is of a solve with these options and tensors like those of ``ws``."""
    for name in ENTRIES:
        if name not in saved:
            raise ValueError(f"state_dict has no entry {name!r}")
    for name, own in (("options", repr(method)), ("layout", repr(ws.layout))):
        if saved[name] != own:
            raise ValueError(f"state_dict was saved with {name} {saved[name]}, this state has {own}")
    tensors = saved["tensors"]
    for name, (shape, dtype) in ws.expected(tensors).items():
        got = tensors.get(name)
        if got is None or tuple(got.shape) != shape or got.dtype != dtype:
            what = "nothing" if got is None else f"{tuple(got.shape)} {got.dtype}"
            raise ValueError(f"state_dict entry {name!r}: expected {shape} {dtype}, got {what}")


def load(saved: dict[str, Any], ws: Workspace, outputs: Outputs) -> None:
    """Put the tensors of a checked ``saved`` where the next step will look for them."""
    tensors: dict[str, Tensor] = saved["tensors"]
    ws.load(tensors)
    layout: Layout = ws.layout
    names = [f"previous.{i}" for i in range(len(layout.leaves))]
    previous = [tensors[name].to(layout.device, copy=True) for name in names if name in tensors]
    rows = tensors.get("previous_rows")
    outputs.start = [] if saved["nfe"] else [t.clone() for t in ws.x[ws.cur]]
    outputs.copies_f, outputs.copies_z = saved["copies_f"], saved["copies_z"]
    outputs.hold(previous or None, None if rows is None else rows.to(layout.device, copy=True), settled=False)
