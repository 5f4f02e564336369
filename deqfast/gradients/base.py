"""What every way to make gradients is."""

from __future__ import annotations

from typing import Any

from ..problem import Problem
from ..solution import Solution


class Gradient:
    """How gradients of a solution are made: an immutable value, shared freely between solves and threads."""

    solves = False  # True: ``solve`` replaces the whole solve, else ``attach`` follows it

    def attach(self, problem: Problem, z: Any) -> Any:
        """The solution ``z``, with its gradient."""
        raise NotImplementedError

    def solve(self, problem: Problem, z0: Any) -> Solution:
        """The whole ``Solution``, with its gradient."""
        raise NotImplementedError
