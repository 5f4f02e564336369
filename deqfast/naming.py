"""Names of arguments and values that do not exist here, and what was meant by them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

# What others call it.
_ELSEWHERE = {
    **dict.fromkeys(("tol", "f_tol", "eps", "f_eps", "f_rtol", "stop_tol"), "rtol"),
    **dict.fromkeys(("abs_tol", "f_atol", "atol_tol"), "atol"),
    **dict.fromkeys(("f_max_iter", "maxiter", "max_iters", "max_steps", "iters", "threshold_iter"), "max_iter"),
    **dict.fromkeys(("threshold", "f_thres", "num_iters", "maxit", "f_steps"), "max_iter"),
    **dict.fromkeys(("f_solver", "method"), "solver"),
    **dict.fromkeys(("b_solver", "grad", "ift", "backward_mode"), "backward"),
    **dict.fromkeys(("f_stop_mode", "stop_mode"), "stop"),
    **dict.fromkeys(("fixed_point_iter", "simple_fixed_point_iter", "picard_iteration", "iteration"), "picard"),
    **dict.fromkeys(("tau", "beta", "relaxation"), "damping"),
    **dict.fromkeys(("lr", "learning_rate"), "step_size"),
}
_HELD: dict[str, dict[str, str]] = {}  # argument of a call -> name, here or elsewhere -> what holds it there


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What was meant, to be added to a message; empty where nothing is like it.

    ``known`` are values of an argument, or the names of arguments, with what the options that they take hold.
    """
    names = list(known)
    elsewhere = _ELSEWHERE.get(name)
    if elsewhere not in names:
        held = [f"{at}={_HELD[at][name]}" for at in names if name in _HELD.get(at, ())]
        if held:
            return f"; did you mean {held[0]}?"
    close = [elsewhere] if elsewhere in names else difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_names(
    callee: str, given: Iterable[str], known: Collection[str], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> None:
    """TypeError unless every keyword argument ``given`` to ``callee`` is one of its ``known`` ones.

    ``elsewhere``: what others call those of this callee.
    """
    for name in given:
        if name not in known:
            hint = did_you_mean(elsewhere.get(name, name), known) or f"; it takes {', '.join(known)}"
            raise TypeError(f"{callee}() got an unexpected keyword argument {name!r}{hint}")


def named(within: str = "", **elsewhere: str) -> Callable[[Class], Class]:
    """Mark a dataclass of options that users make: a keyword that it does not have is refused with what was meant.

    Args:
        within: the argument of a call that takes such options; a call that is given one of them says where it belongs.
        elsewhere: what others call the options of this class alone.
    """

    def decorate(cls: Class) -> Class:
        init = vars(cls)["__init__"]
        known = tuple(field.name for field in dataclasses.fields(cls))

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            check_names(cls.__name__, kwargs, known, elsewhere)
            init(self, *args, **kwargs)

        setattr(cls, init.__name__, checked)
        if within:
            held = _HELD.setdefault(within, {})
            for name, option in {**dict(zip(known, known, strict=True)), **elsewhere}.items():
                held.setdefault(name, f"dq.{cls.__name__}({option}=...)")
        return cls

    return decorate
