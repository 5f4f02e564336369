"""Why a sample stopped."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """Outcome of one sample. The last two are labels for samples that used up max_iter."""

    RUNNING = 0
    CONVERGED = 1
    MAX_ITER = 2
    NON_FINITE = 3  # f returned NaN or infinity; the sample keeps its best finite iterate
    STOPPED = 4  # the callback said stop
    DIVERGED = 5  # max_iter, and the residual ended more than 10 times above the first
    STALLED = 6  # max_iter, and the best residual came before the last third of the evaluations
