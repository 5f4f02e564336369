"""How the host learns what is still running on a GPU without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

LAG = 2  # steps between a count and its reading
SLOTS = 8


class Lag:
    """Reads a one-element int32 tensor that every step updates: on a GPU the value of two steps ago.

    The copy of each step goes to pinned memory behind an event; the host then waits for the event of an earlier step
    at most, so that it is never more than ``LAG`` steps ahead of the device. Frozen samples make the surplus steps
    harmless. On a CPU the value is read as it is.
    """

    def __init__(self, B: int, device: torch.device) -> None:
        self._B = B
        self._steps = 0
        self._cuda = device.type == "cuda"
        if self._cuda:
            with torch.inference_mode(False):  # steps may be made in another mode
                self._seen = torch.empty(SLOTS, dtype=torch.int32, pin_memory=True)
            self._events = [torch.cuda.Event() for _ in range(SLOTS)]

    def read(self, count: Tensor) -> int:
        """Note the step that has just been launched on the current stream; samples running as far as is known."""
        if not self._cuda:
            return int(count)
        slot = self._steps % SLOTS
        self._seen[slot : slot + 1].copy_(count, non_blocking=True)
        self._events[slot].record()
        self._steps += 1
        if self._steps <= LAG:
            return self._B
        slot = (self._steps - 1 - LAG) % SLOTS
        self._events[slot].synchronize()
        return int(self._seen[slot])
