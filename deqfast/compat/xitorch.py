"""``xitorch.optimize.equilibrium`` and ``rootfinder``.

Same arguments and stopping rules; y is one system whatever its shape, and norms are 2-norms over all of it. Gradients
reach params, and whatever fcn closes over (a module's parameters too, with no ``EditableModule``), by the implicit
function theorem, and may be differentiated again. Different on purpose: steps are deqfast's, as in
``dq.compat.scipy``; ``broyden2`` is Anderson's method of Type II, the multisecant form of Broyden's second.

Source: xitorch's reference, xitorch.optimize; Fang and Saad, Numer. Linear Algebra Appl. 16 (2009).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import compiled
from ..gradients.implicit import Implicit
from ..options import check_callable, check_choice, check_int
from ..solve import fixed_point
from ..solvers.anderson import Anderson
from ..solvers.base import Solver
from ..solvers.broyden import DEFAULT_MEMORY, Broyden
from ..solvers.picard import Picard
from ._names import ignored, refuse, unsolved
from ._roots import Found, Roots, Rule

__all__ = ["equilibrium", "rootfinder"]

_LAMBDA = 1e-4
_LIMIT = 1000
_TOLERANCE = 1e-6
_COLUMNS = 20  # of broyden2
_COMMON: dict[str, Any] = {
    "maxiter": None,
    "f_tol": None,
    "f_rtol": None,
    "x_tol": None,
    "x_rtol": None,
    "verbose": False,
    "line_search": True,
}
_OF_METHOD: dict[str, dict[str, Any]] = {
    "broyden1": {"alpha": None, "uv0": None, "max_rank": None},
    "broyden2": {"alpha": None, "uv0": None, "max_rank": None},
    "linearmixing": {"alpha": None},
    "anderson_acc": {"feat_ndims": None, "msize": 5, "beta": 1.0, "lmbda": _LAMBDA},
}
_ROOT_METHODS = ("broyden1", "broyden2", "linearmixing")
_LINEAR_METHODS = (
    *("exactsolve", "custom_exactsolve", "lu", "cg", "bicgstab", "gmres", "scipy_gmres", "broyden1"),
    *("wrap_gmres", None),
)
_BACKWARD = ("method", "rtol", "max_niter", "maxiter")
_BACKWARD_UNUSED = ("atol", "posdef", "verbose", "eps", "precond_l", "precond_r", "resid_calc_every", "fallback_method")
_BACKWARD_RTOL = {torch.float64: 1e-10}  # narrower ones: 1e-6; as far as an exact solve, which is xitorch's default


@compiled.skip
def equilibrium(
    fcn: Callable[..., Tensor],
    y0: Tensor,
    params: Sequence[Any] = (),
    bck_options: Mapping[str, Any] | None = None,
    method: str | None = None,
    **fwd_options: Any,
) -> Tensor:
    """Solve y = fcn(y, *params).

    Args:
        fcn: callable (y, *params) -> a tensor shaped like y.
        y0: start, of any shape, real or complex.
        params: tensors and anything else that fcn takes.
        bck_options: of the backward solve: ``rtol``, relative to the incoming gradient, default 1e-10 in float64 and
            1e-6 below; ``max_niter``, vjps at most; ``method``, a name of xitorch's, all of which are one here. Others
            are not used, which is said once.
        method: "broyden1" (None), "broyden2", "linearmixing" or "anderson_acc".
        **fwd_options: ``maxiter`` iterations, default 100 (numel + 1) and 1000 at most. It stops when ||fcn(y) - y|| <=
            ``f_tol`` (1e-6) and <= ``f_rtol`` (none) times that at y0, and the last step's size is <= ``x_tol`` (1e-6)
            and <= ``x_rtol`` (none) ||y||. ``verbose`` prints the residuals. ``line_search``: as in
            ``dq.compat.scipy``. ``alpha``: steps of alpha (fcn(y) - y), default 1, of "broyden1" and "broyden2"
            the slope of a first step; of those ``max_rank``, the steps kept; of "anderson_acc" ``msize``
            columns, mixing ``beta``, ridge ``lmbda``. In float32 the default tolerances are near rounding for more than
            a few dozen numbers: give others.

    Returns:
        y, with a gradient; the last one, with a ``ConvergenceWarning``, where none met the rule.

    Raises:
        TypeError, ValueError: an unknown option, or a value that it cannot have.
    """
    check_callable("fcn", fcn)
    name = "broyden1" if method is None else method
    check_choice("method", name, tuple(_OF_METHOD))
    options = _options("equilibrium", name, fwd_options, y0)
    backward = _backward("equilibrium", bck_options, y0)
    alpha = options.get("alpha")
    scale = abs(float(alpha)) if alpha is not None else None if name.startswith("broyden") else 1.0

    def moved(y: Tensor) -> Tensor:
        return fcn(y, *params) - y

    found, _ = _forward("equilibrium", moved, y0, _solver(name, options), options, scale)
    y = found.x.view(y0.shape)
    return fixed_point(fcn, y, tuple(params), batch_dims=0, max_iter=0, backward=backward).z


@compiled.skip
def rootfinder(
    fcn: Callable[..., Tensor],
    y0: Tensor,
    params: Sequence[Any] = (),
    bck_options: Mapping[str, Any] | None = None,
    method: str | None = None,
    **fwd_options: Any,
) -> Tensor:
    """Solve fcn(y, *params) = 0.

    Args:
        fcn: callable (y, *params) -> a tensor shaped like y.
        y0: start, of any shape, real or complex.
        params: tensors and anything else that fcn takes.
        bck_options: as of ``equilibrium``.
        method: "broyden1" (None), "broyden2" or "linearmixing".
        **fwd_options: as of ``equilibrium``, norms of fcn(y). ``alpha``: the first guess of the Jacobian is -1/alpha;
            default the slope of a first step.

    Returns:
        y, with a gradient; the last one, with a ``ConvergenceWarning``, where none met the rule.

    Raises:
        TypeError, ValueError: an unknown option, or a value that it cannot have.
    """
    check_callable("fcn", fcn)
    name = "broyden1" if method is None else method
    check_choice("method", name, _ROOT_METHODS)
    options = _options("rootfinder", name, fwd_options, y0)
    backward = _backward("rootfinder", bck_options, y0)
    alpha = options["alpha"]

    def root(y: Tensor) -> Tensor:
        return fcn(y, *params)

    found, scale = _forward(
        "rootfinder", root, y0, _solver(name, options), options, None if alpha is None else float(alpha)
    )

    def step(y: Tensor, *params: Any) -> Tensor:
        return torch.add(y, fcn(y, *params), alpha=scale)

    y = found.x.view(y0.shape)
    return fixed_point(step, y, tuple(params), batch_dims=0, max_iter=0, backward=backward).z


def _options(function: str, method: str, given: dict[str, Any], y0: Any) -> dict[str, Any]:
    """All options of a method; what is unknown refused, what has no meaning said."""
    if not isinstance(y0, Tensor) or not (y0.is_floating_point() or y0.is_complex()):
        raise TypeError(f"y0 must be a floating or complex tensor, got {getattr(y0, 'dtype', type(y0).__name__)}")
    known = {**_OF_METHOD[method], **_COMMON}
    refuse(f"{function}({method!r})", [name for name in given if name not in known], known)
    options = {**known, **given}
    if options.get("uv0") is not None:
        ignored(function, ["uv0"], "the first Jacobian is a multiple of the identity")
    if options.get("feat_ndims") not in (None, y0.dim()):
        ignored(function, ["feat_ndims"], "the whole of y is one system; dq.fixed_point has batch_dims=")
    check_choice("line_search", options["line_search"], (True, False, "armijo", "wolfe", None))
    if options["line_search"] == "wolfe":
        ignored(function, ["line_search"], '"wolfe" is taken for "armijo"')
    return options


def _solver(method: str, options: Mapping[str, Any]) -> Solver:
    if method == "linearmixing":
        return Picard()
    if method == "anderson_acc":
        ridge = None if options["lmbda"] == _LAMBDA else options["lmbda"]
        return Anderson(m=options["msize"], mixing=options["beta"], ridge=ridge)
    rank = options["max_rank"]
    if method == "broyden2":
        return Anderson(m=_COLUMNS if rank is None else max(1, min(int(rank), _COLUMNS)), type=2)
    return Broyden(DEFAULT_MEMORY if rank is None else max(2, min(int(rank), DEFAULT_MEMORY)))


def _backward(function: str, options: Mapping[str, Any] | None, y0: Tensor) -> Implicit:
    given = dict(options or {})
    refuse(f"{function} bck_options", [k for k in given if k not in (*_BACKWARD, *_BACKWARD_UNUSED)], _BACKWARD)
    ignored(function, [name for name in _BACKWARD_UNUSED if name in given], "bck_options takes rtol and max_niter")
    check_choice("method of bck_options", given.get("method"), _LINEAR_METHODS)
    limit = given.get("max_niter", given.get("maxiter"))
    rtol = given.get("rtol")
    if rtol is None:
        rtol = _BACKWARD_RTOL.get(y0.abs().dtype if y0.is_complex() else y0.dtype, 1e-6)
    return Implicit(Broyden(scale="first_step"), rtol=rtol, max_iter=_LIMIT if limit is None else limit)


def _forward(
    function: str,
    F: Callable[[Tensor], Tensor],
    y0: Tensor,
    solver: Solver,
    options: Mapping[str, Any],
    scale: float | None,
) -> tuple[Found, float]:
    """The end of the forward solve, and the s of its steps y + s F(y)."""
    limit = options["maxiter"]
    limit = min(100 * (y0.numel() + 1), _LIMIT) if limit is None else check_int("maxiter", limit)
    tolerances = {name: options[name] for name in ("f_tol", "f_rtol", "x_tol", "x_rtol")}
    tolerances = {**tolerances, **{k: _TOLERANCE for k in ("f_tol", "x_tol") if tolerances[k] is None}}
    rule = Rule(**tolerances, norm=torch.linalg.vector_norm)
    evaluations = 0

    def flat(v: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        found = F(v.clone().view(y0.shape))
        if not isinstance(found, Tensor) or found.shape != y0.shape or found.dtype != y0.dtype:
            got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"fcn(y) must be like y0, expected {y0.dtype} {tuple(y0.shape)}, got {got}")
        return found.detach().reshape(-1)

    def tell(x: Tensor, fx: Tensor, norm: Any) -> None:
        print(f"{evaluations:6d}: |f|={float(norm):.3e}")

    with torch.no_grad():
        start = y0.detach().reshape(-1)
        search = bool(options["line_search"])
        roots = Roots(flat, solver, rule, limit, scale, search, tell if options["verbose"] else None)
        found = roots.solve(start, flat(start))
        roots.end()
        if not found.success:
            size = float(torch.linalg.vector_norm(found.fx))
            unsolved(
                function, size, float(rule.f_tol or 0.0), evaluations, "; f_tol, f_rtol, x_tol and x_rtol must hold"
            )
    return found, roots.scale
