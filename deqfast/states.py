"""``states=``: which states of a solve are wanted beside its answer, and what a state is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .options import RETURNS, check_choice, check_int


def _check_of(of: Any) -> None:
    if of is not None:
        check_choice("of", of, RETURNS)


@dataclass(frozen=True)
class States:
    """The states of a solve at some of its evaluations, for ``fixed_point(..., states=)`` and ``DEQ``.

    Args:
        at: evaluations, counted from 1.
        of: what a state is, in the words of ``returns``: "last", the iterate itself that this evaluation was made at;
            "next", the iterate that the solver steps to from there, so that the state at k is what k evaluations of f
            have led to; "best" and "image". None (default): what ``returns`` asks for.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    at: Sequence[int]
    of: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.at, Sequence) or isinstance(self.at, str):
            raise TypeError(f"states must be a list of evaluations, counted from 1, got {type(self.at).__name__}")
        for k in self.at:
            check_int("states", k, hint="; the first evaluation is 1")
        _check_of(self.of)
        object.__setattr__(self, "at", tuple(self.at))

    def draw(self) -> tuple[int, ...]:
        """The evaluations, in ascending order."""
        return tuple(sorted(self.at))


@dataclass(frozen=True)
class RandomStates:
    """States at evaluations that every call draws anew: ``count`` different ones of 1, 2, ... ``upto``.

    ``Solution.states_at`` says which were drawn.

    Args:
        count: states a call, at least 1.
        upto: the last evaluation that may be drawn, at least ``count``.
        of: as in ``States``.
        generator: draws them; None: torch's default one of the CPU. A copy or a pickle of a layer has a generator of
            its own in the state that it was in.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    count: int
    upto: int
    of: str | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_int("count", self.count)
        check_int("upto", self.upto)
        if self.count > self.upto:
            raise ValueError(f"count must be at most upto={self.upto}, got {self.count}")
        _check_of(self.of)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(self.generator).__name__}")

    def draw(self) -> tuple[int, ...]:
        """Evaluations, in ascending order."""
        device = "cpu" if self.generator is None else self.generator.device
        drawn = torch.randperm(self.upto, generator=self.generator, device=device)[: self.count]
        return tuple(sorted(1 + k for k in drawn.tolist()))

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomStates:
        return _with_generator(*self.__reduce__()[1])

    def __reduce__(self) -> Any:
        g = self.generator
        return _with_generator, (self.count, self.upto, self.of, None if g is None else (str(g.device), g.get_state()))


def _with_generator(count: int, upto: int, of: str | None, saved: tuple[str, torch.Tensor] | None) -> RandomStates:
    if saved is None:
        return RandomStates(count, upto, of)
    generator = torch.Generator(saved[0])
    generator.set_state(saved[1])
    return RandomStates(count, upto, of, generator)


def checked(states: Any) -> States | RandomStates | None:
    """What a user gave as ``states=``; None: no state is wanted."""
    if states is None or isinstance(states, RandomStates):
        return states
    wanted = states if isinstance(states, States) else States(states)
    return wanted if wanted.at else None
