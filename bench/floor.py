"""Bytes that one solve must move, from the method alone (s bytes a state number, h bytes a history number).

Anderson, k columns in use, the new column still on chip and its history re-read once for the mix:
    read x, f, x_prev, f_prev; write x; write two new columns; read the k-1 older columns of each history: 5s + 2kh.
    The mixed test space forms its rows from both histories before the mix: 5s + 3kh when a sample's history is
    streamed.
Broyden with one history vector a step, k columns: 5s + (2k+1)h streamed.
The first step is plain iteration: read x and f, write x.

On a GPU a sample that one block works on is read once, its history for the mix being near by; a larger one is split
over blocks and takes two passes, with f and the columns that are mixed read again: 6s + (2k+1)h where only dG is
multiplied (Type II), 6s + 3kh where both histories are. Broyden's chain form reads every step once, 3s + (k+1)h, its
Gram form twice.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

REGIMES_H = Path(__file__).parents[1] / "csrc" / "include" / "deqfast" / "regimes.h"


def step_bytes(numbers: int, columns: int, h: int, *, mixed: bool = False, s: int = 4) -> int:
    """Floor of one Anderson step that makes a column and ends with `columns` in use."""
    return numbers * (5 * s + (3 if mixed else 2) * columns * h)


def anderson_bytes(numbers: int, evaluations: int, m: int, h: int, *, mixed: bool = False, s: int = 4) -> int:
    """Floor of a whole Anderson solve on `numbers` = B N state numbers."""
    steps = (step_bytes(numbers, min(k, m), h, mixed=mixed, s=s) for k in range(1, evaluations))
    return numbers * 3 * s + sum(steps)


def broyden_bytes(numbers: int, evaluations: int, h: int = 4, s: int = 4) -> int:
    """Floor of a whole Broyden solve that never restarts."""
    return numbers * (3 * s + sum(5 * s + (2 * k + 1) * h for k in range(1, evaluations)))


@cache
def block_max_n() -> int:
    """Numbers a sample up to which the CUDA kernels give it one block."""
    found = re.search(r"kBlockMaxN = (\d+);", REGIMES_H.read_text())
    assert found is not None, REGIMES_H
    return int(found[1])


def fits_a_block(N: int) -> bool:
    return block_max_n() >= N


def anderson_device_bytes(
    numbers: int, columns: int, h: float, *, one_pass: bool, both: bool = False, s: int = 4
) -> int:
    """Floor of one Anderson step on a GPU with `columns` in use; `both`: both histories are multiplied."""
    if one_pass:
        return int(numbers * (5 * s + 2 * columns * h))
    return int(numbers * (6 * s + (3 * columns if both else 2 * columns + 1) * h))


def broyden_device_bytes(numbers: int, steps: int, one_pass: bool, *, h: int = 4, s: int = 4) -> int:
    """Floor of one Broyden step on a GPU that ends with `steps` + 1 of them."""
    return numbers * (3 * s + (steps + 1) * h if one_pass else 5 * s + (2 * steps + 1) * h)
