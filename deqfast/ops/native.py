"""C++ kernels: CPU tensors here, CUDA tensors once those kernels are built."""

from __future__ import annotations

import torch

from .workspace import Workspace

try:
    from deqfast import _C
except ImportError as error:  # a pure-Python install, or a build for another Python
    _C = None
    _IMPORT_ERROR = str(error)


def why_not(device: torch.device) -> str | None:
    """Why the native kernels cannot serve ``device``, or None."""
    if _C is None:
        return f"deqfast._C is not built ({_IMPORT_ERROR})"
    if not hasattr(_C, "AndersonPlan"):
        return "no kernels yet"
    if device.type != "cpu":
        return f"no native kernels for device type {device.type!r}"
    return None


def bind(ws: Workspace):
    raise NotImplementedError
