"""Seconds an evaluation takes where processes share a sample: bytes over bandwidth, and the all-reduce.

    evaluation = (f + step) bytes of this process / its bandwidth + latency + bytes on the wire / wire's bandwidth

Bytes of a step are those of bench/floor.py where a sample is worked on in two passes. Bandwidth and latency of this
machine come from the rows "stream" and "all-reduce" of the same run, never from the rows that are predicted. Those of a
GPU cluster are assumed: no GPU was measured, and deqfast refuses spread samples on GPUs today.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench import floor

F_BYTES = 16  # a number: x, slope and z read, f(z) written, in float32
STREAM, LARGE = 16_000_000, 131_072  # numbers that a process copies (float32); that it adds up (float64)
PREDICTED = ("strong", "weak", "consensus")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Problem:
    """What one process solves.

    Args:
        numbers: of the state, on this process, float32.
        samples: whose sums are added up over the processes.
        evaluations: of f.
        m: columns.
        h: bytes a number of a column: 2 for bfloat16, 1 for int8.
        mix_every: only every so many evaluations mix.
    """

    numbers: int
    samples: int
    evaluations: int
    m: int
    h: int = 2
    mix_every: int = 1


@dataclass(frozen=True)
class Cluster:
    """``bandwidth``: bytes a second of a process. ``latency``: s of a small all-reduce. ``wire``: bytes a second."""

    bandwidth: float
    latency: float
    wire: float


def reduced_bytes(samples: int, m: int) -> int:
    """Of one all-reduce: 4 m + 8 doubles a sample."""
    return 8 * samples * (4 * m + 8)


def solve_bytes(problem: Problem) -> int:
    """What one process moves in a solve; between two mixes a step reads only what makes its column's products."""
    p = problem
    moved = p.numbers * (F_BYTES * p.evaluations + 3 * 4)  # the first step is plain
    for made in range(1, p.evaluations):
        columns = min(made, p.m)
        if made % p.mix_every == 0:
            moved += floor.anderson_device_bytes(p.numbers, columns, p.h, one_pass=False, both=True)
        else:
            moved += p.numbers * (4 * 4 + 2 * p.h + 2 * columns * p.h)  # docs/design.md: no column is read for a mix
    return moved


def seconds(problem: Problem, cluster: Cluster) -> float:
    """Of an evaluation, on average over a solve of a spread sample; the first evaluation has two all-reduces."""
    reduced = cluster.latency + reduced_bytes(problem.samples, problem.m) / cluster.wire
    e = problem.evaluations
    return solve_bytes(problem) / cluster.bandwidth / e + reduced * (e + 1) / e


def measured_cluster(record: Mapping[str, Any], size: int) -> Cluster:
    """Of a record of bench/scaling.py, from its micro-measurements on so many processes."""
    us = {row["row"]: row["us"] for row in record["rows"] if row["processes"] == size}
    longer = us["all-reduce, large"] - us["all-reduce"]
    wire = 8 * LARGE / (1e-6 * longer) if longer > 0 else math.inf  # one process sends nothing
    return Cluster(8 * record["stream"] / (1e-6 * us["stream"]), 1e-6 * us["all-reduce"], wire)


def compared(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Microseconds an evaluation, measured and predicted, of every row that the model knows."""
    found = []
    for row in record["rows"]:
        if row["row"] not in PREDICTED:
            continue
        size, shrink = row["processes"], record["shrink"]
        cluster = measured_cluster(record, size)
        rows, N = record["consensus"]
        sizes = {"strong": record["strong"] // shrink // size, "weak": record["weak"] // shrink}
        numbers = sizes.get(row["row"], rows * (N // shrink))
        problem = Problem(numbers, 1, record["evaluations"], record["m"])
        if row["row"] == "consensus":  # no sums over ranks but one count
            predicted = solve_bytes(problem) / cluster.bandwidth / problem.evaluations + cluster.latency
        else:
            predicted = seconds(problem, cluster)
        found.append({**row, "predicted": 1e6 * predicted, "ratio": 1e-6 * row["us"] / predicted})
    return found


# Assumed, not measured. Nominal figures: 3.35 TB/s of memory (H100 SXM5; some lists say 3.0), NVLink 4 of 900 GB/s both
# ways together, InfiniBand NDR of 400 Gb/s a port. Guesses: a step reaches 0.8 of the memory's bandwidth; a small
# all-reduce takes 15 us in a node of 8, and 5 us more for every doubling of the nodes.
HBM, REACHED, NVLINK, NDR, IN_NODE, A_DOUBLING, NODE = 3.35e12, 0.8, 450e9, 50e9, 15e-6, 5e-6, 8


def h100(gpus: int) -> Cluster:
    """So many H100, 8 a node."""
    nodes = max(1, math.ceil(gpus / NODE))
    return Cluster(HBM * REACHED, IN_NODE + A_DOUBLING * math.log2(nodes), NVLINK if nodes == 1 else NDR)


def predicted(problem_of: Callable[[int], Problem]) -> list[tuple[int, float, float]]:
    """GPUs, seconds an evaluation, and the part of it that is not communication."""
    found = []
    for gpus in GPUS:
        problem, cluster = problem_of(gpus), h100(gpus)
        whole = seconds(problem, cluster)
        found.append((gpus, whole, solve_bytes(problem) / cluster.bandwidth / problem.evaluations / whole))
    return found
