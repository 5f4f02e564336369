"""Small dense solves in registers: an (M, M) tile, M a power of two, of which the leading n x n part is the system.

Registers cannot be indexed at run time, so rows and columns are picked by masks and sums. Rows beyond n must be those
of the identity. A singular system yields numbers that are not finite: the caller looks. That n is known at run time
alone also keeps the compiler from unrolling the loops, which would cost more registers than there are.
"""

import triton
import triton.language as tl


@triton.jit
def solve_lu(a, y, n, M: tl.constexpr):
    """Solve a z = y by LU with partial pivoting."""
    i = tl.arange(0, M)
    row, col = i[:, None], i[None, :]
    for k in range(n):
        column = tl.sum(tl.where(col == k, a, 0.0), axis=1)
        pivot = tl.argmax(tl.where(i >= k, tl.abs(column), -1.0), axis=0)
        upper = tl.sum(tl.where(row == k, a, 0.0), axis=0)
        lower = tl.sum(tl.where(row == pivot, a, 0.0), axis=0)
        y_upper = tl.sum(tl.where(i == k, y, 0.0), axis=0)
        y_lower = tl.sum(tl.where(i == pivot, y, 0.0), axis=0)
        head = tl.sum(tl.where(i == k, column, 0.0), axis=0)
        value = tl.sum(tl.where(i == pivot, column, 0.0), axis=0)
        a = tl.where(row == k, lower[None, :], tl.where(row == pivot, upper[None, :], a))
        y = tl.where(i == k, y_lower, tl.where(i == pivot, y_upper, y))
        column = tl.where(i == pivot, head, column)
        factor = tl.where(i > k, column / value, 0.0)
        a = tl.where(row > k, a - factor[:, None] * lower[None, :], a)
        y = tl.where(i > k, y - factor * y_lower, y)
    for step in range(n):
        k = n - 1 - step
        column = tl.sum(tl.where(col == k, a, 0.0), axis=1)
        value = tl.sum(tl.where(i == k, y, 0.0), axis=0) / tl.sum(tl.where(i == k, column, 0.0), axis=0)
        y = tl.where(i == k, value, tl.where(i < k, y - column * value, y))
    return y


@triton.jit
def factor_ldl(a, n, M: tl.constexpr):
    """Factor a symmetric a = L D L^T: returns L^-1 and the diagonal of D, all of it positive if a is definite."""
    i = tl.arange(0, M)
    row, col = i[:, None], i[None, :]
    lower_inverse = tl.where(row == col, 1.0, 0.0).to(a.dtype)
    d = tl.full((M,), 1.0, a.dtype)
    for k in range(n):
        across = tl.sum(tl.where(row == k, a, 0.0), axis=0)
        down = tl.sum(tl.where(col == k, a, 0.0), axis=1)
        pivot = tl.sum(tl.where(i == k, across, 0.0), axis=0)
        factor = tl.where(i > k, down / pivot, 0.0)
        done = tl.sum(tl.where(row == k, lower_inverse, 0.0), axis=0)
        a -= factor[:, None] * across[None, :]
        lower_inverse -= factor[:, None] * done[None, :]
        d = tl.where(i == k, pivot, d)
    return lower_inverse, d


@triton.jit
def solve_ldl(lower_inverse, d, y):
    """Solve a z = y with the factors of a."""
    forward = tl.sum(lower_inverse * y[None, :], axis=1) / d
    return tl.sum(lower_inverse * forward[:, None], axis=0)


@triton.jit
def inverse_diagonal(lower_inverse, d):
    """The diagonal of a^-1: entry j is sum_i (L^-1)_ij^2 / D_i."""
    return tl.sum(lower_inverse * lower_inverse / d[:, None], axis=0)
