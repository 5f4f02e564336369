"""Who solves: deqfast's solvers, and the old one."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..options import check_callable, check_choice
from ..solve import fixed_point
from ..solvers.base import Solver
from ..solvers.choose import choose_solver
from . import textbook
from .case import Case, Map

OLD = ("torchdeq.anderson", "torchdeq.broyden", "torchdeq.fixed_point_iter", "locuslab")
SOLVERS = ("anderson", "broyden", "picard")


@dataclass(frozen=True)
class Contender:
    """A solver that is asked for a relative residual and a limit of evaluations.

    Attributes:
        name: in tables.
        solve: (f, rtol, max_iter) -> z, without a graph.
        attached: the same, with a gradient; None where there is none.
        tunable: it takes rtol and max_iter.
        old: it is the caller's own.
    """

    name: str
    solve: Callable[[Map, float, int], Any]
    attached: Callable[[Map, float, int], Any] | None
    tunable: bool = True
    old: bool = False


def ours(case: Case, solvers: Iterable[str | Solver] | Mapping[str, str | Solver] | None) -> list[Contender]:
    """Solvers of deqfast, by name."""
    if isinstance(solvers, (str, Solver)):
        solvers = (solvers,)
    if solvers is None:
        solvers = SOLVERS
    named = dict(solvers) if isinstance(solvers, Mapping) else {_name(s): s for s in solvers}
    if not named:
        raise ValueError("solvers must hold at least one solver, got none")
    return [_ours(case, name, choose_solver(solver)) for name, solver in named.items()]


def _name(solver: str | Solver) -> str:
    return f"deqfast {solver if isinstance(solver, str) else repr(solver)}"


def _ours(case: Case, name: str, solver: Solver) -> Contender:
    def solve(f: Map, rtol: float, max_iter: int, backward: Any = "none") -> Any:
        return fixed_point(
            f,
            case.z0,
            solver=solver,
            rtol=rtol,
            max_iter=max_iter,
            backward=backward,
            batch_dims=case.batch_dims,
        ).z

    return Contender(name, solve, lambda f, rtol, max_iter: solve(f, rtol, max_iter, None))


def old(case: Case, which: Any) -> Contender:
    """The old one, by name or as a callable (f, z0) -> z.

    Raises:
        ValueError: an unknown name.
        ImportError: its library is not installed.
        TypeError: it cannot take such a z0.
    """
    if not isinstance(which, str):
        check_callable("old", which)
        return _own(case, which)
    check_choice("old", which, OLD)
    return _locuslab(case) if which == "locuslab" else _torchdeq(case, which.partition(".")[2])


def _own(case: Case, call: Callable[[Map, Any], Any]) -> Contender:
    def solve(f: Map, rtol: float, max_iter: int) -> Any:
        z = call(f, case.z0)
        case.check(z, "old", "; let it pick z out of what the solver returns")
        return z

    name = getattr(call, "__name__", type(call).__name__)
    return Contender("your own" if name == "<lambda>" else name, solve, solve, tunable=False, old=True)


def _locuslab(case: Case) -> Contender:
    if not isinstance(case.z0, Tensor) or case.z0.dim() < 1:
        raise TypeError(f"old='locuslab' takes one tensor (B, ...) as z0, got {type(case.z0).__name__}")

    def solve(f: Map, rtol: float, max_iter: int) -> Tensor:
        with torch.no_grad():
            return textbook.anderson(f, case.z0, max_iter=max_iter, tol=rtol)

    def attached(f: Map, rtol: float, max_iter: int) -> Tensor:
        def adjoint(g: Map, start: Tensor) -> Tensor:
            return textbook.anderson(g, start, max_iter=max_iter, tol=rtol)

        return textbook.differentiated(f, solve(f, rtol, max_iter), adjoint)

    return Contender("locuslab anderson", solve, attached, old=True)


def _torchdeq(case: Case, method: str) -> Contender:
    if not isinstance(case.z0, (Tensor, list, tuple)):
        raise TypeError(f"old='torchdeq.{method}' takes a tensor or a list as z0, got {type(case.z0).__name__}")
    try:
        library = importlib.import_module("torchdeq")
    except ImportError as error:
        raise ImportError(f"old='torchdeq.{method}' needs torchdeq: pip install torchdeq==0.1.0") from error
    several, structure = not isinstance(case.z0, Tensor), type(case.z0)
    extra = 1 if method == "broyden" else 0  # it evaluates f once more than it is told

    @functools.cache  # made once, as a model makes it
    def made(rtol: float, max_iter: int, training: bool) -> Any:
        options = {"solver": method, "max_iter": max(3, max_iter - extra), "tol": rtol, "stop_mode": "rel"}
        both = {f"{way}_{name}": value for way in "fb" for name, value in options.items()}
        return library.get_deq(**both, ift=True).train(training)

    def solve(f: Map, rtol: float, max_iter: int, training: bool = False) -> Any:
        z = made(rtol, max_iter, training)((lambda *z: f(structure(z))) if several else f, case.z0)[0][-1]
        return structure(z) if several else z

    return Contender(f"torchdeq {method}", solve, lambda f, rtol, max_iter: solve(f, rtol, max_iter, True), old=True)
