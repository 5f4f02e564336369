"""``fixed_point`` and ``root``: the loop, written once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import compiled, graphs, transforms
from .gradients.base import Gradient
from .gradients.choose import choose_gradient
from .loop.compaction import Compactor
from .loop.progress import progress_bar
from .loop.state import SolverState
from .ops.codes import Int
from .ops.layout import Layout
from .options import Options, check_args, check_callable
from .problem import Problem
from .solution import ConvergenceError, Solution
from .solvers.base import Solver
from .solvers.choose import choose_solver
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
        backend: "auto" (default), "native", "triton", "torch" or "reference"; ``python -m deqfast.info`` says what is
            available.
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
    options = Options(
        solver=choose_solver(solver),
        rtol=rtol,
        atol=atol,
        max_iter=max_iter,
        backward=choose_gradient(backward),
        returns=returns,
        compact=compact,
        trace=trace,
        callback=callback,
        throw=throw,
        backend=backend,
        mode=mode,
        progress=progress,
    )
    return solve(f, z0, args, options)


def solve(f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: Options) -> Solution:
    """``fixed_point`` with options that have been checked."""
    check_callable("f", f)
    check_args(args)
    gradient: Gradient | None = options.backward
    transformed = transforms.active()
    if transformed:
        f = compiled.eager(f)
    start = transforms.values(z0) if transformed else z0
    layout = Layout(start)
    problem = Problem(f, args, layout, options, options.stopping(layout.dtype), transformed)
    if gradient is not None and gradient.solves and problem.differentiated:
        return gradient.solve(problem, z0)
    solution = None
    if options.mode != "loop" and layout.B and layout.N:
        solution = _replayed(problem, start)
    if solution is None:
        if not transformed:
            state, rows = _run(f, args, problem, start)
        else:
            with transforms.Outside() as outside:
                state, rows = _run(outside.inside(f), transforms.values(args), problem, start)
        shared = options.callback is not None  # it may have kept the state
        solution = conclude(state, options.returns, rows, shared)
        problem.copy_z = state.copies_z
        if not shared:
            state.release()
    if gradient is not None and problem.differentiated:
        solution.z = gradient.attach(problem, solution.z)
    if options.throw and not bool(solution.converged.all()):
        raise ConvergenceError(solution)
    return solution


@compiled.skip
def root(g: Callable[..., Any], z0: Any, args: tuple[Any, ...] = (), **options: Any) -> Solution:
    """Solve g(z, *args) = 0 as the fixed point of z + g(z, *args).

    Takes every option of ``fixed_point``; stops a sample on ||g(z)|| <= atol + rtol ||z + g(z)||.
    """
    check_callable("g", g)
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


def _replayed(problem: Problem, start: Any) -> Solution | None:
    """The solution by a recording; None, with a warning, where there can be none."""
    layout, options = problem.layout, problem.options
    try:
        program = graphs.forward_program(problem)
    except graphs.CannotRecord as reason:
        graphs.warn(options.mode, str(reason))
        return None

    def finish(state: SolverState, evaluations: int | Tensor) -> Solution:
        solution = conclude(state, options.returns, None, shared=True)
        solution.z = pytree.tree_map(torch.clone, solution.z)
        solution.evaluations, solution.mode = evaluations, options.mode
        return solution

    leaves = [start.detach()] if layout.single else [t.detach() for t in pytree.tree_leaves(start)]
    return graphs.replayed(program, leaves, finish)


def _run(
    f: Callable[..., Any], args: tuple[Any, ...], problem: Problem, start: Any
) -> tuple[SolverState, list[Tensor] | None]:
    """Evaluate and step until every sample has stopped; the state, and the recorded residuals."""
    options = problem.options
    state = SolverState(options.solver, start, problem.stopping, backend=options.backend, layout=problem.layout)
    if options.looks:
        return state, _look_on(f, args, state, options)
    with torch.no_grad():
        while not state.done:
            state.step(f(state.z, *args))
    return state, None


def _look_on(f: Callable[..., Any], args: tuple[Any, ...], state: SolverState, options: Options) -> list[Tensor] | None:
    """The loop with what somebody wants to see or do between evaluations; the recorded residuals."""
    compactor = Compactor(state, args, options.compact) if options.compact is not False else None
    rows: list[Tensor] | None = [] if options.trace else None
    bar = progress_bar(options.max_iter) if options.progress else None
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
                if options.callback is not None and state.show(options.callback):
                    break
    finally:
        if bar is not None:
            bar.close()
    return rows


_STATUS_AND_STEPS = int(Int.STATUS), int(Int.STEPS)
_CONVERGED = int(Status.CONVERGED)  # comparing a tensor with an enum takes half as long again


def conclude(state: SolverState, returns: str, rows: list[Tensor] | None, shared: bool) -> Solution:
    """The solution a state has reached; ``shared``: somebody else may step the state further."""
    leaves, residual = state.answer(returns)
    ws, layout = state.ws, state.layout
    counters = ws.ints.clone() if shared else ws.ints
    status, steps = (counters[row, : layout.B] for row in _STATUS_AND_STEPS)
    if layout.N == 0:
        status.fill_(Status.CONVERGED)
        residual = torch.zeros_like(residual)
    elif not state.done:
        status.masked_fill_(status == Status.RUNNING, Status.STOPPED)
    trace = None if rows is None else torch.stack(rows) if rows else residual.new_empty(0, layout.B)
    return Solution(
        z=layout.unflatten(leaves),
        converged=status == _CONVERGED,
        steps=steps,
        residual=residual,
        evaluations=state.nfe,
        status=status,
        trace=trace,
        backend=state.backend,
        counters=counters,
    )
