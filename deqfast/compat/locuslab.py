"""The solvers of locuslab's deq and mdeq repositories, and of the tutorial that most copies come from.

Same arguments and results. Norms are taken over the whole batch, as there: abs ||f(x) - x||, rel that over ||f(x)||,
and all samples go on until it is below ``eps``. Different on purpose: steps are deqfast's, so that there are usually
fewer of them; a sample that becomes NaN leaves the norms, and keeps its last finite x; what has not converged says so
in a ``ConvergenceWarning``. Nothing here is differentiated, as there: evaluate f once more with gradients, or use
``dq.fixed_point``.

Sources: locuslab/deq, lib/solvers.py and lib/jacobian.py; locuslab/mdeq, lib/modules/broyden.py;
http://implicit-layers-tutorial.org/deep_equilibrium_models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import compiled
from ..options import check_callable, check_choice, check_int, check_not_negative, check_number
from ..solvers.anderson import Anderson
from ..solvers.broyden import DEFAULT_MEMORY, Broyden
from ._batch import Batch, Best
from ._names import ignored, refuse, unsolved

__all__ = ["anderson", "broyden", "jac_loss_estimate", "mdeq_broyden", "power_method", "tutorial_anderson"]

_MODES = ("abs", "rel")
_BUFFERS = ("X", "F", "H", "y")  # what callers allocated beforehand
_LOOKS = ("logger", "sampling")
_LAM = 1e-4
_STALL = 30  # Broyden: near eps, and hardly any progress in so many steps


@compiled.entry("f")
def anderson(
    f: Callable[..., Any],
    x0: Tensor,
    m: int = 6,
    lam: float = _LAM,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    beta: float = 1.0,
    **kwargs: Any,
) -> dict[str, Any]:
    """Anderson acceleration of f, with the arguments and the result of locuslab/deq.

    Args:
        f: callable x -> f(x), shaped like x; may return a tuple, of which the first is taken.
        x0: (B, d, L), or with any number of dims; dim 0 counts samples.
        m: columns of history.
        lam: regularisation of the small system. Relative to its diagonal here, absolute there; the default is that of
            ``dq.Anderson``.
        threshold: evaluations of f.
        eps: stop at a residual below it.
        stop_mode: "rel", ||f(x) - x|| / (||f(x)|| + 1e-5), or "abs", ||f(x) - x||; norms over the whole batch.
        beta: mixing; above 1 the step is extrapolated.
        **kwargs: ``mask`` (B,) bool: rows where it is False stay at x0 and count in no norm. ``name`` is for messages.
            ``X``, ``F``, ``H``, ``y`` (buffers), ``logger``, ``sampling`` are not used, which is said once.

    Returns:
        A dict: ``result`` x of the lowest residual, detached; ``lowest`` that residual, a float; ``nstep`` its step,
        counted from the evaluation at x0, which is 0; ``prot_break`` False; ``abs_trace`` and ``rel_trace``, lists of
        floats, an evaluation from step 2 on, filled up with the lowest to threshold - 2 where it converged; ``eps``,
        ``threshold``.

    Raises:
        TypeError, ValueError: an unknown argument, or a value that it cannot have.
    """
    mask, name = _options("anderson", kwargs)
    check_int("threshold", threshold)
    batch = _begin(f, x0, _anderson(m, lam, beta), beta, mask)
    best = Best(stop_mode, first=min(2, threshold - 1), offset=1e-5)
    _check_stop(stop_mode, eps)
    for step in range(threshold):
        best.look(step, batch.evaluate(), batch.x)
        if best.newest < eps:
            best.fill(threshold - 2)
            break
        batch.step()
    return _result(name or "anderson", batch, best, eps, threshold, False)


@compiled.entry("f")
def broyden(
    f: Callable[..., Any],
    x0: Tensor,
    threshold: int,
    eps: float = 1e-3,
    stop_mode: str = "rel",
    ls: bool = False,
    name: str = "unknown",
    **kwargs: Any,
) -> dict[str, Any]:
    """Broyden's method on f(x) - x, with the arguments and the result of locuslab/deq.

    Args:
        f: callable x -> f(x), shaped like x; may return a tuple, of which the first is taken.
        x0: (B, d, L), or with any number of dims; dim 0 counts samples.
        threshold: steps: evaluations of f beside that at x0.
        eps: stop at a residual below it.
        stop_mode: "rel", ||f(x) - x|| / (||f(x)|| + 1e-9), or "abs", ||f(x) - x||; norms over the whole batch.
        ls: a line search, which there is none of; said once.
        name: for messages.
        **kwargs: ``mask`` as of ``anderson``.

    Returns:
        A dict as of ``anderson``. ``nstep`` and the traces begin with the first step; traces are filled up to
        threshold + 1; ``prot_break`` says that the residual had grown so far that the solve was ended.
    """
    mask, _ = _options("broyden", kwargs, ls)
    check_int("threshold", threshold)
    _check_stop(stop_mode, eps)
    batch = _begin(f, x0, Broyden(max(2, min(threshold, DEFAULT_MEMORY))), 1.0, mask)
    best = Best(stop_mode, first=1, offset=1e-9)
    prot_break = _loop(batch, best, threshold, eps, (1e6 if stop_mode == "abs" else 1e3) * _length(x0))
    best.fill(threshold + 1)
    return _result(f"broyden ({name})", batch, best, eps, threshold, prot_break)


@compiled.skip
def mdeq_broyden(
    g: Callable[..., Any],
    x0: Tensor,
    threshold: int,
    eps: float,
    ls: bool = False,
    name: str = "unknown",
    **kwargs: Any,
) -> dict[str, Any]:
    """Broyden's method on the root form g(x) = f(x) - x, with the arguments and the result of locuslab/mdeq.

    Args:
        g: callable x -> g(x), shaped like x, zero at the solution.
        x0: (B, d, L), or with any number of dims.
        threshold: steps.
        eps: stop at ||g(x)|| below it, norm over the whole batch.
        ls: as of ``broyden``.
        name: for messages.
        **kwargs: ``mask`` as of ``anderson``.

    Returns:
        A dict: ``result`` x of the lowest ||g(x)||; ``nstep`` steps made; ``tnstep`` evaluations for them;
        ``lowest_step``; ``diff`` ||g(result)||, a float; ``diff_detail`` its norms over dim 1; ``prot_break``;
        ``trace`` of ||g(x)|| from x0 on; ``new_trace`` of the relative step sizes, -1 at x0; ``eps``; ``threshold``.
    """
    mask, _ = _options("mdeq_broyden", kwargs, ls)
    check_callable("g", g)
    check_int("threshold", threshold)
    _check_stop("abs", eps)
    solver = Broyden(max(2, min(threshold, DEFAULT_MEMORY)))
    batch = Batch(lambda x: x + _first(g(x)), x0, solver, mask=mask, measure_moves=True)
    best = Best("abs", first=0, offset=1e-9, keep_f=True)
    prot_break = _loop(batch, best, threshold, eps, 1e6 * _length(x0), stop_at_start=True)
    made = len(best.traces["abs"]) - 1
    out = _result(f"mdeq_broyden ({name})", batch, best, eps, threshold, prot_break)
    return {
        "result": out["result"],
        "nstep": made,
        "tnstep": made,
        "lowest_step": out["nstep"],
        "diff": out["lowest"],
        "diff_detail": torch.linalg.vector_norm(batch.whole(best.fx - best.x, 0.0), dim=1),
        "prot_break": prot_break,
        "trace": out["abs_trace"],
        "new_trace": [-1, *batch.moves],
        "eps": eps,
        "threshold": threshold,
    }


@compiled.entry("f")
def tutorial_anderson(
    f: Callable[..., Any],
    x0: Tensor,
    m: int = 5,
    lam: float = _LAM,
    max_iter: int = 50,
    tol: float = 1e-2,
    beta: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, list[float]]:
    """Anderson acceleration of f, with the arguments and the result of the implicit layers tutorial.

    Args:
        f: callable x -> f(x), shaped like x; may return a tuple, of which the first is taken.
        x0: (B, d, H, W), or with any number of dims; dim 0 counts samples.
        m: columns of history.
        lam: as of ``anderson``.
        max_iter: evaluations of f.
        tol: stop at ||f(x) - x|| / (1e-5 + ||f(x)||) below it, norms over the whole batch.
        beta: mixing; above 1 the step is extrapolated.
        **kwargs: as of ``anderson``.

    Returns:
        The x that f was evaluated at last, detached, and the list of relative residuals from the third evaluation on.
    """
    mask, name = _options("tutorial_anderson", kwargs)
    check_int("max_iter", max_iter)
    _check_stop("rel", tol, "tol")
    batch = _begin(f, x0, _anderson(m, lam, beta), beta, mask)
    best = Best("rel", first=min(2, max_iter - 1), offset=1e-5, keep_x=False)
    for step in range(max_iter):
        best.look(step, batch.evaluate(), batch.x)
        if best.newest < tol or step == max_iter - 1:
            break
        batch.step()
    if not best.newest < tol and tol > 0:
        unsolved(name or "tutorial_anderson", best.newest, tol, batch.evaluations)
    batch.end()
    return batch.whole(batch.x), best.traces["rel"]


def jac_loss_estimate(f0: Tensor, z0: Tensor, vecs: int = 2, create_graph: bool = True) -> Tensor:
    """Estimate ||df0/dz0||_F^2 per number of z0, from vecs random vectors; a scalar to train on.

    Args:
        f0: f(z0), with a graph.
        z0: (B, ...) what f was evaluated at, requiring grad.
        vecs: normal random vectors to average over.
        create_graph: whether the estimate can be differentiated.

    See ``dq.jacobian_penalty`` for the same from f and z.
    """
    check_int("vecs", vecs)
    total = z0.new_zeros(())
    for _ in range(vecs):
        (product,) = torch.autograd.grad(f0, z0, torch.randn_like(z0), retain_graph=True, create_graph=create_graph)
        total = total + product.square().sum()
    return total / (vecs * z0.numel())


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 200) -> tuple[Tensor, Tensor]:
    """Estimate the largest |eigenvalue| of df0/dz0 of every sample by power iteration; the graph is freed.

    Args:
        f0: f(z0), with a graph.
        z0: (B, ...) what f was evaluated at, requiring grad; samples independent.
        n_iters: vjps.

    Returns:
        An eigenvector shaped like z0 of norm one a sample, and |eigenvalue| (B, 1): the mean growth over the second
        half of the iterations, so that a pair of complex eigenvalues is met too, where a Rayleigh quotient oscillates.
        ``dq.spectral_radius`` needs fewer vjps and is exact for small samples.
    """
    check_int("n_iters", n_iters)
    v = torch.randn_like(z0).flatten(1)
    v = v / v.norm(dim=1, keepdim=True)
    growth = v.new_zeros(v.shape[0], 1)
    kept = (n_iters + 1) // 2
    for i in range(n_iters):
        last = i == n_iters - 1
        (w,) = torch.autograd.grad(f0, z0, v.view_as(z0), retain_graph=not last)
        w = w.flatten(1)
        norm = w.norm(dim=1, keepdim=True)
        v = w / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        if i >= n_iters - kept:
            growth += norm.log()
    return v.view_as(z0), (growth / kept).exp()


def _anderson(m: int, lam: float, beta: float) -> Anderson:
    check_number("beta", beta)
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive, got {beta}")
    return Anderson(m=m, mixing=min(float(beta), 1.0), ridge=None if lam == _LAM else lam)


def _options(function: str, kwargs: dict[str, Any], ls: bool = False) -> tuple[Tensor | None, str]:
    """The mask and the name; what is unknown refused, what has no meaning said."""
    broyden = "broyden" in function
    extra = ("mask",) if broyden else ("mask", "name", *_BUFFERS, *_LOOKS)
    refuse(function, [name for name in kwargs if name not in extra], (*_ARGUMENTS[function], *extra))
    ignored(function, [name for name in _BUFFERS if kwargs.get(name) is not None], "memory is the solver's own")
    ignored(function, [name for name in _LOOKS if kwargs.get(name) is not None], "the result has the residuals")
    if ls:
        ignored(function, ["ls"], "there is no line search, every step is a full one")
    return kwargs.get("mask"), str(kwargs.get("name") or "")


_ARGUMENTS = {
    "anderson": ("f", "x0", "m", "lam", "threshold", "eps", "stop_mode", "beta"),
    "tutorial_anderson": ("f", "x0", "m", "lam", "max_iter", "tol", "beta"),
    "broyden": ("f", "x0", "threshold", "eps", "stop_mode", "ls", "name"),
    "mdeq_broyden": ("g", "x0", "threshold", "eps", "ls", "name"),
}


def _check_stop(stop_mode: str, eps: float, name: str = "eps") -> None:
    check_choice("stop_mode", stop_mode, _MODES)
    check_not_negative(name, eps)


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) and found else found


def _begin(f: Callable[..., Any], x0: Tensor, solver: Any, beta: float, mask: Tensor | None) -> Batch:
    check_callable("f", f)
    return Batch(lambda x: _first(f(x)), x0, solver, max(float(beta), 1.0), mask)


def _length(x0: Tensor) -> int:
    """L of (B, d, L): what the protective break counts by."""
    return max(1, math.prod(x0.shape[2:]))


def _loop(batch: Batch, best: Best, steps: int, eps: float, growth: float, stop_at_start: bool = False) -> bool:
    """Broyden's loop; whether it was ended because the residual had grown by more than ``growth``."""
    for step in range(steps + 1):
        best.look(step, batch.evaluate(), batch.x)
        if step or stop_at_start:
            if best.newest < eps or best.stalled(eps, _STALL):
                return False
            if best.newest > best.trace[0] * growth:
                return True
        if step < steps:
            batch.step()
    return False


def _result(function: str, batch: Batch, best: Best, eps: float, threshold: int, prot_break: bool) -> dict[str, Any]:
    if not best.lowest < eps and eps > 0:
        unsolved(function, best.lowest, eps, batch.evaluations, "; it ran away" if prot_break else "")
    batch.end()
    return {
        "result": batch.whole(best.x),
        "lowest": best.lowest,
        "nstep": best.step,
        "prot_break": prot_break,
        "abs_trace": best.traces["abs"],
        "rel_trace": best.traces["rel"],
        "eps": eps,
        "threshold": threshold,
    }
