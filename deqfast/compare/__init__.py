"""Your own f, with the solver that you have and with deqfast's: ``dq.compare``, ``python -m deqfast.compare``.

Solvers take turns on the same f, asked for the tolerance at which the residual of the worst sample, measured by an
evaluation that is not theirs, is what you named. ``python -m deqfast.compare my_model:problem --old torchdeq.anderson``
calls ``problem()`` of my_model.py, which returns (f, z0), or a dict of f, z0 and, if you like, args, params and loss.
"""

from __future__ import annotations

import platform
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..gradients.linear import GradientWarning
from ..nn import ConvergenceWarning
from ..options import DEFAULT_RTOL, check_int, check_not_negative
from ..solvers.base import Solver
from .case import Case
from .comparison import Comparison
from .contenders import OLD, old, ours
from .measure import Measured, Row
from .precise import Precise, reference
from .tally import ALLOCATOR, TENSORS
from .turns import alternate, quartiles

_FLOOR = 4  # units in the last place, that no solver is asked to go below

__all__ = ["OLD", "Comparison", "Row", "compare"]


def compare(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...] = (),
    *,
    old: str | Callable[[Any, Any], Any] = "torchdeq.anderson",
    solvers: Iterable[str | Solver] | Mapping[str, str | Solver] | None = None,
    rtol: float | None = None,
    max_iter: int = 200,
    loss: Callable[[Any], Tensor] | None = None,
    params: Iterable[Tensor] | None = None,
    rounds: int = 9,
    batch_dims: int = 1,
    seconds: float = 20.0,
) -> Comparison:
    """Solve z = f(z, *args) by an old solver and by deqfast's, to the same residual, and compare.

    Args:
        f: callable (z, *args) -> like z.
        z0: start: tensor (B, ...) or a tree of them.
        args: handed to f after z.
        old: "torchdeq.anderson", "torchdeq.broyden", "torchdeq.fixed_point_iter" (that library with its defaults, a
            relative tolerance, and implicit gradients by the same solver), "locuslab" (the Anderson of locuslab/deq and
            of the tutorial, with its hook), or your own: a callable (f, z0) -> z, whose z carries its own gradient if
            it has one.
        solvers: of deqfast: names or solvers, or a dict of them by the names that the table has. Default Anderson,
            Broyden and Picard with their defaults.
        rtol: ||f(z) - z|| / ||f(z)|| that the worst sample is to reach. Each is asked for what reaches it. Default what
            a callable ``old`` reaches, else that of the dtype as in ``fixed_point``.
        max_iter: evaluations of f at most, and vjps. Your own has its own limit.
        loss: callable z -> a scalar, whose gradients are compared. Default: the mean of |z|^2.
        params: tensors to differentiate by. Default every leaf that f(z0) hangs on and that requires grad; an empty
            list leaves gradients out.
        rounds: turns, of which medians and quartiles are taken.
        batch_dims: leading dims that count samples. Only deqfast's solvers are told; residuals are by it for all.
        seconds: that the turns may take in all; fewer rounds are made, three at the least, where they would take more.

    Returns:
        A ``Comparison``: ``print`` it, ``plot`` it, read its ``rows`` and its ``verdict``.

    Raises:
        TypeError, ValueError: an argument that it cannot have; an f that is no function of z alone.
        ImportError: ``old`` is of a library that is not installed.
    """
    check_int("max_iter", max_iter, least=4)
    check_int("rounds", rounds)
    check_not_negative("seconds", seconds)
    target = None if rtol is None else check_not_negative("rtol", rtol)
    if target == 0:
        raise ValueError("rtol must be above 0: it is the residual that everybody is to reach")
    case = Case(f, z0, args, loss, params, batch_dims)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", GradientWarning)
        return _compared(case, _old(case, old), solvers, target, max_iter, rounds, seconds)


_old = old  # which an argument of ``compare`` hides


def _compared(
    case: Case, own: Any, solvers: Any, target: float | None, max_iter: int, rounds: int, seconds: float
) -> Comparison:
    leaf = pytree.tree_leaves(case.z0)[0]
    device, default = leaf.device, DEFAULT_RTOL[leaf.real.dtype if leaf.is_complex() else leaf.dtype]
    contenders = ours(case, solvers)
    precise = Precise(case, target or default)
    first = Measured(case, own, precise, target if own.tunable is False else target or default, max_iter)
    if target is None:
        floor = _FLOOR * torch.finfo(leaf.dtype).eps
        target = default if own.tunable or first.row.residual >= 1 else max(first.row.residual, floor)
        first.row.reached = first.row.residual <= target
    found = [first, *(Measured(case, contender, precise, target, max_iter) for contender in contenders)]
    for one in found:
        one.finish(device)
    closest = min((one for one in found if one.row.trace), key=lambda one: one.row.residual, default=first)
    exact = reference(case, precise, (first if first.row.reached else closest).z, target)
    for one in found:
        one.judge(exact.z, exact.gradient)
    f_seconds = _time(case, found, rounds, seconds, device)
    return Comparison(
        rows=[one.row for one in found],
        target=target,
        f_seconds=f_seconds,
        reference=f"{exact.dtype} to {exact.residual:.0e}",
        memory_source=ALLOCATOR if device.type == "cuda" else TENSORS,
        setting=_setting(case, device),
    )


def _time(case: Case, found: list[Measured], rounds: int, seconds: float, device: torch.device) -> float:
    calls: dict[str, Callable[[], object]] = {}
    for i, one in enumerate(found):
        if not one.row.trace:
            continue
        calls[f"{i}"] = one.solve
        if one.has_gradient:
            calls[f"{i} step"] = one.gradient

    def once() -> None:
        with torch.no_grad():
            case.f(case.z0)

    times = alternate({**calls, "f": once}, rounds, seconds, device)
    for i, one in enumerate(found):
        one.row.seconds, one.row.step_seconds = times.get(f"{i}", []), times.get(f"{i} step", [])
    return quartiles(times["f"])[1]


def _setting(case: Case, device: torch.device) -> str:
    leaves = pytree.tree_leaves(case.z0)
    shapes = ", ".join("x".join(map(str, t.shape)) or "1" for t in leaves[:4]) + (", ..." if len(leaves) > 4 else "")
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{device.type}, {torch.get_num_threads()} threads"
    dtype = str(leaves[0].dtype).removeprefix("torch.")
    return f"z {shapes} {dtype}; {where}; torch {torch.__version__}, Python {platform.python_version()}"


class _Callable(types.ModuleType):
    """``dq.compare`` is this module, and the function: ``import deqfast.compare`` would hide one by the other."""

    __call__ = staticmethod(compare)


sys.modules[__name__].__class__ = _Callable
