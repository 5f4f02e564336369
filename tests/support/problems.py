"""Small batched maps with known behaviour, solvers to sweep, and the bounds that tests compare with.

The maps use addition, multiplication, division and absolute values alone: these are rounded correctly, so that a row
has the same bits whatever the number of rows, their order, the strides or the number of threads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import deqfast as dq
from deqfast import ops
from deqfast.loop.state import SolverState
from deqfast.ops.codes import Int, Real

# The tests of the steps run on another device too: DEQFAST_TEST_DEVICE=cuda. Numbers are drawn on the CPU, so that the
# problems are the same everywhere.
DEVICE = torch.device(os.environ.get("DEQFAST_TEST_DEVICE", "cpu"))


def _backend(name: str) -> Any:
    reason = ops.why_not(name, DEVICE)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


# Triton's interpreter is too slow for every test; tests/ops/triton_conformance.py has those that it runs.
BACKENDS = ["reference", "torch", _backend("native"), *([] if DEVICE.type == "cpu" else [_backend("triton")])]
# What is instrumented or emulated is native alone: DEQFAST_TEST_NATIVE_ONLY=1.
if os.environ.get("DEQFAST_TEST_NATIVE_ONLY"):
    BACKENDS = [_backend("native")]
# Those whose sums have an order of their own; torch's matrix products take another one with another batch.
ORDERED = [backend for backend in BACKENDS if backend != "torch"]
needs_native = pytest.mark.skipif(ops.why_not("native", DEVICE) is not None, reason="the native backend is not there")
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}

SOLVERS = {
    "anderson": dq.Anderson(),
    "anderson-m2": dq.Anderson(m=2),
    "anderson-1": dq.Anderson(m=5, type=1),
    "anderson-2": dq.Anderson(m=5, type=2, evict="oldest"),
    "anderson-mixing": dq.Anderson(m=4, mixing=0.7),
    "anderson-f32": dq.Anderson(m=6, history_dtype=torch.float32),
    "anderson-f16": dq.Anderson(m=4, history_dtype=torch.float16),
    "anderson-int8": dq.Anderson(m=4, history_dtype=torch.int8),
    "broyden": dq.Broyden(),
    "broyden-memory4": dq.Broyden(memory=4),
    "broyden-scaled": dq.Broyden(scale="first_step"),
    "picard": dq.Picard(),
    "picard-damped": dq.Picard(damping=0.7),
}
EVERY_SOLVER = [pytest.param(solver, id=name) for name, solver in SOLVERS.items()]
ONE_OF_EACH = [pytest.param(SOLVERS[name], id=name) for name in ("anderson", "broyden", "picard")]
SOME_SOLVERS = [
    pytest.param(SOLVERS[name], id=name) for name in ("anderson", "anderson-2", "broyden", "picard", "picard-damped")
]
ACCELERATED = [pytest.param(SOLVERS[name], id=name) for name in ("anderson", "anderson-2", "broyden")]


def pull(z: Any, x: Any, rate: Any) -> Any:
    """h / (1 + |h|) with h = rate (z - its neighbour / 2) / 1.5 + x: contracts by ``rate``, row by row."""
    return pytree.tree_map(lambda z, x: _pull(z, x, rate), z, x)


def _pull(z: Tensor, x: Tensor, rate: Any) -> Tensor:
    if z.is_complex():
        return torch.view_as_complex(_pull(torch.view_as_real(z), torch.view_as_real(x), _like(rate, 1 + z.dim())))
    h = (z - z.roll(1, -1) * 0.5) * (_like(rate, z.dim()) * (2 / 3)) + x
    return h / (1 + h.abs())


def _like(rate: Any, dim: int) -> Any:
    return rate.reshape(-1, *[1] * (dim - 1)) if isinstance(rate, Tensor) else rate


@dataclass
class Problem:
    """A start and the arguments of ``pull``: rates differ from sample to sample."""

    z0: Any
    x: Any
    rate: Tensor

    @property
    def args(self) -> tuple[Any, Any]:
        return self.x, self.rate

    def rows(self, index: Any) -> Problem:
        """The problem of some of the samples."""
        return Problem(*(pytree.tree_map(lambda t: t[index].clone(), part) for part in (self.z0, self.x, self.rate)))

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(*(pytree.tree_map(lambda t: t.to(dtype), part) for part in (self.z0, self.x, self.rate)))


def problem(
    B: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, slowest: float = 0.95, zero: bool = True
) -> Problem:
    """B samples of ``shape`` that contract by rates from 0.05 to ``slowest``."""
    generator = torch.Generator().manual_seed(1000 * B + 10 * sum(shape) + seed)
    double = torch.complex128 if dtype.is_complex else torch.float64
    cpu = {"device": "cpu", "generator": generator}
    x = torch.randn(B, *shape, dtype=double, **cpu).to(DEVICE, dtype)
    z0 = torch.randn(B, *shape, dtype=double, **cpu).to(DEVICE, dtype)
    real = x.real.dtype if dtype.is_complex else dtype
    rate = (0.05 + (slowest - 0.05) * torch.rand(B, dtype=torch.float64, **cpu)).to(DEVICE, real)
    return Problem(torch.zeros_like(x) if zero else z0, x, rate)


def linear(
    B: int, N: int, *, dtype: torch.dtype = torch.float64, norm: float = 0.9, seed: int = 0, symmetric: bool = False
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """z -> A z + b with ||A||_2 = norm, and its fixed points (B, N); symmetric: eigenvalues spread from 0 to norm."""
    generator = torch.Generator().manual_seed(seed)
    cpu = {"device": "cpu", "dtype": torch.float64}
    A = torch.randn(N, N, generator=generator, **cpu)
    if symmetric:
        Q = torch.linalg.qr(A)[0]
        A = (Q * torch.linspace(0, norm, N, **cpu)) @ Q.mT
    else:
        A *= norm / torch.linalg.matrix_norm(A, 2)
    b = torch.randn(B, N, generator=generator, **cpu)
    exact = torch.linalg.solve(torch.eye(N, **cpu) - A, b.mT).mT
    A, b = A.to(DEVICE, dtype), b.to(DEVICE, dtype)
    return lambda z: z @ A.mT + b, exact.to(DEVICE, dtype)


def solve(p: Problem, f: Callable[..., Any] = pull, **options: Any) -> dq.Solution:
    """``fixed_point`` of a problem, without gradients."""
    return dq.fixed_point(f, p.z0, p.args, **{"backward": "none", **options})


class Counted:
    """A map that remembers how many rows each evaluation saw."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.rows: list[int] = []

    def __call__(self, z: Any, *args: Any) -> Any:
        self.rows.append(pytree.tree_leaves(z)[0].shape[0])
        return self.f(z, *args)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's thread count inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(t: Tensor) -> Tensor:
    """The bits of ``t``: NaN equals itself, 0 and -0 differ."""
    t = torch.view_as_real(t) if t.is_complex() else t
    if not t.is_floating_point():
        return t
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees of tensors hold the same bits."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(s.dtype == t.dtype and torch.equal(bits(s), bits(t)) for s, t in pairs)


def assert_same_samples(a: dq.Solution, rows_a: Any, b: dq.Solution, rows_b: Any) -> None:
    """Samples ``rows_a`` of ``a`` and ``rows_b`` of ``b`` have the same answer, bit for bit, and the same record."""
    for name in ("z", "residual", "steps", "status", "converged"):
        s = pytree.tree_map(lambda t: t[rows_a], getattr(a, name))
        t = pytree.tree_map(lambda t: t[rows_b], getattr(b, name))
        assert same_bits(s, t), name


def assert_same_solution(a: dq.Solution, b: dq.Solution) -> None:
    """Two solves did the same, bit for bit."""
    assert a.nfe == b.nfe
    assert_same_samples(a, slice(None), b, slice(None))
    if a.trace is not None or b.trace is not None:
        assert same_bits(a.trace, b.trace)


def rows_of(tree: Any) -> Tensor:
    """(B, N) in float64, complex numbers as pairs, leaves side by side."""
    leaves = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in pytree.tree_leaves(tree)]
    return torch.cat([t.double().reshape(t.shape[0], t[:1].numel()) for t in leaves], dim=1)


def relative_residual(z: Any, fz: Any) -> Tensor:
    """(B,) ||f(z) - z|| / ||f(z)|| in float64; 0 / 0 is 0."""
    z, fz = rows_of(z), rows_of(fz)
    g = (fz - z).norm(dim=1)
    return torch.where(g > 0, g / fz.norm(dim=1), 0.0)


def residual_bound(z: Any, fz: Any, dtype: torch.dtype) -> Tensor:
    """(B,) how far a relative residual measured in ``dtype``'s accumulation may be from the exact one.

    g = f - z is rounded once a number, and the sums of squares are added up in blocks: 16 eps of the quotient covers
    both, and the cancellation in g scales with ||z|| / ||f||.
    """
    eps = EPS[torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32]
    z, fz = rows_of(z), rows_of(fz)
    ratio = ((fz - z).norm(dim=1) + z.norm(dim=1)) / fz.norm(dim=1).clamp(min=1e-300)
    return 16 * eps * (1 + ratio)


def run(state: SolverState, f: Callable[..., Any], steps: int | None = None) -> SolverState:
    """Drive a state for some evaluations, or to its end."""
    while not state.done and (steps is None or steps > 0):
        state.step(f(state.z))
        steps = None if steps is None else steps - 1
    return state


# ---- one step, from one saved state ----


def in_double(saved: dict[str, Any], oracle: SolverState) -> dict[str, Any]:
    """A saved state with every number that the float64 ``oracle`` keeps in float64 converted to it."""
    own = oracle.state_dict()["tensors"]
    tensors = {}
    for name, t in saved["tensors"].items():
        if name in own:
            t = t.to(own[name].dtype)
        tensors[name] = t
    return {**saved, "tensors": tensors, "layout": repr(oracle.layout)}


def double_of(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def assert_same_decisions(state: SolverState, oracle: SolverState, best_before: Tensor) -> None:
    """Every number that a step decides agrees with the oracle's: integers exactly, norms up to rounding.

    ``best_before``: (B,) least residuals before the step; one that the new residual equals up to rounding may be
    replaced or kept.
    """
    if state.layout.B == 0 or state.layout.N == 0:
        return
    x, g = rows_of(oracle.evaluated()).norm(dim=1), oracle.ws.real_row(Real.NORM)
    relative = oracle.ws.real_row(Real.RESIDUAL)
    f = torch.where((relative > 0) & (relative < torch.inf), g / relative, x)
    error = 16 * EPS[state.layout.acc] * (x + f)
    tied = (relative - best_before).abs() <= 4 * error / f
    for decided in Int:
        got, expected = state.ws.int_row(decided), oracle.ws.int_row(decided)
        agrees = (got == expected) | (tied if decided in (Int.BEST_AT, Int.BEST_STEP) else torch.zeros_like(tied))
        assert bool(agrees.all()), f"{decided.name}: {got.tolist()} against {expected.tolist()}"
    stopped = oracle.status != dq.Status.RUNNING  # x is the answer there, not what was measured
    for row, tolerance in ((Real.NORM, error), (Real.RESIDUAL, 4 * error / f), (Real.UNIT, torch.zeros_like(x))):
        got, expected = state.ws.real_row(row).double(), oracle.ws.real_row(row)
        agrees = ((got - expected).abs() <= tolerance) | stopped | (got == expected)
        assert bool(agrees.all()), f"{row.name}: {got.tolist()} against {expected.tolist()}"


def alike(a: SolverState, b: SolverState, backend: str) -> bool:
    """Whether two states stand at the same point: bit for bit, or where sums have no order of their own nearly."""
    if backend != "torch" or same_state(a, b):
        return same_state(a, b)
    return a.nfe == b.nfe and torch.allclose(rows_of(a.z), rows_of(b.z), rtol=1e-3, atol=1e-4, equal_nan=True)


def same_state(a: SolverState, b: SolverState) -> bool:
    """Whether two states stand at the same point, bit for bit."""
    return (
        a.nfe == b.nfe
        and a.done == b.done
        and all(same_bits(getattr(a, name), getattr(b, name)) for name in ("z", "status", "steps", "residual"))
    )
