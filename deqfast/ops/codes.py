"""Numbers that every backend and every language agrees on: C++ and Triton have them too, and a test compares."""

from __future__ import annotations

from enum import IntEnum

TILE = 16
TINY = 8  # numbers a sample up to which the small matrices are larger than the history they are made of
BLOCK = 1024  # history numbers that share one scale (float16, int8)

UNIT_RANGE = 2.0**40  # a sample whose magnitude leaves [1/UNIT_RANGE, UNIT_RANGE] in its unit gets a new unit
GROWTH_LIMIT = 1.5  # Type II: a residual that grows by more forgets all but the newest column
# A sample whose ||f|| is GROWN times what f and f - z were at first has run away while ||f - z|| is above a FALLEN-th
# of its largest, or above rtol FAR times what they were at first and not rounding (eps ||f||), or while rounding is
# above that largest, or GONE times what they were at first. For one that was woken,
# first is when it was.
GROWN, FALLEN, FAR, GONE = 10.0, 4.0, 1000.0, 1e13
DIVERGENCE = 10.0  # at max_iter: a residual this many times the first one is called diverged
STALL_FRACTION = 3  # at max_iter: no better residual in the last third of the steps is called stalled,
STALL_MIN_STEPS = 10  # if those were at least so many
MIN_DENOMINATOR = 1e-4  # Broyden: |1 - c/||s||^2| below it restarts the sample
COST_SLACK = 1.3  # joint solves: a lower cost is taken at a residual up to this times the best one
SAFEGUARD = 2.0  # joint solves: a residual this far above the best one since the last restart forgets the history

BLOCKS = ("z", "mu", "x")  # of a joint solve, in the order of their numbers


class Evict(IntEnum):
    """Which column a full history gives up."""

    OLDEST = 0
    LEAST_USEFUL = 1


class Int(IntEnum):
    """Rows of ``Workspace.ints``: one int32 per sample."""

    STATUS = 0
    STEPS = 1
    BEST_AT = 2
    BEST_STEP = 3
    SLOT = 4  # Anderson: where the next column goes
    COUNT = 5  # columns in use
    SOLVE_FALLBACKS = 6  # Picard step because the small solve failed
    STEP_FALLBACKS = 7  # Picard step because the mixed iterate was not finite
    GROWTH_RESTARTS = 8  # Type II: the residual grew by more than 1.5
    RESCALES = 9  # history dropped because the magnitude left the range of its unit
    EVICTIONS = 10
    FULL_RESTARTS = 11  # Broyden: memory full
    DENOMINATOR_RESTARTS = 12  # Broyden: |1 - c/||s||^2| too small, or not finite
    WOKEN = 13  # converged, and no longer within tolerance at a later evaluation


class Real(IntEnum):
    """Rows of ``Workspace.reals``: one number of the accumulation dtype per sample."""

    RESIDUAL = 0  # ||f(z) - z|| / ||f(z)|| at the newest evaluation
    NORM = 1  # ||f(z) - z|| at the newest evaluation
    BEST = 2  # RESIDUAL of the best iterate so far, infinite before the first finite one
    LEAST = 3  # ||f(z) - z|| of the best iterate so far: the least, until one converges; of blocks RESIDUAL
    FIRST = 4  # at the first evaluation: the larger of ||f(z)|| and ||f(z) - z||; of blocks RESIDUAL
    UNIT = 5  # power of two that brings the sample to magnitude one; 0 before the first evaluation
    LARGEST = 6  # the largest NORM so far
    SCALE = 7  # Broyden: H0 = SCALE * I; 0 while not measured


class At(IntEnum):
    """Where the best iterate of a sample is: a value of ``Int.BEST_AT``."""

    NOWHERE = 0
    CURRENT = 1
    PREVIOUS = 2
    SAVED = 3
