"""Broyden's steps: where they lie, from which of them the new one is made, and z taken through them.

The chain z_{j+1} = z_j + s_{j+1} c_j / ||s_j||^2 sweeps over z in memory; the Gram form does the same recursion on the
weights of the steps in z, and z is put together afterwards.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .constants import COUNT, DENOMINATOR_RESTARTS, FULL_RESTARTS, MIN_DENOMINATOR, SCALE
from .measure import BAD, RESET

GROUP = tl.constexpr(16)  # steps multiplied at once


class Steps(NamedTuple):
    """The steps kept of all samples, of N numbers each, their squared norms and Gram matrices.

    Where those of one tensor begin (None: there is but one).
    """

    history: Any
    norms: Any
    gram: Any
    N: Any
    offset: Any


class Scratch(NamedTuple):
    """What the kernels of a step hand on beside ``Handed``: z (B, N), weights (B, memory), starts (see ``settle``)."""

    z: Any
    weights: Any
    starts: Any


@triton.jit
def measured_scale(s_s, s_g, g_g):
    """H0 from the first step s = g_0: y = g_0 - g, so that s.y = s.s - s.g and y.y = s.s - 2 s.g + g.g."""
    scale = (s_s - s_g) / (s_s - 2.0 * s_g + g_g)
    least = tl.full((), 0.2, scale.dtype)  # as a literal a float32, before Triton 3.8
    return tl.where(scale == scale, tl.minimum(tl.maximum(scale, least), 5.0), 1.0)


@triton.jit
def measures(sample):
    """Whether H0, if it is measured on the first step, is so now."""
    count = tl.load(sample.ints + COUNT * sample.padded)
    return (count == 1) & (tl.load(sample.reals + SCALE * sample.padded) == 0)


@triton.jit
def steps_of(kept, b, memory: tl.constexpr):
    """Where the sample's steps in this tensor begin."""
    steps = kept.history + b * (memory * tl.cast(kept.N, tl.int64))
    if kept.offset is not None:
        steps += kept.offset
    return steps


@triton.jit
def z_of(scratch, kept, b):
    """Where its part of z begins."""
    z = scratch.z + b * kept.N
    if kept.offset is not None:
        z += kept.offset
    return z


@triton.jit
def sums_of(handed, b, chunks, memory: tl.constexpr):
    """Where the sample's sums begin: ||f||^2, ||g||^2, products with the steps, each ``chunks`` numbers."""
    return handed.partials + b * ((2 + memory) * chunks)


@triton.jit
def count_and_scale(sample, norms, outcome, s_g, g_g, method: tl.constexpr):
    """How many steps the new one is made from and with which H0; ``s_g``, ``g_g``: products of the first step, of g."""
    memory: tl.constexpr = method.memory
    count = tl.load(sample.ints + COUNT * sample.padded)
    scale = tl.load(sample.reals + SCALE * sample.padded)
    restarts = tl.load(sample.ints + FULL_RESTARTS * sample.padded)
    count = tl.where((outcome & RESET) != 0, 0, count)
    if method.SCALE_FIRST:
        measuring = (count == 1) & (scale == 0)
        s_s = tl.load(norms + sample.b * memory, mask=measuring, other=1.0)
        measured = measured_scale(s_s.to(tl.float64), s_g.to(tl.float64), g_g.to(tl.float64)).to(scale.dtype)
        scale = tl.where(measuring, measured, scale)
        count = tl.where(measuring, 0, count)
    full = count == memory
    tl.debug_barrier()
    tl.store(sample.reals + SCALE * sample.padded, scale)
    tl.store(sample.ints + FULL_RESTARTS * sample.padded, restarts + full.to(tl.int32))
    return tl.where(full, 0, count), tl.where(scale > 0, scale, 1.0)


@triton.jit
def add_one(sample, ROW: tl.constexpr, condition):
    """Count an event of the sample."""
    before = tl.load(sample.ints + ROW * sample.padded)
    tl.debug_barrier()
    tl.store(sample.ints + ROW * sample.padded, before + condition.to(tl.int32))


@triton.jit
def multiply(vector, steps, N, count, begin, end, out, chunks, BLOCK: tl.constexpr):
    """Products of ``vector`` with every step over [begin, end), into ``out``."""
    for first in range(0, count, GROUP):
        j = first + tl.arange(0, GROUP)
        sums = tl.zeros((GROUP,), tl.float64)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            v = tl.load(vector + at, mask=at < end, other=0.0)
            place = steps + (j.to(tl.int64) * N)[:, None] + at[None, :]
            s = tl.load(place, mask=(j < count)[:, None] & (at < end)[None, :], other=0.0)
            sums += tl.sum(s * v[None, :], axis=1).to(tl.float64)
        tl.store(out + j * chunks, sums, mask=j < count)


@triton.jit
def sweep(z, s, weight, N, BLOCK: tl.constexpr):
    """z += weight s, and the product of s with the result."""
    product = tl.zeros((BLOCK,), weight.dtype)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s_tile = tl.load(s + at, mask=at < N, other=0.0)
        z_tile = tl.load(z + at, mask=at < N, other=0.0) + weight * s_tile
        tl.store(z + at, z_tile, mask=at < N)
        product += s_tile * z_tile
    return tl.sum(product, axis=0)


@triton.jit
def chain(z, steps, norms, N, count, unit, scale, BLOCK: tl.constexpr):
    """From the residual to scale times it, through so many steps; what stands before the last one."""
    for begin in range(0, N, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        g = tl.load(z + at, mask=at < N, other=0.0) * unit
        tl.store(z + at, scale * g, mask=at < N)
    ratio = tl.zeros((), scale.dtype)
    for j in range(0, count):
        tl.debug_barrier()
        ratio = sweep(z, steps + j * tl.cast(N, tl.int64), ratio, N, BLOCK) / tl.load(norms + j)
    return ratio


@triton.jit
def recur(kept, scratch, b, products, count, scale, memory: tl.constexpr, M: tl.constexpr):
    """The same on the weights of the steps in z, from the residual's ``products`` with them and theirs in ``gram``."""
    i = tl.arange(0, M)
    weight = tl.zeros((M,), tl.float64)
    ratio = tl.zeros((), tl.float64)
    for j in range(0, count):
        weight = tl.where((i == j) & (j > 0), ratio, weight)
        row = tl.load(kept.gram + (b * memory + j) * memory + i, mask=i <= j, other=0.0).to(tl.float64)
        product = scale.to(tl.float64) * tl.sum(tl.where(i == j, products, 0.0), axis=0) + tl.sum(weight * row, axis=0)
        ratio = product / tl.load(kept.norms + b * memory + j).to(tl.float64)
    tl.store(scratch.weights + b * memory + i, weight.to(scale.dtype), mask=i < memory)
    return ratio


@triton.jit
def settle(sample, handed, scratch, outcome, count, scale, denominator):
    """What `apply` needs to know of a sample: its outcome, and in ``starts`` (B, 3) count, H0 and denominator."""
    bad = (tl.abs(denominator) >= MIN_DENOMINATOR) == 0
    add_one(sample, DENOMINATOR_RESTARTS, bad)
    starts = scratch.starts + sample.b * 3
    tl.store(starts, tl.where(bad, 0, count).to(scale.dtype))
    tl.store(starts + 1, scale)
    tl.store(starts + 2, tl.where(bad, 1.0, denominator).to(scale.dtype))
    tl.store(handed.outcomes + sample.b, outcome | tl.where(bad, BAD, 0))
