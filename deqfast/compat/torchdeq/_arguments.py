"""The arguments of torchdeq's solvers, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ...options import check_callable, check_choice, check_flag, check_not_negative, check_number
from .._names import ignored, refuse
from ._loop import Request
from ._stat import MODES

_COMMON = ("func", "x0", "max_iter", "tol", "stop_mode", "indexing")
KNOWN = {
    "anderson_solver": (*_COMMON, "m", "lam", "tau", "return_final"),
    "broyden_solver": (*_COMMON, "LBFGS_thres", "ls", "return_final"),
    "fixed_point_iter": (*_COMMON, "tau", "return_final"),
    "simple_fixed_point_iter": (*_COMMON, "tau"),
}
# What a module hands on from its solver_kwargs, by the names of its own arguments.
_OF_THE_MODULE = ("f_tol", "f_stop_mode")
_OF_OTHERS = {name for names in KNOWN.values() for name in names}
_WHY = {
    "m": "it keeps no columns",
    "lam": "it solves no small system",
    "tau": "its steps are full ones",
    "LBFGS_thres": "it is an option of Broyden's method",
    "ls": "there is no line search, every step is a full one",
    "return_final": "it returns the last one",
}


def request(
    function: str,
    func: Callable[[Any], Any],
    x0: Any,
    max_iter: float,
    tol: float,
    stop_mode: str,
    indexing: Sequence[float] | None,
    more: dict[str, Any],
    return_final: bool = False,
) -> Request:
    """The checked call; ``more``: keywords that the function does not name.

    Raises:
        TypeError: a keyword that no solver of torchdeq has; the message has those there are, and the nearest.
        ValueError: a value that an argument cannot have.
    """
    given = {**more}
    tol, stop_mode = given.pop("f_tol", tol), given.pop("f_stop_mode", stop_mode)
    known = KNOWN[function]
    unknown = [name for name in given if name not in _OF_OTHERS]
    if unknown:
        refuse(function, unknown[:1], (*known, *_OF_THE_MODULE))
    for name in given:
        ignored(function, [name], _WHY.get(name, "it has no meaning there"))
    check_callable("func", func)
    check_choice("stop_mode", stop_mode, tuple(MODES))
    return Request(
        func=func,
        x0=x0,
        max_iter=check_max_iter(max_iter),
        tol=check_not_negative("tol", tol),
        stop_mode=stop_mode,
        indexing=_indices(indexing),
        final=check_flag("return_final", return_final),
    )


def check_max_iter(max_iter: object, name: str = "max_iter") -> int:
    """The limit as an int from 0 up; a float is rounded down, as torchdeq's own divisions leave them."""
    number = check_number(name, max_iter)
    if not 0 <= number < 2**31 - 1:
        raise ValueError(f"{name} must be from 0 up and below 2**31, got {max_iter}")
    return int(number)


def check_tau(tau: object) -> float:
    """A finite damping factor."""
    number = check_number("tau", tau)
    if not math.isfinite(number) or number == 0:
        raise ValueError(f"tau must be finite and not 0, got {tau}")
    return number


def _indices(indexing: Any) -> list[float]:
    if indexing is None:
        return []
    found = [indexing] if isinstance(indexing, (int, float)) else list(indexing)
    for index in found:
        if check_number("indexing", index) < 1:
            raise ValueError(f"indexing must hold evaluations, counted from 1, got {index}")
    return found
