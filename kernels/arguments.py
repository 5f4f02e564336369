"""What kernels take, in groups: named tuples of tensors and numbers, that the host makes once a workspace.

Triton specialises on every number in a group (whether it is 1, whether 16 divides it), so groups hold what belongs to
a sample, its solver and its solve. Numbers of a batch or of a run, on which the order of no sum may depend, stay
arguments of their own: those in ``RUN``. A group of options is one ``tl.constexpr`` argument. None is known when a
kernel is compiled.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .constants import STATUS

RUN = ["B", "padded", "max_iter", "has_previous", "made", "columns"]


class Output(NamedTuple):
    """What f returned: (B, n) numbers, and where not every sample has the row of its index, its row."""

    dense: Any
    rows: Any


class Iterates(NamedTuple):
    """The iterate f was evaluated at, the memory of the one before and the next, an earlier best iterate."""

    x: Any
    x_prev: Any
    saved: Any


class Statistics(NamedTuple):
    """Numbers of every sample: rows of ``padded`` int32 and of ``padded`` in the accumulation dtype."""

    ints: Any
    reals: Any


class Stopping(NamedTuple):
    """When a sample stops: ``settings`` (see measure.py), how many run, norms of its blocks (None: judged whole)."""

    settings: Any
    running: Any
    block_norms: Any


class Rule(NamedTuple):
    """What of the stopping rule is compiled in: whether the best iterate is the answer, how many blocks are judged."""

    KEEP_BEST: bool
    BLOCKS: int


class Chunks(NamedTuple):
    """How programs share the samples of one tensor: n numbers in ``own`` chunks of ``size``, ``first`` of ``total``."""

    n: Any
    size: Any
    first: Any
    own: Any
    total: Any


class Handed(NamedTuple):
    """What the kernels of a step hand on where several programs share a sample.

    Sums (B, products, chunks) in float64; decisions (B,), see measure.py; whether a chunk is not finite (B, chunks).
    """

    partials: Any
    outcomes: Any
    flags: Any


class Sample(NamedTuple):
    """The statistics of sample b, as pointers to it in their first rows."""

    b: Any
    ints: Any
    reals: Any
    padded: Any


@triton.jit
def sample_of(statistics, b, padded):
    """The sample's part of the statistics."""
    return Sample(b, statistics.ints + b, statistics.reals + b, padded)


@triton.jit
def has_status(sample, WHICH: tl.constexpr):
    """Whether that is the sample's status."""
    return tl.load(sample.ints + STATUS * sample.padded) == WHICH


@triton.jit
def chunk_of(chunks):
    """Of this program: its sample, where its chunk begins and ends, and which chunk of the whole sample that is."""
    b = (tl.program_id(0) // chunks.own).to(tl.int64)
    chunk = tl.program_id(0) % chunks.own
    begin = chunk * chunks.size
    return b, begin, tl.minimum(begin + chunks.size, chunks.n), chunks.first + chunk


@triton.jit
def row_of(output, b, n):
    """The row of f's output that belongs to sample b, which is a running one."""
    if output.rows is None:
        return output.dense + b * n
    else:
        return output.dense + tl.load(output.rows + b).to(tl.int64) * n


@triton.jit
def iterates_of(iterates, b, n):
    """The sample's part of the iterates."""
    return Iterates(iterates.x + b * n, iterates.x_prev + b * n, iterates.saved + b * n)
