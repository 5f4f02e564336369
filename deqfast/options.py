"""The options of a call: one frozen value, checked once, and the checks that every argument goes through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch.utils import _pytree as pytree

from .naming import did_you_mean
from .ops import contract
from .ops.workspace import Stopping

DEFAULT_RTOL = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DEFAULT_LIMIT = 100  # evaluations
MODES = ("loop", "graph", "device")
RETURNS = ("best", "last", "image", "next")
KEEP_BEST = ("best", "image")  # those that need the iterate with the least residual
STOPS = ("each", "all", "consensus")


def check_number(name: str, value: object) -> float:
    """The value as a float; TypeError unless it is a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_not_negative(name: str, value: object) -> float:
    """The value as a float; TypeError or ValueError unless it is a number from 0 up, and finite."""
    number = check_number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return number


def check_fraction(name: str, value: object) -> float:
    """The value as a float; TypeError or ValueError unless it is a number in (0, 1]."""
    number = check_number(name, value)
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")
    return number


def check_int(name: str, value: object, least: int = 1, hint: str = "", or_none: bool = False) -> int:
    """The value; TypeError or ValueError unless it is an int of at least ``least``; ``hint`` ends the message."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name} must be an int{' or None' if or_none else ''}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}{hint}")
    return int(value)


def check_flag(name: str, value: object) -> bool:
    """The value; TypeError unless it is a bool."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def check_choice(name: str, value: object, choices: Sequence[str | bool | None]) -> None:
    """Raise ValueError unless the value is one of ``choices``."""
    if not (value is None or isinstance(value, (str, bool))) or value not in choices:
        listed = [repr(choice) for choice in choices]
        known = f"one of {', '.join(listed)}" if len(listed) > 2 else " or ".join(listed)
        words = [choice for choice in choices if isinstance(choice, str)]
        meant = did_you_mean(value, words) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be {known}, got {value!r}{meant}")


def check_dtype(name: str, value: object, choices: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless the value is None or one of ``choices``; a name in place of a dtype is told its dtype."""
    if value is not None and (not isinstance(value, torch.dtype) or value not in choices):
        named = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
        meant = f"; did you mean {named}, without quotes?" if named in choices else ""
        raise ValueError(f"{name} must be None or one of {', '.join(map(str, choices))}, got {value!r}{meant}")


def check_callable(name: str, value: object) -> None:
    """Raise TypeError unless the value can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")


def check_args(args: object, example: str = "x") -> None:
    """Raise TypeError unless ``args`` is a tuple."""
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple, got {type(args).__name__}; write args=({example},) for one argument")


def check_limit(max_iter: object) -> int:
    """The limit of evaluations; TypeError or ValueError unless it is a positive int that 32 bits hold."""
    if isinstance(max_iter, float) and max_iter.is_integer():  # as scripts read it from a file or a flag
        max_iter = int(max_iter)
    limit = check_int("max_iter", max_iter)
    if limit >= 2**31:
        raise ValueError(f"max_iter must be below 2**31, got {max_iter}")
    return limit


def check_compact(compact: object) -> None:
    """Raise TypeError unless the value is a bool, "auto", or a tree of bools."""
    if isinstance(compact, str) and compact == "auto":
        return
    leaves = pytree.tree_leaves(compact)
    if not leaves or not all(isinstance(leaf, bool) for leaf in leaves):
        meant = did_you_mean(compact, ("auto",)) if isinstance(compact, str) else ""
        raise TypeError(
            f'compact must be a bool or a tree of bools shaped like args, or "auto", got {compact!r}{meant}'
        )


def check_samples(batch_dims: object, segments: object) -> None:
    """TypeError or ValueError unless ``batch_dims`` is an int from 0 up, and 1 where ``segments`` are given."""
    if isinstance(batch_dims, bool) or not isinstance(batch_dims, int):
        raise TypeError(f"batch_dims must be an int, got {type(batch_dims).__name__}")
    if batch_dims < 0:
        raise ValueError(f"batch_dims must be at least 0, got {batch_dims}")
    if segments is not None and batch_dims != 1:
        raise ValueError(f"segments say what a sample is; leave out batch_dims, got {batch_dims}")


def check_backend(backend: object) -> None:
    """Raise ValueError unless a backend has that name."""
    if backend != "auto":
        check_choice("backend", backend, ("auto", *contract.names()))


def stopping(
    rtol: float | None, atol: float, max_iter: int | None, dtype: torch.dtype, keep_best: bool = True
) -> Stopping:
    """The rule, checked; rtol None becomes the default of the dtype, max_iter None no limit."""
    relative = check_not_negative("rtol", DEFAULT_RTOL[dtype] if rtol is None else rtol)
    absolute = check_not_negative("atol", atol)
    return Stopping(relative, absolute, 0 if max_iter is None else check_limit(max_iter), keep_best)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``fixed_point``, as its docstring describes them; ``solver`` and ``backward`` are chosen already.

    ``backward`` is a ``Gradient`` or None, ``states`` a ``States``, ``RandomStates`` or None.
    """

    solver: contract.Method
    rtol: Any = None
    atol: Any = 0.0
    max_iter: int = DEFAULT_LIMIT
    backward: Any = None
    returns: str = "best"
    stop: str = "each"
    group: Any = None
    batch_dims: int = 1
    segments: Any = None
    compact: Any = False
    trace: bool = False
    states: Any = None
    callback: Callable[[int, Any], bool | None] | None = None
    throw: bool = False
    backend: str = "auto"
    mode: str = "loop"
    progress: bool = False

    RETURNS: ClassVar[tuple[str, ...]] = RETURNS
    STOPS: ClassVar[tuple[str, ...]] = STOPS

    def __post_init__(self) -> None:
        if self.max_iter is None:
            raise TypeError("max_iter must be an int, got None")
        none = not isinstance(self.max_iter, bool) and self.max_iter == 0
        object.__setattr__(self, "max_iter", 0 if none else check_limit(self.max_iter))
        check_choice("returns", self.returns, self.RETURNS)
        check_choice("stop", self.stop, self.STOPS)
        self._check_samples()
        self._check_group()
        if self.callback is not None:
            check_callable("callback", self.callback)
        check_compact(self.compact)
        check_backend(self.backend)
        check_flag("trace", self.trace)
        check_flag("throw", self.throw)
        check_flag("progress", self.progress)
        self._check_mode()
        self._check_tolerances()

    def _check_samples(self) -> None:
        check_samples(self.batch_dims, self.segments)
        if self.compact is False:
            return
        if self.batch_dims == 0:
            raise ValueError("compact leaves out samples of dim 0; with batch_dims=0 the whole state is one sample")
        if self.segments is not None:
            raise ValueError("compact leaves out rows of dim 0, which cannot be combined with segments")
        if self.stop != "each":
            raise ValueError(
                f"compact leaves out samples that have stopped; with stop={self.stop!r} they stop together"
            )

    def _check_group(self) -> None:
        if self.group is None and self.stop != "consensus":
            return
        why = None
        if self.mode != "loop":
            why = f"mode={self.mode!r}, which captures a loop without waiting for others"
        elif self.segments is not None:
            why = "segments, whose samples lie on one rank each"
        elif self.compact is not False:
            why = "compact, which would change what f sees on one rank"
        if why is not None:
            what = "group" if self.group is not None else 'stop="consensus"'
            raise ValueError(f"{what} does not go together with {why}")

    def _check_tolerances(self) -> None:
        if self.rtol is not None or type(self.atol) is not float or self.atol:
            self.stopping(torch.float32)

    def _check_mode(self) -> None:
        check_choice("mode", self.mode, MODES)
        if self.mode == "loop":
            return
        looks = {
            "trace": self.trace,
            "states": self.states is not None,
            "callback": self.callback is not None,
            "progress": self.progress,
        }
        for name, used in {**looks, "compact": self.compact}.items():
            if used is not False:
                raise ValueError(f"mode={self.mode!r} cannot be combined with {name}, which looks at every evaluation")

    @property
    def keep_best(self) -> bool:
        """Whether the iterate with the least residual is the answer."""
        return self.returns in KEEP_BEST or self.of in KEEP_BEST

    @property
    def of(self) -> str:
        """What a state is, in the words of ``returns``."""
        of: str | None = None if self.states is None else self.states.of
        return self.returns if of is None else of

    @property
    def looks(self) -> bool:
        """Whether something has to be done between evaluations beside stepping."""
        watched = self.trace or self.progress or self.callback is not None or self.compact is not False
        watched = watched or self.states is not None
        return watched or self.returns in ("image", "next")

    @property
    def compactable(self) -> bool:
        """Whether samples could be left out of what f sees, and are not."""
        rows = self.batch_dims > 0 and self.segments is None
        return self.compact is False and rows and self.stop == "each" and self.group is None

    def stopping(self, dtype: torch.dtype) -> Stopping:
        """The stopping rule for states of this real dtype."""
        return stopping(self.rtol, self.atol, self.max_iter or None, dtype, self.keep_best)
