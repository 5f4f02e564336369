"""``fixed_point`` and ``root``: the loop, written once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import compiled, graphs, transforms
from .choose import choose_solver
from .compaction import Compactor
from .implicit import Gradient, Problem, choose_gradient
from .ops import BACKENDS
from .ops.layout import Layout
from .ops.workspace import Int
from .solution import ConvergenceError, Solution
from .state import Solver, SolverState, check_stopping
from .status import Status


@compiled.entry("f")
def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...] = (),
    *,
    solver: str | Solver = "anderson",
    rtol: float | None = None,
    atol: float = 0.0,
    max_iter: int = 100,
    backward: Gradient | str | None = None,
    returns: str = "best",
    compact: Any = False,
    trace: bool = False,
    callback: Callable[[int, SolverState], bool | None] | None = None,
    throw: bool = False,
    backend: str = "auto",
    mode: str = "loop",
    progress: bool = False,
) -> Solution:
    """Solve z = f(z, *args) for every sample of a batch.

    Args:
        f: callable (z, *args) -> same structure, shapes and dtypes as z. The z it receives is valid during the call.
        z0: start: tensor (B, ...) or a tuple, list or dict of tensors that share dim 0. float64, float32, bfloat16,
            float16 or complex.
        args: tensors or pytrees handed to f after z. Gradients reach them, and whatever f closes over.
        solver: "anderson" (default), "broyden", "picard", or an ``Anderson``, ``Broyden`` or ``Picard`` with options.
        rtol: a sample stops when ||f(z) - z|| <= atol + rtol ||f(z)||. Default by dtype: 1e-8 float64, 1e-4 float32,
            4e-3 float16, 2e-2 bfloat16.
        atol: absolute part of the same, default 0. With rtol = atol = 0 exactly max_iter evaluations are made, unless
            f(z) == z.
        max_iter: evaluations of f at most, default 100.
        backward: how gradients are made: ``Implicit()`` (None), ``Phantom``, ``OneStep``, ``Unroll``, or "none".
        returns: "best" (default), the iterate with the least residual of each sample, or "last".
        compact: True when f treats samples independently: converged ones are dropped from what f sees, with every
            tensor in args whose dim 0 is B; or a pytree of bools shaped like args that says which tensors follow.
        trace: record the (nfe, B) residuals.
        callback: called after every evaluation as callback(k, state) with a ``SolverState`` to look at; True stops.
        throw: raise ``ConvergenceError`` unless every sample converged.
        backend: "auto" (default), "native", "triton" or "reference"; ``python -m deqfast.info`` says what is available.
        mode: who runs the loop on a GPU. "loop" (default): Python launches every evaluation of f. "graph": f and the
            step are captured once as a CUDA graph, and a few evaluations replayed at a time. "device": the whole loop
            runs on the GPU. Both give the bits of "loop", may evaluate f a few times more, and run f's Python once per
            shape, not once per evaluation. Where that is impossible the plain loop runs, with a ``ModeWarning`` that
            says why, and ``Solution.mode`` is "loop". Not with trace, callback, progress or compact.
        progress: show a tqdm bar of evaluations.

    Returns:
        A ``Solution``. A sample that does not converge is a status, not an error, and never disturbs the others.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before any work.
        ConvergenceError: with ``throw=True``.
    """
    chosen = choose_solver(solver)
    gradient = choose_gradient(backward)
    check_options(f, args, max_iter, returns, callback)
    check_choices(compact, backend, {"trace": trace, "throw": throw, "progress": progress})
    check_mode(mode, {"trace": trace, "callback": callback is not None, "progress": progress, "compact": compact})
    transformed = transforms.active()
    if transformed:
        f = compiled.eager(f)
    start = transforms.values(z0) if transformed else z0
    layout = Layout(start)
    rtol, atol, max_iter = check_stopping(rtol, atol, max_iter, layout.dtype)
    problem = Problem(f, args, layout, chosen, rtol, max_iter, backend, transformed, mode)
    if gradient is not None and gradient.solves and problem.differentiated:
        if mode != "loop":
            raise ValueError(
                f"mode={mode!r} cannot be combined with backward={gradient}, which differentiates the loop"
            )
        return gradient.solve(
            problem,
            z0,
            atol=atol,
            returns=returns,
            compact=compact,
            trace=trace,
            callback=callback,
            throw=throw,
            progress=progress,
        )
    solution = None
    if mode != "loop" and layout.B and layout.N:
        solution = _replayed(problem, start, atol, returns)
    if solution is None:
        if not transformed:
            state, rows = _run(f, args, problem, start, atol, returns, compact, trace, callback, progress)
        else:
            with transforms.Outside() as outside:
                inner, plain = outside.inside(f), transforms.values(args)
                state, rows = _run(inner, plain, problem, start, atol, returns, compact, trace, callback, progress)
        shared = callback is not None  # it may have kept the state
        solution = conclude(state, returns, rows, shared)
        problem.copy_z = state.copies_z
        if not shared:
            state.release()
    if gradient is not None and problem.differentiated:
        solution.z = gradient.attach(problem, solution.z)
    if throw and not bool(solution.converged.all()):
        raise ConvergenceError(solution)
    return solution


@compiled.skip
def root(g: Callable[..., Any], z0: Any, args: tuple[Any, ...] = (), **options: Any) -> Solution:
    """Solve g(z, *args) = 0 as the fixed point of z + g(z, *args).

    Takes every option of ``fixed_point``; stops a sample on ||g(z)|| <= atol + rtol ||z + g(z)||.
    """
    if not callable(g):
        raise TypeError(f"g must be callable, got {type(g).__name__}")
    return fixed_point(functools.partial(_shifted, g), z0, args, **options)


@compiled.skip
def _shifted(g: Callable[..., Any], z: Any, *args: Any) -> Any:
    value = g(z, *args)
    expected, got = pytree.tree_structure(z), pytree.tree_structure(value)
    if expected != got:
        raise TypeError(f"g(z) must have the structure of z0, expected {expected}, got {got}")
    for t, v in zip(pytree.tree_leaves(z), pytree.tree_leaves(value), strict=True):
        if not isinstance(v, Tensor) or v.shape != t.shape:
            shape = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"g(z) must have the shape of z0, expected {tuple(t.shape)}, got {shape}")
    return pytree.tree_map(torch.add, z, value)


def check_options(f: Any, args: Any, max_iter: Any, returns: str, callback: Any) -> None:
    """Raise TypeError or ValueError for a wrong option, naming it."""
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple, got {type(args).__name__}; write args=(x,) for one argument")
    if max_iter is None:
        raise TypeError("max_iter must be an int, got None")
    if returns not in ("best", "last"):
        raise ValueError(f"returns must be 'best' or 'last', got {returns!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")


FLAGS = ("trace", "throw", "progress")


def check_choices(compact: Any, backend: Any, flags: dict[str, Any]) -> None:
    """Raise TypeError or ValueError for a wrong ``compact``, ``backend`` or flag, naming it."""
    if compact is not True and compact is not False:
        leaves = pytree.tree_leaves(compact)
        if not leaves or not all(isinstance(leaf, bool) for leaf in leaves):
            raise TypeError(f"compact must be a bool or a tree of bools shaped like args, got {compact!r}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of 'auto', {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    for name, value in flags.items():
        if value is not True and value is not False:
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_mode(mode: Any, others: dict[str, Any]) -> None:
    """Raise ValueError for an unknown ``mode``, or for one that does not go with another option that is in use."""
    if mode not in graphs.MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, graphs.MODES))}, got {mode!r}")
    for name, used in others.items():
        if mode != "loop" and used is not False:
            raise ValueError(f"mode={mode!r} cannot be combined with {name}, which looks at every evaluation")


def _replayed(problem: Problem, start: Any, atol: float, returns: str) -> Solution | None:
    """The solution by a recording; None, with a warning, where there can be none."""
    layout = problem.layout
    try:
        program = graphs.forward_program(problem, atol, keep_best=returns == "best")
    except graphs.CannotRecord as reason:
        graphs.warn(problem.mode, str(reason))
        return None

    def finish(state: SolverState, evaluations: int | Tensor) -> Solution:
        solution = conclude(state, returns, None, shared=True)
        solution.z = pytree.tree_map(torch.clone, solution.z)
        solution.evaluations, solution.mode = evaluations, problem.mode
        return solution

    leaves = [start.detach()] if layout.single else [t.detach() for t in pytree.tree_leaves(start)]
    return graphs.replayed(program, leaves, finish)


def _run(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    problem: Problem,
    start: Any,
    atol: float,
    returns: str,
    compact: Any,
    trace: bool,
    callback: Callable[[int, SolverState], bool | None] | None,
    progress: bool,
) -> tuple[SolverState, list[Tensor] | None]:
    """Evaluate and step until every sample has stopped; the state, and the recorded residuals."""
    state = SolverState(
        problem.solver,
        start,
        rtol=problem.rtol,
        atol=atol,
        max_iter=problem.max_iter,
        keep_best=returns == "best",
        backend=problem.backend,
        layout=problem.layout,
    )
    compactor = Compactor(state, args, compact) if compact is not False else None
    rows: list[Tensor] | None = [] if trace else None
    bar = progress_bar(problem.max_iter) if progress else None
    if compactor is None and rows is None and bar is None and callback is None:
        with torch.no_grad():
            while not state.done:
                state.step(f(state.z, *args))
        return state, None
    try:
        with torch.no_grad():
            while not state.done:
                if compactor is None:
                    state.step(f(state.z, *args))
                else:
                    z, some = compactor.inputs()
                    compactor.step(f(z, *some))
                if rows is not None:
                    rows.append(torch.where(state.steps == state.nfe, state.residual, float("nan")))
                if bar is not None:
                    bar.update()
                    bar.set_postfix_str(f"{state.known_running} running", refresh=False)
                if callback is not None and state.show(callback):
                    break
    finally:
        if bar is not None:
            bar.close()
    return state, rows


def progress_bar(total: int) -> Any:
    """A tqdm bar of ``total`` evaluations."""
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'deqfast[progress]'") from error
    return tqdm(total=total, unit="evaluation", leave=False)


def conclude(state: SolverState, returns: str, rows: list[Tensor] | None, shared: bool) -> Solution:
    """The solution a state has reached; ``shared``: somebody else may step the state further."""
    leaves, residual = state.answer(returns)
    ws, layout = state.ws, state.layout
    counters = ws.ints.clone() if shared else ws.ints
    status = counters[Int.STATUS, : layout.B]
    if layout.N == 0:
        status.fill_(Status.CONVERGED)
        residual = torch.zeros_like(residual)
    elif not state.done:
        status.masked_fill_(status == Status.RUNNING, Status.STOPPED)
    trace = None if rows is None else torch.stack(rows) if rows else residual.new_empty(0, layout.B)
    return Solution(
        z=layout.unflatten(leaves),
        converged=status == Status.CONVERGED,
        steps=counters[Int.STEPS, : layout.B],
        residual=residual,
        evaluations=state.nfe,
        status=status,
        trace=trace,
        backend=state.backend,
        counters=counters,
    )
