"""Gradients through a fixed point."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .ops.layout import Layout
from .state import Solver


@dataclass
class Problem:
    """One call of ``fixed_point``, as the loop and the gradients see it."""

    f: Callable[..., Any]
    args: tuple[Any, ...]
    layout: Layout
    solver: Solver
    rtol: float
    max_iter: int
    backend: str

    @contextlib.contextmanager
    def solving(self) -> Iterator[None]:
        """The mode in which the solver evaluates f: no graph."""
        with torch.no_grad():
            yield


class Gradient:
    """How gradients of a solution are made."""

    solves = False


@dataclass(frozen=True)
class Implicit(Gradient):
    solver: Any = None
    rtol: float | None = None
    max_iter: int | None = None
    u0: Any = None


@dataclass(frozen=True)
class Phantom(Gradient):
    steps: int = 5
    damping: float = 1.0


@dataclass(frozen=True)
class OneStep(Gradient):
    pass


@dataclass(frozen=True)
class Unroll(Gradient):
    pass


def choose_gradient(backward: Any) -> Gradient | None:
    return None
