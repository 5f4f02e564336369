"""Numbers that these kernels share with the rest of the package, each said once here; a test compares them with those
of deqfast/ops and of C++. Nothing is imported from there: deqfast/ops loads the kernels, not the other way round.
"""

import triton.language as tl

TILE = tl.constexpr(16)  # samples whose small matrices lie interleaved
SCALE_BLOCK = tl.constexpr(1024)  # numbers of a column that share a scale

# Rows of the int32 statistics of the samples.
STATUS = tl.constexpr(0)
STEPS = tl.constexpr(1)
BEST_AT = tl.constexpr(2)
BEST_STEP = tl.constexpr(3)
SLOT = tl.constexpr(4)
COUNT = tl.constexpr(5)
SOLVE_FALLBACKS = tl.constexpr(6)
STEP_FALLBACKS = tl.constexpr(7)
GROWTH_RESTARTS = tl.constexpr(8)
RESCALES = tl.constexpr(9)
EVICTIONS = tl.constexpr(10)
FULL_RESTARTS = tl.constexpr(11)
DENOMINATOR_RESTARTS = tl.constexpr(12)
WOKEN = tl.constexpr(13)

# Rows of those in the accumulation dtype.
RESIDUAL = tl.constexpr(0)
NORM = tl.constexpr(1)
BEST = tl.constexpr(2)
FIRST = tl.constexpr(4)
UNIT = tl.constexpr(5)
LEAST = tl.constexpr(3)
LARGEST = tl.constexpr(6)
SCALE = tl.constexpr(7)

# Values of STATUS.
RUNNING = tl.constexpr(0)
CONVERGED = tl.constexpr(1)
MAX_ITER = tl.constexpr(2)
NON_FINITE = tl.constexpr(3)
DIVERGED = tl.constexpr(5)
STALLED = tl.constexpr(6)

# Values of BEST_AT.
NOWHERE = tl.constexpr(0)
CURRENT = tl.constexpr(1)
PREVIOUS = tl.constexpr(2)
SAVED = tl.constexpr(3)

# Which column a full history gives up.
OLDEST = tl.constexpr(0)
LEAST_USEFUL = tl.constexpr(1)

UNIT_RANGE = tl.constexpr(2.0**40)
GROWTH_LIMIT = tl.constexpr(1.5)
GROWN = tl.constexpr(10.0)
FALLEN = tl.constexpr(4.0)
FAR = tl.constexpr(1000.0)
GONE = tl.constexpr(1e13)
DIVERGENCE = tl.constexpr(10.0)
STALL_FRACTION = tl.constexpr(3)
STALL_MIN_STEPS = tl.constexpr(10)
MIN_DENOMINATOR = tl.constexpr(1e-4)

# The joint step: the block of x, the shape of a ball around it, what a solve returns.
INPUT = tl.constexpr(2)
NO_BALL = tl.constexpr(0)
L2 = tl.constexpr(1)
LINF = tl.constexpr(2)
RETURN_BEST = tl.constexpr(0)
RETURN_LAST = tl.constexpr(1)
RETURN_COST = tl.constexpr(2)
COST_SLACK = tl.constexpr(1.3)
SAFEGUARD = tl.constexpr(2.0)
