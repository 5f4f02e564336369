"""Modules: ``DEQ``, ``FullGraph``; ``ICNN``, ``LyapunovProjection``, stable dynamics; ``StepMasked``, a mask a step."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import compiled
from ..called import Called
from ..gradients.choose import choose_gradient
from ..metrics import Metrics
from ..naming import did_you_mean
from ..options import Options, check_callable, check_flag
from ..solution import Solution
from ..solve import fixed_point
from ..solvers.choose import choose_solver
from ..states import checked
from ..warning import warn
from .icnn import ICNN
from .lyapunov import LyapunovProjection
from .step_masked import StepMasked

__all__ = ["DEQ", "ICNN", "ConvergenceWarning", "FullGraph", "LyapunovProjection", "StepMasked"]

if TYPE_CHECKING:
    from .full_graph import FullGraph as FullGraph
else:

    def __getattr__(name: str) -> Any:
        if name == "FullGraph":  # imported when first asked for, so that its forward is traced and not skipped
            return import_module(f"{__name__}.full_graph").FullGraph
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class ConvergenceWarning(RuntimeWarning):
    """No sample that a layer was called with has converged."""


_OPTIONS = {
    name: p.default
    for name, p in inspect.signature(fixed_point).parameters.items()
    if p.kind is inspect.Parameter.KEYWORD_ONLY
}


class DEQ(nn.Module):
    """The layer whose output z solves z = cell(z, x, *args).

    ::

        layer = dq.DEQ(cell, solver="anderson", rtol=1e-3)
        z = layer(x)

    Args:
        cell: callable or module (z, x, *args) -> same structure, shapes and dtypes as z.
        warn: say once, in a ``ConvergenceWarning``, when no sample of a call converged. It reads one number from the
            device after each call until then.
        metrics: a ``Metrics`` that remembers what every call took, for a dashboard.
        options: those of ``fixed_point``, checked here.

    The start is ``cell.init(x)`` where the cell has such a method, else ``zeros_like(x)``; a call may give its own.
    Gradients reach the cell's parameters, x and args, in training and in evaluation mode alike. The module keeps
    nothing between calls: ask ``solve`` for the residuals and counts of one.

    Raises:
        TypeError, ValueError: an option that does not exist, or a value that it cannot have.
    """

    def __init__(self, cell: Any, *, warn: bool = True, metrics: Metrics | None = None, **options: Any) -> None:
        super().__init__()
        check_callable("cell", cell)
        check_flag("warn", warn)
        if metrics is not None and not callable(metrics):
            raise TypeError(f"metrics must be a dq.Metrics, got {type(metrics).__name__}")
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            meant = did_you_mean(unknown[0], _OPTIONS)
            raise TypeError(
                f"unknown option {unknown[0]!r}{meant}; DEQ takes those of fixed_point: {', '.join(_OPTIONS)}"
            )
        merged = {**_OPTIONS, **options}
        chosen: dict[str, Any] = {
            "solver": choose_solver(merged["solver"]),
            "backward": choose_gradient(merged["backward"]),
        }
        chosen["states"] = checked(merged["states"])
        Called(cell, merged.pop("kwargs"), check_flag("has_aux", merged.pop("has_aux")))  # checks them
        check_flag("unpack", merged.pop("unpack"))
        Options(**{**merged, **chosen})
        self.cell = cell
        self.options = options
        self.warn = warn
        self.metrics = metrics

    @compiled.skip
    def forward(self, x: Any, *args: Any, z0: Any = None, max_iter: int | None = None) -> Any:
        """The equilibrium z for input x; see ``solve``."""
        return self.solve(x, *args, z0=z0, max_iter=max_iter).z

    @compiled.skip
    def solve(self, x: Any, *args: Any, z0: Any = None, max_iter: int | None = None) -> Solution:
        """The whole ``Solution`` for input x.

        Args:
            x: what the cell receives after z: a tensor (B, ...) or a tree of tensors.
            args: what it receives after x.
            z0: start; default ``cell.init(x)`` or zeros shaped like x.
            max_iter: evaluations of this call at most; None: those of the layer.
        """
        if z0 is None:
            z0 = _start(getattr(self.cell, "init", None), x)
        options = self.options if max_iter is None else {**self.options, "max_iter": max_iter}
        solution = fixed_point(self.cell, z0, (x, *args), **options)
        if self.metrics is not None:
            self.metrics(solution)
        if self.warn and options.get("max_iter") != 0 and solution.steps.numel() and not self._any(solution):
            self.warn = False
            warn(
                f"no sample of a batch converged in {type(self.cell).__name__}: {solution.summary()}. Raise max_iter=, "
                "loosen rtol=, or look at solve(x).trace with trace=True; warn=False silences this",
                ConvergenceWarning,
            )
        return solution

    @staticmethod
    def _any(solution: Solution) -> bool:
        capturing = solution.steps.is_cuda and torch.cuda.is_current_stream_capturing()
        return capturing or bool(solution.converged.any())

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


@compiled.entry("init")
def _start(init: Any, x: Any) -> Any:
    if callable(init):
        return init(x)
    leaves = pytree.tree_leaves(x)
    if not leaves or not all(isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) for t in leaves):
        raise TypeError("x must be a floating tensor or a tree of them for a start from zeros; give z0 or cell.init")
    return pytree.tree_map(torch.zeros_like, x)
