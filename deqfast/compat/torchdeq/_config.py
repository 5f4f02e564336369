"""The arguments of torchdeq's ``get_deq``, from wherever they come."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...options import check_choice, check_flag, check_int, check_not_negative, check_number
from .._names import refuse
from . import _solvers
from ._arguments import check_max_iter, check_tau
from ._stat import MODES

CORES = ("sliced", "indexing")
SOLVERS: dict[str, Callable[..., Any]] = {
    "anderson": _solvers.anderson_solver,
    "broyden": _solvers.broyden_solver,
    "fixed_point_iter": _solvers.fixed_point_iter,
    "simple_fixed_point_iter": _solvers.simple_fixed_point_iter,
}


@dataclass(frozen=True)
class Config:
    """What ``get_deq`` takes; see there."""

    core: str = "sliced"
    ift: bool = False
    hook_ift: bool = False
    f_solver: str | Callable[..., Any] = "fixed_point_iter"
    b_solver: str | Callable[..., Any] = "fixed_point_iter"
    no_stat: bool | None = None
    f_max_iter: float = 40
    b_max_iter: float = 40
    f_tol: float = 1e-3
    b_tol: float = 1e-6
    f_stop_mode: str = "abs"
    b_stop_mode: str = "abs"
    eval_factor: float = 1.0
    eval_f_max_iter: float = 0
    n_states: int = 1
    indexing: Sequence[float] | None = None
    grad: int | Sequence[int] = 1
    tau: float = 1.0
    sup_gap: int = -1
    sup_loc: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_choice("core", self.core, CORES)
        for name in ("ift", "hook_ift"):
            check_flag(name, getattr(self, name))
        for name in ("f_max_iter", "b_max_iter", "eval_f_max_iter"):
            check_max_iter(getattr(self, name), name)
        check_not_negative("f_tol", self.f_tol)
        check_not_negative("b_tol", self.b_tol)
        check_choice("f_stop_mode", self.f_stop_mode, tuple(MODES))
        check_choice("b_stop_mode", self.b_stop_mode, tuple(MODES))
        check_not_negative("eval_factor", self.eval_factor)
        check_int("n_states", self.n_states)
        check_tau(self.tau)
        for index in self.indices:
            if check_number("indexing", index) < 1:
                raise ValueError(f"indexing must hold evaluations, counted from 1, got {index}")
        steps = self.phantom_steps
        if len(steps) not in (1, self.states):
            raise ValueError(f"grad must be one number or one for each of {self.states} states, got {len(steps)}")
        for step in steps:
            check_int("grad", step)

    @property
    def indices(self) -> list[float]:
        """``indexing`` as a list."""
        return list(self.indexing or ())

    @property
    def states(self) -> int:
        """How many states a call in training returns, without those of ``sup_gap`` and ``sup_loc``."""
        return self.n_states if self.n_states > 1 else len(self.indices) + 1

    @property
    def phantom_steps(self) -> list[int]:
        """``grad`` as a list."""
        return list(self.grad) if isinstance(self.grad, (list, tuple)) else [self.grad]  # type: ignore[list-item]

    @property
    def evaluations(self) -> int:
        """Evaluations at most in eval mode."""
        asked = check_max_iter(self.eval_f_max_iter, "eval_f_max_iter")
        return asked if asked > 0 else int(self.f_max_iter * self.eval_factor)


NAMES = tuple(field.name for field in fields(Config))


def config_of(args: Any, given: Mapping[str, Any]) -> Config:
    """The arguments in ``args``, then in ``given``; neither is changed.

    ``args`` may hold what is somebody else's; a keyword may not.
    """
    refuse("get_deq", [name for name in given if name not in NAMES], ("args", *NAMES))
    if args is None:
        found: Mapping[str, Any] = {}
    elif isinstance(args, Mapping):
        found = args
    elif isinstance(args, argparse.Namespace) or hasattr(args, "__dict__"):
        found = vars(args)
        if set(found) == {"config"} and isinstance(found["config"], Mapping):  # torchdeq's DEQConfig
            found = found["config"]
    else:
        raise TypeError(f"args must be a mapping, a Namespace or an object with attributes, got {type(args).__name__}")
    return Config(**{name: found[name] for name in NAMES if name in found} | dict(given))


def solver_of(name: str, asked: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function that a solver's name stands for, or the function that was given."""
    if callable(asked):
        return asked
    check_choice(name, asked, tuple(SOLVERS))
    return SOLVERS[asked]
