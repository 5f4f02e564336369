"""From what a user names to the solver."""

from __future__ import annotations

from ..options import check_choice
from .anderson import Anderson
from .base import Solver
from .broyden import Broyden
from .picard import Picard

SOLVERS: dict[str, Solver] = {"anderson": Anderson(), "broyden": Broyden(), "picard": Picard()}


def choose_solver(solver: str | Solver) -> Solver:
    """The solver named or given.

    Raises:
        ValueError, TypeError: neither a known name nor solver options.
    """
    if isinstance(solver, str):
        if solver not in SOLVERS:
            check_choice("solver", solver, tuple(SOLVERS))
        return SOLVERS[solver]
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a name or an Anderson, Broyden or Picard, got {type(solver).__name__}")
    return solver
