"""The ops: one complete solver update each, on a workspace, by whichever backend serves the device.

Solvers ``choose`` a backend and call ``bind`` once a solve; they never ask which one answered.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from . import native, reference, triton
from .workspace import AndersonWorkspace, BroydenWorkspace, Workspace

__all__ = ["BACKENDS", "Step", "bind", "choose", "why_not"]

BACKENDS = ("native", "triton", "reference")
Step = Callable[[list[Tensor], "list[Tensor] | None", "Tensor | None", "Tensor | None"], int]


def why_not(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot serve ``device`` here, or None when it can."""
    if backend == "reference":
        return None
    if backend == "native":
        return native.why_not(device)
    return triton.why_not(device)


def choose(backend: str, device: torch.device) -> str:
    """The backend that serves: ``DEQFAST_BACKEND`` or the first available one for "auto", else the one asked for.

    Raises:
        ValueError: unknown backend, or one that cannot serve this device, with the reason.
    """
    asked, source = backend, "backend"
    if backend == "auto":
        wish = os.environ.get("DEQFAST_BACKEND")
        if wish:
            asked, source = wish, "DEQFAST_BACKEND"
    if asked == "auto":
        for candidate in BACKENDS:
            if candidate == "triton" and device.type == "cpu":
                continue  # its interpreter is for tests: reference is faster, so it serves only those who name it
            if why_not(candidate, device) is None:
                return candidate
    if asked not in BACKENDS:
        raise ValueError(f"{source} must be one of 'auto', {', '.join(map(repr, BACKENDS))}, got {asked!r}")
    reason = why_not(asked, device)
    if reason is not None:
        raise ValueError(f"{source}={asked!r} cannot serve device {device}: {reason}")
    return asked


def bind(ws: Workspace, backend: str, evaluations: int = 0) -> Step:
    """The update of this workspace's solver on the backend that ``choose`` gave, after so many evaluations."""
    if backend == "native":
        return native.bind(ws, evaluations)
    if backend == "triton":
        return triton.bind(ws, evaluations)
    device = ws.layout.device.type

    def step(f: list[Tensor], f_prev: list[Tensor] | None, f_rows: Tensor | None, f_prev_rows: Tensor | None) -> int:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            if isinstance(ws, AndersonWorkspace):
                return reference.anderson_step(ws, f, f_prev, f_rows, f_prev_rows)
            assert isinstance(ws, BroydenWorkspace)
            return reference.broyden_step(ws, f, f_rows)

    return step
