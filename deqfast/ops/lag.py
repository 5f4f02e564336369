"""How the host learns what is still running on a GPU without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

LAG = 2  # steps between a count and its reading
SLOTS = 8


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Later:
    """A flag that is computed on a device, for the host to read when that must have happened anyway."""

    def __init__(self, flag: Tensor) -> None:
        self._flag = flag
        self._event: torch.cuda.Event | None = None
        if flag.device.type == "cuda":
            self._flag = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            with torch.cuda.device(flag.device):  # events belong to a stream of the current one
                self._flag.copy_(flag, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)


class Lag:
    """Reads a one-element int32 tensor that every step updates: on a GPU the value of two steps ago.

    The copy of each step goes to pinned memory behind an event; the host then waits for the event of an earlier step
    at most, so that it is never more than ``LAG`` steps ahead of the device. Frozen samples make the surplus steps
    harmless. While a graph is captured nothing is read. On a CPU the value is read as it is.
    """

    def __init__(self, B: int, device: torch.device, limit: int, evaluations: int) -> None:
        self._B = B
        self._device = device
        self._limit = limit  # evaluations after which nothing runs, 0: none
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self.rewind(evaluations)

    def rewind(self, evaluations: int) -> None:
        """For a solve in the same memory, which the caller has made as new."""
        self._evaluations = evaluations
        self._noted = 0
        self._known = self._B

    def read(self, count: Tensor) -> int:
        """Note the step that has just been launched on the current stream; samples running as far as is known."""
        if not self._cuda:
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
        if not self._events:  # not while a graph is captured, which forbids to pin memory
            with torch.inference_mode(False):  # steps may be made in another mode
                self._seen = torch.empty(SLOTS, dtype=torch.int32, device="cpu", pin_memory=True)
            self._events = [torch.cuda.Event() for _ in range(SLOTS)]
        slot = self._noted % SLOTS
        self._seen[slot : slot + 1].copy_(count, non_blocking=True)
        self._events[slot].record()
        self._noted += 1
        if self._noted > lag:
            slot = (self._noted - 1 - lag) % SLOTS
            self._events[slot].synchronize()
            self._known = int(self._seen[slot])
        return self._known
