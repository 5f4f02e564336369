"""The extension module, what it was built with, and which devices it serves."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_IMPORT_ERROR = ""
_C: Any = None
try:
    _C = importlib.import_module("deqfast._C")
except ImportError as error:  # a pure-Python install, or a module built for another Python
    _IMPORT_ERROR = str(error)

# A build for tests runs the CUDA kernels on CPU tensors, block after block.
EMULATED = _C is not None and _C.build_info()["cuda"] == "emulated"

CODES: dict[torch.dtype, Any] = {}
if _C is not None:
    CODES = {
        torch.float64: _C.DType.f64,
        torch.float32: _C.DType.f32,
        torch.bfloat16: _C.DType.bf16,
        torch.float16: _C.DType.f16,
        torch.int8: _C.DType.i8,
    }


def why_not(device: torch.device) -> str | None:
    """Why the native kernels cannot serve ``device``, or None when they can."""
    if _C is None:
        return f"the extension module deqfast._C is not built ({_IMPORT_ERROR})"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"deqfast._C has no kernels for device type {device.type!r}"
    if torch.version.hip is not None:
        return "deqfast._C has no kernels for AMD GPUs"
    if EMULATED or _C.build_info()["cuda"] is None:
        return "deqfast._C was built without CUDA kernels; build it where nvcc is, with DEQFAST_CUDA=on"
    return _why_not_cuda(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _why_not_cuda(index: int) -> str | None:
    return _C.cuda_why_not(index) or None


def stream_of(device: torch.device) -> Callable[[], int] | None:
    """What gives torch's current stream on ``device`` as a number; None on a CPU."""
    if device.type != "cuda":
        return (lambda: 0) if EMULATED else None
    return functools.partial(torch._C._cuda_getCurrentRawStream, device.index)


def array(t: Tensor) -> tuple[int, int]:
    """Where a tensor lies, and its bytes, as plans take it; whoever makes the plan keeps the tensor alive."""
    return t.data_ptr(), t.nbytes
