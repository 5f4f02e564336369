"""``scipy.optimize.anderson``, ``broyden1`` and ``root``, for NumPy arrays and torch tensors, one system or a batch.

Same arguments and stopping rules, and exceptions of the same name: SciPy's own class is not used, as SciPy need not be
there. An array comes back for an array, a tensor for a tensor, on its device and in its precision; nothing is
differentiated, as there. Different on purpose: steps are deqfast's; without ``alpha`` the first guess of the Jacobian
is the slope of a first step, which has the right sign; a line search looks at full steps alone as long as they do well;
``root`` has two methods, and "anderson" by default. ``batched=True`` solves the rows of dim 0 as systems of their own.

Source: SciPy's reference, scipy.optimize.anderson, broyden1, root; V. Eyert, J. Comp. Phys. 124 (1996).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import compiled
from ..options import check_callable, check_choice, check_flag, check_int, check_number
from ..solvers.anderson import Anderson
from ..solvers.base import Solver
from ..solvers.broyden import DEFAULT_MEMORY, Broyden
from ..solvers.picard import Picard
from ._arrays import Arrays
from ._many import Many
from ._names import ignored, refuse
from ._roots import Roots, Rule, max_norm

__all__ = ["NoConvergence", "OptimizeResult", "anderson", "broyden1", "root"]

_W0 = 0.01
_SEARCHES = (None, "armijo", "wolfe", True, False)


class NoConvergence(Exception):
    """The limit of iterations was reached; ``args[0]`` is the last x. ``converged``: (B,) bools of a batch, or None."""

    def __init__(self, x: Any, converged: Any = None) -> None:
        super().__init__(x)
        self.converged = converged


class OptimizeResult(dict[str, Any]):
    """What ``root`` returns: a dict whose keys are attributes.

    Keys: ``x``; ``success``; ``status`` 1 or 2; ``message``; ``fun`` F(x); ``nit`` iterations; ``nfev`` evaluations of
    F; ``method``; of a batch ``converged`` (B,) bools.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    __setattr__ = dict.__setitem__
    __delattr__ = dict.__delitem__

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]


@compiled.skip
def anderson(
    F: Callable[[Any], Any],
    xin: Any,
    iter: int | None = None,
    alpha: float | None = None,
    w0: float = _W0,
    M: int = 5,
    verbose: bool = False,
    maxiter: int | None = None,
    f_tol: float | None = None,
    f_rtol: float | None = None,
    x_tol: float | None = None,
    x_rtol: float | None = None,
    tol_norm: Callable[[Any], Any] | None = None,
    line_search: str | bool | None = "armijo",
    callback: Callable[[Any, Any], Any] | None = None,
    *,
    batched: bool = False,
    **unknown: Any,
) -> Any:
    """A root of F by Anderson mixing.

    Args:
        F: callable x -> F(x), shaped like x.
        xin: start: array, number, list or tensor, of any shape.
        iter: make so many iterations, whatever the residual.
        alpha: the first guess of the Jacobian is -1/alpha.
        w0: regularisation relative to the diagonal of the small system, as a square root; default that of
            ``dq.Anderson``.
        M: columns of history; 0 is x + alpha F(x) without any.
        verbose: print the residual of every iteration.
        maxiter: iterations at most, default 100 (N + 1).
        f_tol: largest |F_i|, default 6e-6.
        f_rtol: the same relative to that at xin; default none.
        x_tol: largest |dx_i| of the last step; default none.
        x_rtol: the same relative to x; default none.
        tol_norm: norm in place of the largest entry, of a flat vector (of a batch: (B, N) to (B,)).
        line_search: "armijo" or None. A step after which ||F|| has grown a thousandfold is shortened; a search that is
            lost begins again, and then no step may make ||F|| grow. "wolfe" is taken for "armijo"; a batch has none.
        callback: called as callback(x, F(x)) after every iteration, with arrays of its own.
        batched: rows of dim 0 are systems, which stop by themselves.
        **unknown: none.

    Returns:
        x.

    Raises:
        NoConvergence: with the last x, unless ``iter`` was given; before ``maxiter`` too, after 500 iterations that
            made nothing better.
        TypeError, ValueError: an argument that there is none of, or a value that it cannot have.
    """
    refuse("anderson", unknown, _COMMON | {"w0": 0, "M": 0})
    return _found("anderson", F, xin, _anderson(w0, M), _given(locals()))


@compiled.skip
def broyden1(
    F: Callable[[Any], Any],
    xin: Any,
    iter: int | None = None,
    alpha: float | None = None,
    reduction_method: Any = "restart",
    max_rank: float | None = None,
    verbose: bool = False,
    maxiter: int | None = None,
    f_tol: float | None = None,
    f_rtol: float | None = None,
    x_tol: float | None = None,
    x_rtol: float | None = None,
    tol_norm: Callable[[Any], Any] | None = None,
    line_search: str | bool | None = "armijo",
    callback: Callable[[Any, Any], Any] | None = None,
    *,
    batched: bool = False,
    **unknown: Any,
) -> Any:
    """A root of F by Broyden's first method.

    Args:
        F: callable x -> F(x), shaped like x.
        xin: start.
        iter: make so many iterations, whatever the residual.
        alpha: the first guess of the Jacobian is -1/alpha.
        reduction_method: "restart": when the memory is full all steps are forgotten. Others are taken for it.
        max_rank: steps that are kept, at most and by default 100.
        verbose: print the residual of every iteration.
        maxiter: iterations at most, default 100 (N + 1).
        f_tol: as of ``anderson``, and so are the others.
        f_rtol: see there.
        x_tol: see there.
        x_rtol: see there.
        tol_norm: see there.
        line_search: see there.
        callback: see there.
        batched: see there.
        **unknown: none.

    Returns:
        x.

    Raises:
        NoConvergence, TypeError, ValueError: as ``anderson``.
    """
    refuse("broyden1", unknown, _COMMON | {"reduction_method": 0, "max_rank": 0})
    return _found("broyden1", F, xin, _broyden(reduction_method, max_rank), _given(locals()))


@compiled.skip
def root(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    method: str = "anderson",
    jac: Any = None,
    tol: float | None = None,
    callback: Callable[[Any, Any], Any] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    batched: bool = False,
) -> OptimizeResult:
    """A root of fun(x, *args), and how it was found; nothing is raised where none was.

    Args:
        fun: callable (x, *args) -> F(x), shaped like x.
        x0: start.
        args: handed to fun after x.
        method: "anderson" or "broyden1".
        jac: not used, which is said once.
        tol: relative size of the last step, and no other condition: SciPy's meaning for these methods.
        callback: as of ``anderson``.
        options: ``nit`` (iter there), ``disp`` (verbose), ``maxiter``, ``fatol`` (f_tol), ``ftol`` (f_rtol), ``xatol``
            (x_tol), ``xtol`` (x_rtol), ``tol_norm``, ``line_search``; ``jac_options``, a dict of ``alpha``, ``w0``,
            ``M``, or of ``alpha``, ``reduction_method``, ``max_rank``.
        batched: as of ``anderson``; ``success`` then says whether all rows converged.
    """
    method = method.lower()
    check_choice("method", method, ("anderson", "broyden1"))
    if jac is not None and jac is not False:
        ignored("root", ["jac"], "these methods form no Jacobian")
    given = dict(options or {})
    refuse("root", [name for name in given if name not in (*_OF_ROOT, "jac_options")], (*_OF_ROOT, "jac_options"))
    if tol is not None:
        given = {"xtol": tol, "xatol": math.inf, "ftol": math.inf, "fatol": math.inf, **given}
    of_method = dict(given.pop("jac_options", None) or {})
    named = {_OF_ROOT[name]: value for name, value in given.items()}
    alpha = of_method.pop("alpha", None)
    known = ("w0", "M") if method == "anderson" else ("reduction_method", "max_rank")
    refuse("root", [name for name in of_method if name not in known], ("alpha", *known))
    make = _anderson if method == "anderson" else _broyden
    arguments = args if isinstance(args, tuple) else (args,)
    F = (lambda x: fun(x, *arguments)) if arguments else fun
    merged = {**_COMMON, **named, "alpha": alpha, "callback": callback, "batched": batched}
    result = _solve("root", F, x0, make(**of_method), merged)
    result["method"] = method
    return result


_COMMON: dict[str, Any] = {
    "iter": None,
    "alpha": None,
    "verbose": False,
    "maxiter": None,
    "f_tol": None,
    "f_rtol": None,
    "x_tol": None,
    "x_rtol": None,
    "tol_norm": None,
    "line_search": "armijo",
    "callback": None,
    "batched": False,
}
_OF_ROOT = {
    "nit": "iter",
    "disp": "verbose",
    "maxiter": "maxiter",
    "ftol": "f_rtol",
    "fatol": "f_tol",
    "xtol": "x_rtol",
    "xatol": "x_tol",
    "tol_norm": "tol_norm",
    "line_search": "line_search",
}


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in _COMMON}


def _anderson(w0: float = _W0, M: int = 5) -> Solver:
    check_number("w0", w0)
    if check_int("M", M, least=0) == 0:
        return Picard()
    return Anderson(m=M, ridge=None if w0 == _W0 else w0**2)


def _broyden(reduction_method: Any = "restart", max_rank: float | None = None) -> Solver:
    name = reduction_method if isinstance(reduction_method, str) else reduction_method[0]
    check_choice("reduction_method", name, ("restart", "simple", "svd"))
    if name != "restart":
        ignored("broyden1", ["reduction_method"], "a memory that is full is forgotten as a whole")
    rank = DEFAULT_MEMORY if max_rank is None else min(check_number("max_rank", max_rank), DEFAULT_MEMORY)
    return Broyden(max(2, int(rank)))


def _found(function: str, F: Callable[[Any], Any], xin: Any, solver: Solver, options: dict[str, Any]) -> Any:
    result = _solve(function, F, xin, solver, options)
    if not result.success and options["iter"] is None:
        raise NoConvergence(result.x, result.get("converged"))
    return result.x


def _solve(function: str, F: Callable[[Any], Any], xin: Any, solver: Solver, options: dict[str, Any]) -> OptimizeResult:
    check_callable("F", F)
    batched, search = check_flag("batched", options["batched"]), _search(function, options)
    arrays = Arrays(F, xin, batched)
    norm, alpha, iterations = options["tol_norm"], options["alpha"], options["iter"]
    tolerances = {name: options[name] for name in ("f_tol", "f_rtol", "x_tol", "x_rtol")}
    rule = Rule(**tolerances, norm=max_norm if norm is None else arrays.normed(norm), iter=iterations)
    limit = 100 * (arrays.x.shape[-1] + 1) if options["maxiter"] is None else options["maxiter"]
    check_int("maxiter", limit, least=0)
    if iterations is not None:
        check_int("iter", iterations, least=0)
    if alpha is not None and not 0 < abs(check_number("alpha", alpha)) < math.inf:
        raise ValueError(f"alpha must be finite and not 0, got {alpha}")
    tell = _tell(arrays, options["verbose"], options["callback"])
    with torch.no_grad():
        fx = arrays.start()
        if batched:
            found = Many(arrays, solver, rule, limit, alpha, tell).solve(arrays.x, fx)
        else:
            roots = Roots(arrays, solver, rule, limit, alpha, search, tell)
            found = roots.solve(arrays.x, fx)
            roots.end()
    success = bool(found.success.all()) if batched else bool(found.success)
    more = {"converged": arrays.user_rows(found.success)} if batched else {}
    return OptimizeResult(
        x=arrays.user(found.x),
        success=success,
        status=1 if success else 2,
        message="within the tolerances" if success else "not within the tolerances after the iterations",
        fun=arrays.user(found.fx),
        nit=found.iterations,
        nfev=arrays.evaluations,
        **more,
    )


def _search(function: str, options: dict[str, Any]) -> bool:
    """Whether steps are searched."""
    search = options["line_search"]
    check_choice("line_search", search, _SEARCHES)
    if search == "wolfe":
        ignored(function, ["line_search"], '"wolfe" is taken for "armijo"')
    return bool(search)


def _tell(arrays: Arrays, verbose: bool, callback: Callable[[Any, Any], Any] | None) -> Any:
    if callback is not None:
        check_callable("callback", callback)
    if not verbose and callback is None:
        return None

    def tell(x: Tensor, fx: Tensor, norm: Any) -> None:
        if callback is not None:
            callback(arrays.user(x), arrays.user(fx))
        if verbose:
            print(f"{tell.count}:  |F(x)| = {float(torch.as_tensor(norm).max()):g}")  # type: ignore[attr-defined]
        tell.count += 1  # type: ignore[attr-defined]

    tell.count = 0  # type: ignore[attr-defined]
    return tell
