"""Why a sample stopped."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """Outcome of one sample; the ops write the first five, ``Solution`` refines MAX_ITER into the labels after it."""

    RUNNING = 0
    CONVERGED = 1
    MAX_ITER = 2
    NON_FINITE = 3
    STOPPED = 4  # the callback said stop
    DIVERGED = 5  # max_iter, and the residual ended far above where it began
    STALLED = 6  # max_iter, and the best residual has not improved for a long time
