"""The four solvers, by torchdeq's names, arguments and results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import compiled
from ...ops.layout import Layout
from ...ops.workspace import Stopping
from ...options import check_flag, check_int, check_not_negative
from ...solvers.anderson import Anderson
from ...solvers.base import Solver
from ...solvers.broyden import DEFAULT_MEMORY, Broyden
from ...solvers.picard import Picard
from .._names import ignored
from . import _recurrences as own
from ._arguments import check_max_iter, check_tau, request
from ._loop import Kernels, Stepper, Way, layout_for, solve
from ._stat import ANDERSON, BROYDEN, PLAIN, Counted, SolverStat

LAM = 1e-4
_IMAGE = Way(ANDERSON, image=True)
_ITERATE = Way(BROYDEN, image=False, stalls=True)

Result = tuple[Any, list[Any], SolverStat]


@compiled.entry("func")
def anderson_solver(
    func: Callable[[Any], Any],
    x0: Any,
    max_iter: float = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[float] | None = None,
    m: int = 6,
    lam: float = LAM,
    tau: float = 1.0,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """Anderson acceleration, with the arguments and the result of ``torchdeq``'s.

    Args:
        func: callable x -> f(x), shaped like x.
        x0: (B, ...), (B,) for samples of one number, () for one of them; or a list of such tensors.
        max_iter: evaluations of f at most, an int or a whole float; 0 makes none and returns x0.
        tol: stop when the residual of every finite sample is below it.
        stop_mode: "abs", ||f(x) - x||, or "rel", that over ||f(x)||; norms over a sample.
        indexing: evaluations, counted from 1, at which the best state so far is wanted.
        m: columns of history.
        lam: regularisation of the small system. Relative to its diagonal here, absolute there; the default is that of
            ``dq.Anderson``.
        tau: in (0, 1], damps the mixed iterate; beyond, torchdeq's own recurrence is used.
        return_final: make all evaluations and return f at the last iterate, not at the best one.
        **kwargs: ``f_tol`` and ``f_stop_mode`` go before ``tol`` and ``stop_mode``; options of torchdeq's other solvers
            are not used, which is said once.

    Returns:
        f at every sample's best iterate, detached; the list of states, one for every index, that of the end for those
        after the stop; a ``SolverStat``, traces (B, max(1, max_iter - 1)) from the third evaluation on.

    Raises:
        TypeError: an argument that none of torchdeq's solvers has.
        ValueError: a value that an argument cannot have.
    """
    asked = request("anderson_solver", func, x0, max_iter, tol, stop_mode, indexing, kwargs, return_final)
    solver = _anderson(m, lam, tau)

    def make(layout: Layout, start: Any, rule: Stopping | None) -> Stepper:
        if solver is None:
            return own.Anderson(start, layout, max(2, m), lam, tau)
        return Kernels(solver, start, layout, rule)

    return solve(asked, _IMAGE, make)


@compiled.entry("func")
def broyden_solver(
    func: Callable[[Any], Any],
    x0: Any,
    max_iter: float = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[float] | None = None,
    LBFGS_thres: float | None = None,
    ls: bool = False,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """Broyden's method, with the arguments and the result of ``torchdeq``'s.

    Args:
        func: callable x -> f(x), shaped like x.
        x0: as of ``anderson_solver``.
        max_iter: steps at most: evaluations beside that at x0.
        tol: as of ``anderson_solver``. A solve within three times of it that no longer gains ends too.
        stop_mode: as there.
        indexing: evaluations, counted from 1 at x0, at which the best state so far is wanted.
        LBFGS_thres: steps kept, default all up to 100; a sample whose memory is full starts again.
        ls: a line search, which there is none of; said once.
        return_final: make all steps and return the last iterate, not the best one.
        **kwargs: as there.

    Returns:
        Every sample's best iterate, detached; the states; a ``SolverStat``, traces (B, max_iter + 1) from the first
        step on.
    """
    asked = request("broyden_solver", func, x0, max_iter, tol, stop_mode, indexing, kwargs, return_final)
    if check_flag("ls", ls):
        ignored("broyden_solver", ["ls"], "there is no line search, every step is a full one")
    solver = Broyden(_memory(LBFGS_thres, asked.max_iter))
    return solve(asked, _ITERATE, lambda layout, start, rule: Kernels(solver, start, layout, rule))


@compiled.entry("func")
def fixed_point_iter(
    func: Callable[[Any], Any],
    x0: Any,
    max_iter: float = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[float] | None = None,
    tau: float = 1.0,
    return_final: bool = False,
    **kwargs: Any,
) -> Result:
    """Plain iteration x + tau (f(x) - x), with the arguments and the result of ``torchdeq``'s.

    Args:
        func: callable x -> f(x), shaped like x.
        x0: as of ``anderson_solver``.
        max_iter: evaluations of f at most.
        tol: as of ``anderson_solver``; a residual is that of f, whatever tau is.
        stop_mode: as there.
        indexing: as there.
        tau: damping; above 1 the step is extrapolated.
        return_final: as there.
        **kwargs: as there.

    Returns:
        x + tau (f(x) - x) at every sample's best x, detached; the states; a ``SolverStat``, traces (B, max_iter + 1).
    """
    asked = request("fixed_point_iter", func, x0, max_iter, tol, stop_mode, indexing, kwargs, return_final)
    tau = check_tau(tau)

    def make(layout: Layout, start: Any, rule: Stopping | None) -> Stepper:
        return Kernels(Picard(tau), start, layout, rule) if 0 < tau <= 1 else own.Plain(start, layout, tau)

    return solve(asked, Way(PLAIN, image=True, mixed=tau), make)


@compiled.entry("func")
@torch.no_grad()
def simple_fixed_point_iter(
    func: Callable[[Any], Any],
    x0: Any,
    max_iter: float = 50,
    tau: float = 1.0,
    indexing: Sequence[float] | None = None,
    **kwargs: Any,
) -> Result:
    """``max_iter`` plain iterations and nothing else, with the arguments and the result of ``torchdeq``'s.

    Args:
        func: callable x -> f(x), shaped like x.
        x0: as of ``anderson_solver``.
        max_iter: evaluations of f.
        tau: damping.
        indexing: evaluations, counted from 1, whose x is wanted.
        **kwargs: ``tol`` and ``stop_mode`` are taken and not used, for nothing is measured on the way.

    Returns:
        The last x, detached; the x at the indices; a ``SolverStat`` of the last step, traces (B, 1).
    """
    common = {name: kwargs.pop(name) for name in ("tol", "stop_mode") if name in kwargs}
    settings = {"tol": 0.0, "stop_mode": "abs", **common}
    asked = request(
        "simple_fixed_point_iter", func, x0, max_iter, settings["tol"], settings["stop_mode"], indexing, kwargs
    )
    tau = check_tau(tau)
    layout = layout_for(x0)
    x = fx = [t.detach() for t in layout.tensors(x0)]
    states, pending = [], sorted(asked.indexing, reverse=True)
    for made in range(1, asked.max_iter + 1):
        x = fx
        fx = [t.detach() for t in layout.flatten(func(layout.unflatten(x)), "f(x)")]
        if tau != 1:
            fx = [a + tau * (b - a) for a, b in zip(x, fx, strict=True)]
        fx = [t.to(leaf.dtype) for t, leaf in zip(fx, layout.leaves, strict=True)]
        while pending and pending[-1] <= made:
            pending.pop()
            states.append(layout.unflatten([t.clone() for t in fx]))
    result = layout.unflatten([t.clone() for t in fx])
    states += [layout.unflatten([t.clone() for t in fx]) for _ in pending]
    return result, states, _last_step(layout, x, fx, asked.max_iter)


def _last_step(layout: Layout, x: list[Tensor], fx: list[Tensor], made: int) -> SolverStat:
    def norm(leaves: list[Tensor]) -> Tensor:
        rows = [torch.linalg.vector_norm(r, dim=1, dtype=layout.acc) for r in layout.rows(leaves)]
        return torch.linalg.vector_norm(torch.stack(rows), dim=0)

    moved = norm([b - a for a, b in zip(x, fx, strict=True)])
    relative = moved / (norm(fx) + 1e-8)
    return SolverStat(
        abs_lowest=moved,
        rel_lowest=relative,
        abs_trace=moved[:, None],
        rel_trace=relative[:, None],
        nstep=torch.full((layout.B,), float(made), device=layout.device),
    )


def _anderson(m: int, lam: float, tau: float) -> Anderson | None:
    """The solver of these options; None where they are torchdeq's alone."""
    check_int("m", m)
    check_not_negative("lam", lam)
    if not 0 < check_tau(tau) <= 1:
        return None
    ridge = None if lam == LAM else float(lam)
    if lam >= 1:
        ignored("anderson_solver", ["lam"], f"a ridge is relative to the diagonal here and below 1, got {lam}")
        ridge = None
    return Anderson(m=m, mixing=float(tau), ridge=ridge)


def _memory(thres: float | None, max_iter: int) -> int:
    asked = max_iter if thres is None else check_max_iter(thres, "LBFGS_thres")
    return max(2, min(asked, DEFAULT_MEMORY if thres is None else asked))


def linear_solver(function: Callable[..., Any], max_iter: int) -> tuple[Solver, Counted] | None:
    """What makes the backward solves where one of these functions was asked for; None: it is none of them."""
    if not str(getattr(function, "__module__", "")).startswith(__package__ or "?"):
        return None
    name = getattr(function, "__name__", "")
    if name == "anderson_solver":
        return Anderson(m=6), ANDERSON
    if name == "broyden_solver":
        return Broyden(_memory(None, max_iter), scale="first_step"), BROYDEN
    return (Picard(), PLAIN) if name in ("fixed_point_iter", "simple_fixed_point_iter") else None
