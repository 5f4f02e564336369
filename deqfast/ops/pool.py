"""Large history buffers, kept for the next solve.

Touching fresh memory for the first time costs as much as several steps of a large solve, and a training loop solves
the same problem twice a batch. So the histories of finished solves wait here, up to ``DEQFAST_POOL_MB`` (default 256,
0 turns it off) in all. What a buffer holds is never read before it is written, so reuse does not change a bit.
"""

from __future__ import annotations

import math
import os
import threading

import torch
from torch import Tensor

MIN_BYTES = 1 << 20
_lock = threading.Lock()
_free: list[Tensor] = []


def limit() -> int:
    """Bytes that may wait here."""
    text = os.environ.get("DEQFAST_POOL_MB", "256")
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = math.nan
    if not 0 <= megabytes < math.inf:
        raise ValueError(f"DEQFAST_POOL_MB must be a number of megabytes, 0 or more, got {text!r}")
    return int(megabytes * (1 << 20))


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """An uninitialised tensor, and the buffer to ``give`` back when nobody reads it any more (None: small)."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    if device.type != "cpu" or size < MIN_BYTES:
        return torch.empty(*shape, dtype=dtype, device=device), None
    limit()  # a wrong one is said here, before f is evaluated
    buffer = None
    with _lock:
        fitting = [t for t in _free if size <= t.numel() <= 2 * size]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            _free[:] = [t for t in _free if t is not buffer]
    if buffer is None:
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer[:size].view(dtype).view(shape), buffer


def give(buffer: Tensor | None) -> None:
    """Take a buffer back; the oldest ones are freed when there are too many."""
    if buffer is None or buffer.is_inference():
        return
    with _lock:
        _free.append(buffer)
        room = limit()
        while _free and sum(t.numel() for t in _free) > room:
            del _free[0]


def clear() -> None:
    """Free every waiting buffer."""
    with _lock:
        _free.clear()
