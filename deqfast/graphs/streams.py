"""Streams to capture on, each of one recording alone.

A matrix product uses memory that torch keeps for every stream that ran one. A graph holds its address; torch frees it
when somebody asks for that (Inductor's ``reduce-overhead`` does) or when another graph captured on the same stream
dies, and a replay would then write into somebody else's tensors. On a stream that never ran anything the first product
that is captured makes it within the graph's own pool, where it stays. torch's own streams are 32 that take turns, so
these are made by the driver.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from typing import Any

import torch

NON_BLOCKING = 1  # a blocking one could not be captured on while another thread uses the default stream
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

_lock = threading.Lock()
_idle: dict[int, list[Any]] = {}  # by device: streams whose recordings are gone


def borrow(device: torch.device, owner: object) -> Any:
    """A stream that nobody else captures on while ``owner`` lives."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        waiting = _idle.setdefault(index, [])
        stream = waiting.pop() if waiting else None
    if stream is None:
        stream = _new(index)
    else:
        # What an earlier recording's products used may still be noted for it, in a pool that is gone.
        torch._C._cuda_clearCublasWorkspaces()
    weakref.finalize(owner, _give_back, index, stream).atexit = False
    return stream


def _give_back(index: int, stream: Any) -> None:
    with _lock:
        _idle.setdefault(index, []).append(stream)


def _new(index: int) -> Any:
    if torch.version.cuda is None:  # HIP: there is no CUDA driver to ask
        return torch.cuda.Stream(index)
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # makes the device's context this thread's
        handle = ctypes.c_void_p()
        error = ctypes.CDLL(DRIVER).cuStreamCreate(ctypes.byref(handle), NON_BLOCKING)
    if error or handle.value is None:
        raise RuntimeError(f"the driver made no stream to capture on: CUDA error {error}")
    return torch.cuda.ExternalStream(handle.value, device=index)
