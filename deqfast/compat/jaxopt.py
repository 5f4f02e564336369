"""``jaxopt.FixedPointIteration`` and ``jaxopt.AndersonAcceleration``, in torch.

Same arguments, states and rule: a pytree of tensors is one system, and it stops when the 2-norm of f(x) - x over all of
it is at most ``tol``. ``run`` gives f at the last x and can be differentiated with respect to its args and whatever f
closes over, implicitly or through the iterations. Different on purpose: steps are deqfast's; a run that did not reach
``tol`` says so in a ``ConvergenceWarning``.

Source: jaxopt's reference, jaxopt.FixedPointIteration and jaxopt.AndersonAcceleration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import compiled
from ..called import Called
from ..gradients.implicit import Implicit
from ..gradients.unroll import Unroll
from ..loop.state import SolverState
from ..ops.codes import Real
from ..options import check_callable, check_flag, check_int, check_not_negative
from ..solve import fixed_point
from ..solvers.anderson import Anderson
from ..solvers.base import Solver
from ..solvers.picard import Picard
from ._names import ignored, refuse, unsolved

__all__ = ["AndersonAcceleration", "AndersonState", "FixedPointIteration", "FixedPointState", "OptStep"]

_RIDGE = 1e-5
_BACKWARD_LIMIT = 1000


class OptStep(NamedTuple):
    """The params, and the state of the iteration."""

    params: Any
    state: Any


class FixedPointState(NamedTuple):
    """Iterations made, ||f(x) - x|| at the x of the last one, what f returned beside it, evaluations of f."""

    iter_num: int
    error: float
    aux: Any = None
    num_fun_eval: int = 0


class AndersonState(NamedTuple):
    """``FixedPointState``, and what the next ``update`` needs.

    That is a solver's state, which it changes, the steps that this has made, and the params it belongs to.
    """

    iter_num: int
    error: float
    aux: Any = None
    num_fun_eval: int = 0
    solver: SolverState | None = None
    steps: int = 0
    last: Any = None


class _Iteration:
    """What both have."""

    _ARGUMENTS: tuple[str, ...]
    _solver: Solver

    def _set(
        self,
        fixed_point_fun: Callable[..., Any],
        maxiter: int,
        tol: float,
        flags: dict[str, bool],
        unused: dict[str, Any],
        unknown: dict[str, Any],
    ) -> None:
        name = type(self).__name__
        refuse(name, unknown, self._ARGUMENTS)
        check_callable("fixed_point_fun", fixed_point_fun)
        check_int("maxiter", maxiter)
        check_not_negative("tol", tol)
        for flag, value in flags.items():
            setattr(self, flag, check_flag(flag, value))
        ignored(name, [k for k, v in unused.items() if v not in (None, True, "auto")], "torch runs it as it is")
        self.fixed_point_fun, self.maxiter, self.tol = fixed_point_fun, maxiter, float(tol)

    has_aux: bool
    verbose: bool
    implicit_diff: bool

    @compiled.skip
    def run(self, init_params: Any, *args: Any, **kwargs: Any) -> OptStep:
        """Iterate until ||f(x) - x|| <= tol, or maxiter times.

        Args:
            init_params: x to start from, a pytree of tensors of any shapes.
            *args: handed to f after x; gradients reach them.
            **kwargs: handed to f.

        Returns:
            f at the x that was evaluated last (at the best one, if tol was not reached), and a ``FixedPointState``.
        """
        implicit = Implicit(rtol=_backward_rtol(init_params), max_iter=_BACKWARD_LIMIT)
        sol = fixed_point(
            self.fixed_point_fun,
            init_params,
            args,
            solver=self._solver,
            rtol=0.0,
            atol=self.tol,
            max_iter=self.maxiter,
            backward=implicit if self.implicit_diff else Unroll(),
            kwargs=kwargs or None,
            has_aux=self.has_aux,
            returns="image",
            batch_dims=0,
            callback=self._show if self.verbose else None,
        )
        error = float(sol.residual) * _norm(sol.z)
        if not bool(sol.converged):
            unsolved(f"{type(self).__name__}.run", error, self.tol, sol.nfe)
        return OptStep(sol.z, FixedPointState(sol.nfe, error, sol.aux, sol.nfe))

    def _show(self, k: int, state: SolverState) -> None:
        print(f"{type(self).__name__}: iteration {k}, error {float(state.ws.real_row(Real.NORM)):.3e}")

    def _call(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        called = Called(self.fixed_point_fun, kwargs, self.has_aux)
        return called(x, *args), called.newest

    def optimality_fun(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate f(x) - x."""
        return pytree.tree_map(torch.sub, self._call(params, args, kwargs)[0], params)

    def l2_optimality_error(self, params: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Evaluate ||f(x) - x||."""
        leaves = pytree.tree_leaves(self.optimality_fun(params, *args, **kwargs))
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in leaves]))

    def _tell(self, state: Any) -> None:
        if self.verbose:
            print(f"{type(self).__name__}: iteration {state.iter_num}, error {state.error:.3e}")


class FixedPointIteration(_Iteration):
    """Iterate x = f(x).

    Args:
        fixed_point_fun: callable (x, *args, **kwargs) -> like x, a pytree of tensors; with ``has_aux`` (x, aux).
        maxiter: iterations at most.
        tol: ||f(x) - x|| over the whole of x, absolute.
        has_aux: f returns a pair.
        verbose: print every iteration.
        implicit_diff: differentiate ``run`` by the implicit function theorem; False: through its iterations.
        implicit_diff_solve: not used, which is said once; so are ``jit`` and ``unroll``.
        jit: see there.
        unroll: see there.
        **unknown: none.

    Raises:
        TypeError, ValueError: an argument that there is none of, or a value that it cannot have.
    """

    _ARGUMENTS = ("fixed_point_fun", "maxiter", "tol", "has_aux", "verbose", "implicit_diff")
    _solver = Picard()

    def __init__(
        self,
        fixed_point_fun: Callable[..., Any],
        maxiter: int = 100,
        tol: float = 1e-5,
        has_aux: bool = False,
        verbose: bool = False,
        implicit_diff: bool = True,
        implicit_diff_solve: Any = None,
        jit: Any = True,
        unroll: Any = "auto",
        **unknown: Any,
    ) -> None:
        flags = {"has_aux": has_aux, "verbose": verbose, "implicit_diff": implicit_diff}
        unused = {"implicit_diff_solve": implicit_diff_solve, "jit": jit, "unroll": unroll}
        self._set(fixed_point_fun, maxiter, tol, flags, unused, unknown)

    def init_state(self, init_params: Any, *args: Any, **kwargs: Any) -> FixedPointState:
        """The state before the first iteration."""
        return FixedPointState(0, math.inf)

    def update(self, params: Any, state: FixedPointState, *args: Any, **kwargs: Any) -> OptStep:
        """One iteration: f(params), with its graph, and the state after it."""
        new, aux = self._call(params, args, kwargs)
        error = _norm(pytree.tree_map(torch.sub, new, params))
        state = FixedPointState(state.iter_num + 1, error, aux, state.num_fun_eval + 1)
        self._tell(state)
        return OptStep(new, state)


class AndersonAcceleration(_Iteration):
    """Anderson acceleration of x = f(x).

    Args:
        fixed_point_fun: callable (x, *args, **kwargs) -> like x, a pytree of tensors; with ``has_aux`` (x, aux).
        history_size: columns of history, at least 2.
        mixing_frequency: mix at every so many iterations.
        beta: mixing in (0, 1].
        maxiter: iterations at most.
        tol: ||f(x) - x|| over the whole of x, absolute.
        ridge: regularisation, relative to the diagonal of the small system; default that of ``dq.Anderson``.
        has_aux: f returns a pair.
        verbose: print every iteration.
        implicit_diff: differentiate ``run`` by the implicit function theorem; False: through its iterations.
        implicit_diff_solve: not used, which is said once; so are ``jit`` and ``unroll``.
        jit: see there.
        unroll: see there.
        **unknown: none.

    Raises:
        TypeError, ValueError: an argument that there is none of, or a value that it cannot have.
    """

    _ARGUMENTS = (
        *("fixed_point_fun", "history_size", "mixing_frequency", "beta", "maxiter", "tol", "ridge", "has_aux"),
        *("verbose", "implicit_diff"),
    )

    def __init__(
        self,
        fixed_point_fun: Callable[..., Any],
        history_size: int = 5,
        mixing_frequency: int = 1,
        beta: float = 1.0,
        maxiter: int = 100,
        tol: float = 1e-5,
        ridge: float = _RIDGE,
        has_aux: bool = False,
        verbose: bool = False,
        implicit_diff: bool = True,
        implicit_diff_solve: Any = None,
        jit: Any = True,
        unroll: Any = "auto",
        **unknown: Any,
    ) -> None:
        flags = {"has_aux": has_aux, "verbose": verbose, "implicit_diff": implicit_diff}
        unused = {"implicit_diff_solve": implicit_diff_solve, "jit": jit, "unroll": unroll}
        self._set(fixed_point_fun, maxiter, tol, flags, unused, unknown)
        check_int("history_size", history_size, least=2, hint="; FixedPointIteration has no history")
        check_int("mixing_frequency", mixing_frequency)
        self.history_size, self.mixing_frequency, self.beta, self.ridge = history_size, mixing_frequency, beta, ridge
        self._solver = Anderson(
            m=history_size, mixing=beta, ridge=None if ridge == _RIDGE else ridge, mix_every=mixing_frequency
        )

    def init_state(self, init_params: Any, *args: Any, **kwargs: Any) -> AndersonState:
        """The state before the first iteration."""
        return AndersonState(0, math.inf, solver=self._start(init_params), last=init_params)

    def _start(self, params: Any) -> SolverState:
        return self._solver.init(params, rtol=0.0, atol=0.0, batch_dims=0)

    @compiled.skip
    def update(self, params: Any, state: AndersonState, *args: Any, **kwargs: Any) -> OptStep:
        """One iteration: f at the next x, without a graph, and the state after it.

        Args:
            params: what the update before returned. Anything else begins a new history there.
            state: what it returned with them. It is used up: an older one is refused.
            *args: handed to f after x.
            **kwargs: handed to f.

        Raises:
            ValueError: the state is not that of the newest update.
        """
        solver = state.solver
        if solver is None or not _same(params, state.last):
            solver = self._start(params)
        elif solver.nfe != state.steps:
            raise ValueError(
                f"state is that after {state.steps} updates, and there have been {solver.nfe}: an update uses its "
                "state up; copy.deepcopy((params, state)) before one keeps them"
            )
        with torch.no_grad():
            z = solver.z
            new, aux = self._call(z, args, kwargs)
            error = _norm(pytree.tree_map(torch.sub, new, z))
            solver.step(new)
        made = state.iter_num + 1
        result = AndersonState(made, error, aux, state.num_fun_eval + 1, solver, solver.nfe, new)
        self._tell(result)
        return OptStep(new, result)


def _norm(tree: Any) -> float:
    """2-norm over all tensors."""
    norms = [torch.linalg.vector_norm(t.detach()) for t in pytree.tree_leaves(tree)]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same tensors."""
    first, second = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(first) == len(second) and all(x is y for x, y in zip(first, second, strict=True))


def _backward_rtol(params: Any) -> float:
    wide = (torch.float64, torch.complex128)
    return 1e-8 if all(t.dtype in wide for t in pytree.tree_leaves(params) if isinstance(t, Tensor)) else 1e-6
