"""How the host learns what is still running on a device without waiting for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LAG = 2  # steps between a count and its reading
SLOTS = 8


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _events(device_type: str) -> Callable[[], Any] | None:
    """What makes an event on the current stream of such a device, or None where there is none to be had."""
    if device_type == "cpu":
        return None
    if device_type == "cuda":
        return torch.cuda.Event
    try:
        torch.Event(device_type).record()
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    return functools.partial(torch.Event, device_type)


def _landing(count: int, dtype: torch.dtype, device_type: str) -> Tensor:
    """Host memory that a copy from the device arrives in while the host goes on."""
    with torch.inference_mode(False):  # steps may be made in another mode
        pinned = device_type in ("cuda", "xpu")
        return torch.empty(count, dtype=dtype, device="cpu", pin_memory=pinned)


def _current(device: torch.device) -> Any:
    """The device as the current one."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    index = device.index
    many = index is not None and torch.accelerator.device_count() > 1
    return torch.accelerator.device_index(index) if many else contextlib.nullcontext()


class Later:
    """A few numbers that are computed on a device, for the host to read when that must have happened anyway."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._event: Any = None
        event = _events(numbers.device.type)
        if event is not None:
            self._numbers = _landing(numbers.numel(), numbers.dtype, numbers.device.type)
            with _current(numbers.device):  # events belong to a stream of the current one
                self._numbers.copy_(numbers, non_blocking=True)
                self._event = event()
                self._event.record()

    def read(self) -> list[Any]:
        """The numbers; waits until they have been computed."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.reshape(-1).tolist()

    def __bool__(self) -> bool:
        return bool(self.read()[0])


class Lag:
    """Reads a one-element int32 tensor that every step updates: on a device the value of two steps ago.

    The copy of each step goes to the host's memory behind an event; the host then waits for the event of an earlier
    step at most, so that it is never more than ``LAG`` steps ahead of the device. Frozen samples make the surplus steps
    harmless. While a graph is captured nothing is read. On a CPU, and on a device without events, the value is read as
    it is.
    """

    def __init__(self, B: int, device: torch.device, limit: int, evaluations: int) -> None:
        self._B = B
        self._device = device
        self._limit = limit  # evaluations after which nothing runs, 0: none
        self._event = _events(device.type)
        self.exact = self._event is None  # the count read is the newest
        self._noted_by: list[Any] = []
        self.rewind(evaluations)

    def rewind(self, evaluations: int) -> None:
        """For a solve in the same memory, which the caller has made as new."""
        self._evaluations = evaluations
        self._noted = 0
        self._known = self._B

    def read(self, count: Tensor) -> int:
        """Note the step that has just been launched on the current stream; samples running as far as is known."""
        if self._event is None:
            return int(count)
        self._evaluations += 1
        if self._limit and self._evaluations >= self._limit:
            self._known = 0
        elif capturing(self._device):
            self._noted = 0
        else:
            self.report(count, LAG)
        return self._known

    def report(self, count: Tensor, lag: int) -> int:
        """Note the count as of now on the current stream; the one noted ``lag`` times before, or what is known."""
        if not self._noted_by:  # not while a graph is captured, which forbids to pin memory
            assert self._event is not None
            self._seen = _landing(SLOTS, torch.int32, self._device.type)
            self._noted_by = [self._event() for _ in range(SLOTS)]
        slot = self._noted % SLOTS
        self._seen[slot : slot + 1].copy_(count, non_blocking=True)
        self._noted_by[slot].record()
        self._noted += 1
        if self._noted > lag:
            slot = (self._noted - 1 - lag) % SLOTS
            self._noted_by[slot].synchronize()
            self._known = int(self._seen[slot])
        return self._known
