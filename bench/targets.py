"""The targets of this project, in one place: what `bench.report` holds every measured figure against.

Speed targets are ratios of medians, torchdeq 0.1.0's time over deqfast's, in one run: float32, equal evaluations, a
nearly free f, two cores.
"""

from __future__ import annotations

LIKE_FOR_LIKE = "deqfast type II m=6, float32 history"
BFLOAT16 = "deqfast type II m=6, bfloat16 history"
DEFAULT = "deqfast Anderson()"
BROYDEN = "deqfast Broyden()"
REFERENCE = "deqfast reference"
TORCHDEQ = "torchdeq"
COMPILED = "torch.compile"

SPEED: dict[str, dict[str, float]] = {
    LIKE_FOR_LIKE: {
        "1x64": 25, "64x128": 10, "64x1024": 10, "512x512": 8, "32x61440": 4, "4x365000": 3.5, "1x4M": 5, "20000x8": 8,
    },
    BFLOAT16: {"64x1024": 10, "512x512": 9, "32x61440": 5, "4x365000": 4.5, "1x4M": 6},
    DEFAULT: {
        "1x64": 15, "64x128": 6, "64x1024": 6, "512x512": 5, "32x61440": 2.5, "4x365000": 2.2, "1x4M": 3, "20000x8": 5,
    },
    BROYDEN: {
        "1x64": 15, "64x128": 12, "64x1024": 12, "512x512": 12, "32x61440": 11, "4x365000": 12, "1x4M": 8, "20000x8": 8,
    },
}  # fmt: skip

# fraction of the floor's bytes at the copy bandwidth of the same run, asked where B N >= FLOOR_FROM
FLOOR_FRACTION = 1.0
FLOOR_FROM = 1_900_000

# the joint step alone at the published shapes: fraction of its floor, and the same step in torch over it
JOINT_FLOOR_FRACTION = 0.9
JOINT_TORCH = 4.0

# fewer evaluations than each rival (geometric mean at 1e-3 and 1e-5), failures, and time to tolerance
EVALUATION_RATIO = {
    "torchdeq Anderson": 2.3,
    "torchdeq Anderson lam=1e-8": 1.35,
    "torchdeq Broyden": 1.1,
}
FAILED_PERCENT = 4.0
TIME_RATIO = 5.0
SCALING_CHANGE = {"powers of two": 0, "other": 1}

# Plain torch: its time over torchdeq's Anderson's in one run, at most, and dispatched ops a step, at most.
TORCH_LIKE_FOR_LIKE = {"1x64": 1.5, "64x128": 1.5, "64x1024": 1.0, "512x512": 1.0, "32x61440": 1.0}
TORCH_DEFAULT = {"1x64": 2.5, "64x128": 2.5, "64x1024": 1.6, "512x512": 1.6, "32x61440": 1.6}
TORCH_OPS = 110

# deqfast behind other libraries' names: their time over its, of a script of torchdeq's under installed(), of a solver
# against the same one, and of dq.compat.scipy; its time over dq.fixed_point's, at most; evaluations with segments over
# those with rows as samples, at most.
COMPAT_TRAINING = 2.5
COMPAT_INR = {"anderson": 10.0, "broyden": 5.0, "fixed_point_iter": 1.0}
COMPAT_OVERHEAD = 1.1
COMPAT_SCIPY = {1_000: 5.0, 1_000_000: 3.0}
COMPAT_SCIPY_BATCH = 200.0
COMPAT_SEGMENTS = 0.7

# Whole training steps with a real f, the fastest row of a rival over deqfast's fastest; and over the bare calls of f
# and its vjp, f not compiled, at most. Nothing was asked of plain rows that no one named.
_NETS = ("MLP 64 x 128", "MLP 64 x 512", "MLP 64 x 1024", "conv 16 x 16 x 16 x 16", "attention 16 x 32 x 64")
TRAINING_RTOL = 1e-4
TRAINING: dict[str, dict[str, float]] = {
    "jaxopt": dict(zip(_NETS, (1.0, 1.5, 1.5, 1.0, 1.0), strict=True)),
    "JAX by hand": dict.fromkeys(_NETS, 1.0),
    "torchdeq": dict.fromkeys(_NETS, 1.0),
    "bare": {"MLP 64 x 128": 1.6, "MLP 64 x 512": 1.15},
}

# Segments of one length over the batch that they are, and very unequal ones over one block, padded, at most.
SEGMENTS_EQUAL = 1.15
SEGMENTS_UNEQUAL = {"1 of 1,000 rows, 99 of 10": 0.5}

# compact="auto": a training step of which 16 of 1,024 samples are hard, the plain one's time over its, at least; rows
# of f over the samples' own, at most; its time over the plain one's where all samples need the same, at most.
ROWS_TRAINING = 5.0
ROWS_DIGITS = 1.15
ROWS_ALIKE = 1.01

# On two processes of one thread: over one process of two threads and the all-reduce; over samples that stop together.
SPREAD = 1.15
CONSENSUS = 1.03

# On an H200, float32 states. Bandwidth: floor bytes of the step's own schedule (bench/floor.py) over its device time,
# as a fraction of a copy's; latency in microseconds of device time; ratios are rival over deqfast by wall time, our
# fastest mode, 30 evaluations of a nearly free f; histories are ratios to float32's.
GPU_COPY_FRACTION = 0.85
GPU_BANDWIDTH_FROM = 256e6  # bytes a step, below which nothing is asked
GPU_SMALL_STEP_US = {"Type II m=6": 6.0, "defaults": 10.0}
GPU_SMALL_STEP_LAUNCHES = 1
GPU_TORCHDEQ = {"64x1024": 15, "32x61440": 6, "20000x8": 10}
GPU_COMPILED = {"64x1024": {"float32": 3.0}, "32x61440": {"float32": 1.4, "bfloat16": 2.0}}
GPU_DEVICE_LOOP_US = 8.0
GPU_HISTORY_MEMORY = {"bfloat16": 2.0, "int8": 4.0}
GPU_HISTORY_SPEED = {"bfloat16": 1.7, "int8": 2.5}
GPU_TRAINING = {"MLP 64 x 512": 4.0, "conv 32 x 61,440": 1.5}
