"""Bytes that one solve must move, from the method alone (s bytes a state number, h bytes a history number).

Anderson, k columns in use, the new column still on chip and its history re-read once for the mix:
    read x, f, x_prev, f_prev; write x; write two new columns; read the k-1 older columns of each history: 5s + 2kh.
    The mixed test space forms its rows from both histories before the mix: 5s + 3kh when a sample's history is
    streamed.
Broyden with one history vector a step, k columns: 5s + (2k+1)h streamed.
The first step is plain iteration: read x and f, write x.
"""

from __future__ import annotations


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
