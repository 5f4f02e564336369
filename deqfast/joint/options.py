"""The options of ``joint_solve``, checked: those of a solve, and those of the joint map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..options import DEFAULT_RTOL, Options, check_flag, check_fraction, check_limit, check_not_negative, check_number
from ..solvers.anderson import Anderson
from ..solvers.base import Solver
from ..solvers.choose import choose_solver
from ..solvers.picard import Picard

Rule = tuple[float, float, float]  # rtol, atol and the weight of its residual


@dataclass(frozen=True, kw_only=True)
class JointOptions(Options):
    """What ``joint_solve`` describes; tolerances are numbers, one for each block, or dicts of them."""

    damping: Any = (0.8, 0.6)
    normalize: bool = False
    accelerate: Any = None
    safeguard: bool = False

    RETURNS: ClassVar[tuple[str, ...]] = ("best", "last", "cost")
    STOPS: ClassVar[tuple[str, ...]] = ("each", "all", "consensus")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limit(self.max_iter)  # a joint solve of no evaluation has no cost to report
        object.__setattr__(self, "damping", _pair(self.damping))
        check_flag("normalize", self.normalize)
        check_flag("safeguard", self.safeguard)

    def _check_tolerances(self) -> None:
        """Depends on the blocks there are; see ``rules``."""

    def rules(self, blocks: tuple[str, ...], dtype: torch.dtype) -> list[Rule]:
        """A rule for each block."""
        default = DEFAULT_RTOL[dtype]
        relative = [default if value is None else value for value in _per_block("rtol", self.rtol, blocks)]
        absolute = [0.0 if value is None else value for value in _per_block("atol", self.atol, blocks)]
        positive = [value for value in relative if value > 0]
        least = min(positive) if len(positive) == len(relative) else 0.0
        return [(r, a, least / r if least else 1.0) for r, a in zip(relative, absolute, strict=True)]

    def accelerated(self, blocks: tuple[str, ...]) -> tuple[str, ...]:
        """The blocks that Anderson's method moves."""
        names = self.accelerate
        if names is None:
            return blocks
        if not isinstance(names, (str, tuple, list, set, frozenset)):
            raise TypeError(f"accelerate must be a name or some of {blocks}, got {type(names).__name__}")
        given = (names,) if isinstance(names, str) else tuple(names)
        for name in given:
            if name not in blocks:
                raise ValueError(f"accelerate must name blocks of {blocks}, got {name!r}")
        if not given:
            raise ValueError("accelerate must name a block; for plain damped steps use solver=dq.Picard()")
        mixes = isinstance(self.solver, Anderson) and self.solver.mixing != 1
        if mixes and len(set(given)) < len(blocks):
            raise ValueError("accelerate: blocks that are left out move whole steps, which needs mixing=1")
        return tuple(name for name in blocks if name in given)


def choose_joint_solver(solver: Any) -> Solver:
    """The solver of a joint solve; raises ValueError for one that has no joint step."""
    chosen = Anderson(m=20) if solver is None else choose_solver(solver)
    if not isinstance(chosen, (Anderson, Picard)):
        raise ValueError(f"solver must be Anderson or Picard, got {chosen}: a joint solve has no Broyden step")
    return chosen


def check_positive(name: str, value: Any) -> float:
    """The value as a float; TypeError or ValueError unless it is a positive, finite number."""
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


def _pair(damping: Any) -> tuple[float, float]:
    values = damping if isinstance(damping, (tuple, list)) else (damping, damping)
    if len(values) != 2:
        raise ValueError(f"damping must be a number or two, for z and mu, got {damping!r}")
    return check_fraction("damping", values[0]), check_fraction("damping", values[1])


def _per_block(name: str, given: Any, blocks: tuple[str, ...]) -> list[float | None]:
    values: list[Any]
    if isinstance(given, dict):
        for key in given:
            if key not in blocks:
                raise ValueError(f"{name} must name blocks of {blocks}, got {key!r}")
        values = [given.get(block) for block in blocks]
    elif isinstance(given, (tuple, list)):
        if len(given) != len(blocks):
            raise ValueError(f"{name} must have a number for each of {blocks}, got {len(given)}")
        values = list(given)
    else:
        values = [given] * len(blocks)
    return [None if value is None else check_not_negative(name, value) for value in values]
