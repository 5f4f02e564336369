"""The solvers once more, by the same names: torchdeq's own recurrences, for results that are to be its own.

What is recorded, returned and refused is as of the others; iterates are torchdeq's up to rounding, and so are its
absolute ridge and a Broyden memory that is written over when it is full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ... import compiled
from ...options import check_flag, check_int, check_not_negative
from .._names import ignored
from . import _recurrences as own
from ._arguments import check_max_iter, check_tau, request
from ._loop import Way, solve
from ._solvers import LAM, Result
from ._stat import ANDERSON, BROYDEN, PLAIN


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
    """Anderson acceleration with torchdeq's absolute ridge ``lam`` and any ``tau``; else as ``anderson_solver``."""
    asked = request("anderson_solver", func, x0, max_iter, tol, stop_mode, indexing, kwargs, return_final)
    check_int("m", m, least=2)
    check_not_negative("lam", lam)
    tau = check_tau(tau)
    return solve(asked, Way(ANDERSON, image=True), lambda layout, start, _: own.Anderson(start, layout, m, lam, tau))


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
    """Broyden's method with torchdeq's memory; else as ``broyden_solver``."""
    asked = request("broyden_solver", func, x0, max_iter, tol, stop_mode, indexing, kwargs, return_final)
    if check_flag("ls", ls):
        ignored("broyden_solver", ["ls"], "there is no line search, every step is a full one")
    memory = max(1, asked.max_iter if LBFGS_thres is None else check_max_iter(LBFGS_thres, "LBFGS_thres"))
    return solve(
        asked, Way(BROYDEN, image=False, stalls=True), lambda layout, start, _: own.Broyden(start, layout, memory)
    )


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
    """Plain iteration with any ``tau``; else as ``fixed_point_iter``."""
    asked = request("fixed_point_iter", func, x0, max_iter, tol, stop_mode, indexing, kwargs, return_final)
    tau = check_tau(tau)
    return solve(asked, Way(PLAIN, image=True, mixed=tau), lambda layout, start, _: own.Plain(start, layout, tau))
