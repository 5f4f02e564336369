"""Gradients as torchdeq's ``backward_factory`` makes them: functors (module, f, z) -> list of z with a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...gradients.implicit import Implicit
from ...gradients.linear import LinearOptions
from ...loop.state import SolverState
from ...ops.layout import real_dtype
from ...options import check_choice, check_int, check_not_negative
from ...problem import Problem
from ...solution import BackwardReport
from ...solve import fixed_point
from ._arguments import check_max_iter, check_tau
from ._solvers import linear_solver
from ._stat import MODES, PLAIN, Counted, SolverStat, room, statistics
from ._watch import DeviceWatch, HostWatch, Watch

Writer = Callable[[SolverStat], Any]
_ROUNDING = 16  # units in the last place: no backward solve is asked for more


@dataclass(frozen=True)
class Written(Implicit):
    """Implicit gradients whose backward solves are written down.

    Args:
        writer: called with a ``SolverStat`` after each.
        counted: how it counts.
        mode: the residual that counts.
    """

    writer: Writer | None = field(default=None, compare=False)
    counted: Counted = PLAIN
    mode: int = MODES["rel"]

    def _options(self, problem: Problem) -> LinearOptions:
        options = super()._options(problem)
        told, limit = options.tell, options.stopping.max_iter
        found: list[Watch] = []

        def watch(state: SolverState) -> None:
            if not found:
                now = state.ws.reals[:2, : state.layout.B]
                kind = HostWatch if state.layout.device.type == "cpu" else DeviceWatch
                found.append(kind(now, self.mode, room(self.counted, limit - self.counted.beyond)))
            found[0].take()

        def tell(report: BackwardReport) -> None:
            if told is not None:
                told(report)
            if found and self.writer is not None:
                seen = found.pop()
                self.writer(statistics(seen, seen.made, self.counted, limit - self.counted.beyond, False))

        return replace(options, watch=watch, tell=tell)


class ImplicitGrad:
    """The gradient of the solution, by ``dq.Implicit``: what ``ift=True`` and ``hook_ift=True`` ask for.

    Args:
        b_solver: one of this package's functions by torchdeq's names.
        max_iter: as of that function.
        tol: of the backward solve, relative to the solution of each sample, in either mode: so that it means the same
            for a loss of any scale. Never less than 16 units in the last place of the dtype.
        stop_mode: "abs" or "rel": the residual by which a writer is told the lowest.
    """

    def __init__(
        self, b_solver: Callable[..., Any], max_iter: float = 50, tol: float = 1e-3, stop_mode: str = "abs"
    ) -> None:
        check_choice("b_stop_mode", stop_mode, tuple(MODES))
        self._max_iter = max(1, check_max_iter(max_iter, "b_max_iter"))
        solver = linear_solver(b_solver, self._max_iter)
        if solver is None:
            raise TypeError(f"b_solver must be one of deqfast.compat.torchdeq's functions, got {b_solver!r}")
        self._solver, self._counted = solver
        self._tol, self._mode = check_not_negative("b_tol", tol), MODES[stop_mode]

    def __call__(
        self, trainer: Any, func: Callable[..., Any], z_pred: Any, writer: Writer | None = None, **kwargs: Any
    ) -> list[Any]:
        """[f(z_pred)], with the gradient of a solution; ``writer`` hears of every backward solve."""
        with torch.no_grad():
            z = func(z_pred)
            z = pytree.tree_map(lambda new, old: new.to(old.dtype), z, z_pred)
        first = pytree.tree_leaves(z)[0]
        options: dict[str, Any] = {
            "solver": self._solver,
            "rtol": max(self._tol, _ROUNDING * torch.finfo(real_dtype(first.dtype)).eps),
            "max_iter": self._max_iter + self._counted.beyond,
        }
        if torch.is_autocast_enabled(first.device.type):
            del options["rtol"]  # that of autocast's dtype
        gradient = Implicit(**options)
        if writer is not None:
            gradient = Written(**options, writer=writer, counted=self._counted, mode=self._mode)
        whole = isinstance(z, Tensor) and z.dim() == 0
        return [fixed_point(func, z, max_iter=0, backward=gradient, batch_dims=0 if whole else 1).z]


class PhantomGrad:
    """Gradients of damped applications of f, by autograd.

    Args:
        steps: how many.
        tau: z + tau (f(z) - z).
        sup_gap: return every so manieth, if positive.
        sup_loc: return these, counted from 1, and the last.
    """

    def __init__(self, steps: int, tau: float = 1.0, sup_gap: int = -1, sup_loc: Sequence[int] | None = None) -> None:
        self.steps, self.tau = check_int("grad", steps), check_tau(tau)
        self.sup_gap, self.sup_loc = sup_gap, sup_loc

    def __call__(self, trainer: Any, func: Callable[..., Any], z_pred: Any, **kwargs: Any) -> list[Any]:
        """The states that were asked for, at least the last, each with the graph of the steps to it."""
        found = []
        for step in range(1, self.steps + 1):
            z_pred = func(z_pred, tau=self.tau)
            if step % self.sup_gap == 0 if self.sup_gap > 0 else self.sup_loc and step in self.sup_loc:
                found.append(z_pred)
        return found if found and self.sup_gap > 0 else [*found, z_pred]


def backward_factory(
    grad_type: str | int = "ift",
    hook_ift: bool = False,
    b_solver: Callable[..., Any] | None = None,
    b_solver_kwargs: dict[str, Any] | None = None,
    sup_gap: int = -1,
    sup_loc: Sequence[int] | None = None,
    tau: float = 1.0,
    **grad_factory_kwargs: Any,
) -> Callable[..., list[Any]]:
    """A functor that makes gradients, as ``torchdeq.grad.backward_factory``; it pickles.

    Args:
        grad_type: "ift" for the implicit gradient, or the number of phantom steps.
        hook_ift: the implicit gradient needs no hook here, and no more memory without one.
        b_solver: one of this package's functions by torchdeq's names; another one raises TypeError.
        b_solver_kwargs: its max_iter, tol and stop_mode.
        sup_gap: as of ``PhantomGrad``.
        sup_loc: as there.
        tau: as there.
        **grad_factory_kwargs: taken and not used, as there.
    """
    if grad_type == "ift":
        return ImplicitGrad(b_solver, **(b_solver_kwargs or {}))  # type: ignore[arg-type]
    return PhantomGrad(grad_type, tau, sup_gap, sup_loc)  # type: ignore[arg-type]
