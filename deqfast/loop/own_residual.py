"""A residual of the caller's own in place of f(z) - z, possibly in another space than z: Type II Anderson only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import contract
from ..ops.anderson import AndersonWorkspace
from ..ops.layout import Layout
from ..ops.workspace import Workspace


def takes_residual(ws: Workspace) -> AndersonWorkspace | None:
    """The workspace if its method can minimise another residual, else None."""
    if isinstance(ws, AndersonWorkspace) and ws.method.m and ws.method.test_space == 0 and ws.method.mixing == 1:
        return ws
    return None


def taken(
    ws: Workspace, method: Any, residual: Any, in_turn: bool, current: contract.Backend, asked: str
) -> tuple[contract.Backend, AndersonWorkspace, Tensor]:
    """The backend that takes the residual, the workspace, and the residual as rows.

    ``in_turn``: this is the first step of the solve, or the steps before were given one.

    Raises:
        TypeError, ValueError: the method or the backend takes none, or something is wrong with it.
    """
    if ws.parts:
        raise ValueError("residual cannot be given where segments are of unequal length, got segments of several")
    anderson = takes_residual(ws)
    if anderson is None:
        raise ValueError(f"residual needs dq.Anderson(type=2) with mixing=1, got {method}")
    if ws.asked_by:
        raise ValueError(f"residual cannot be given with {ws.asked_by}, got {method}")
    if residual is None or not in_turn:
        raise ValueError("residual must be given at every step of a solve or at none")
    return backend_for(current, asked, ws), anderson, rows_of(residual, anderson)


def rows_of(residual: Any, ws: AndersonWorkspace) -> Tensor:
    """The residual as (B, any) numbers of the accumulation dtype, in memory of its own.

    Raises:
        TypeError, ValueError: naming what is wrong with it.
    """
    layout = Layout(residual, "residual", ws.layout.samples)
    if layout.B != ws.layout.B:
        raise ValueError(f"residual must have the batch of z0, expected dim 0 to be {ws.layout.B}, got {layout.B}")
    rows = torch.cat(layout.rows(layout.tensors(residual)), dim=1).detach().to(ws.layout.acc, copy=True)
    if not rows.shape[1]:
        raise ValueError("residual must have a number a sample, got none")
    if ws.own_residual is not None and rows.shape != ws.own_residual.shape:
        raise ValueError(f"residual must keep its size, expected {ws.own_residual.shape[1]}, got {rows.shape[1]}")
    return rows


def backend_for(current: contract.Backend, asked: str, ws: Workspace) -> contract.Backend:
    """The backend that takes a residual of the caller's own: the current one, or with "auto" another.

    Raises:
        ValueError: the one that was asked for does not.
    """
    if current.takes_residual(ws):
        return current
    able = [b.name for b in contract.backends() if b.takes_residual(ws)]
    if contract.wish(asked) != "auto":
        listed = ", ".join(map(repr, able))
        raise ValueError(
            f"residual needs backend='auto' or one of {listed} for these samples, got backend={current.name!r}"
        )
    return contract.choose("auto", ws.layout.device, residual_for=ws)
