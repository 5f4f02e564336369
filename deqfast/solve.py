"""``fixed_point`` and ``root``: the loop, written once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import compiled, graphs, ranges, transforms
from .called import Called
from .gradients.base import Gradient
from .gradients.choose import choose_gradient
from .log import LOG, telling
from .loop.conclude import conclude, stepping_on, unsolved
from .loop.looking import Seen, look_on
from .loop.state import SolverState
from .ops import contract, grouped
from .ops.layout import Layout, layout_of
from .ops.shared import tell
from .options import Options, check_args, check_callable, check_flag
from .problem import Problem
from .sharded import LocalMap, Placed, is_sharded
from .solution import ConvergenceError, Solution
from .solvers.base import Solver
from .solvers.choose import choose_solver
from .states import RandomStates, States, checked


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
    kwargs: Mapping[str, Any] | None = None,
    has_aux: bool = False,
    unpack: bool = False,
    returns: str = "best",
    stop: str = "each",
    group: Any = None,
    batch_dims: int = 1,
    segments: Any = None,
    compact: Any = False,
    trace: bool = False,
    states: Sequence[int] | States | RandomStates | None = None,
    callback: Callable[[int, SolverState], bool | None] | None = None,
    throw: bool = False,
    backend: str = "auto",
    mode: str = "loop",
    progress: bool = False,
) -> Solution:
    """Solve z = f(z, *args) for every sample of a batch.

    Args:
        f: callable (z, *args) -> same structure, shapes and dtypes as z. The z it receives is valid during the call.
        z0: start: tensor (B, ...) or a tuple, list or dict of tensors that share dim 0 (see ``batch_dims``). float64,
            float32, bfloat16, float16 or complex. DTensors are solved where they are, see ``group``.
        args: tensors or pytrees handed to f after z. Gradients reach them, and whatever f closes over.
        solver: "anderson" (default), "broyden", "picard", or an ``Anderson``, ``Broyden`` or ``Picard`` with options.
        rtol: a sample stops when ||f(z) - z|| <= atol + rtol ||f(z)||. Default by dtype: 1e-8 float64, 1e-4 float32,
            4e-3 float16, 2e-2 bfloat16.
        atol: absolute part of the same, default 0. With rtol = atol = 0 exactly max_iter evaluations are made, unless
            f(z) == z.
        max_iter: evaluations of f at most, default 100. 0 makes none: z0 comes back, its residual unknown (NaN).
        backward: how gradients are made: ``Implicit()`` (None), ``Phantom``, ``OneStep``, ``Unroll``, or "none".
        kwargs: keyword arguments handed to f.
        has_aux: f returns (z, aux). ``Solution.aux`` is that of the last evaluation of the solve, without a graph.
        unpack: z is a tuple or list, and f is called with its entries: f(*z, *args). f returns a tuple or list of them.
        returns: which z: "best" (default), the iterate with the least residual of each sample; "last", the newest;
            "image", f at the best one, for a masked copy an evaluation and no evaluation more; "next", where the solver
            would step from the newest (of a converged sample f there). ``Solution.residual`` is that of the iterate
            that f was evaluated at.
        stop: "each" (default): a sample that is within tolerance is frozen, and judged again when the last one stops;
            where f couples samples it may have to go on. "all": nothing is frozen before the evaluation at which every
            finite sample is within tolerance. "consensus": the same over the ranks of ``group``, each with samples of
            its own, so that all make as many evaluations: for an f that holds collectives.
        group: ranks that share the solve: a ``ProcessGroup`` or a ``DeviceMesh`` of one dim. Every sample is spread
            over them: z0 has this rank's numbers, f returns the same ones of f(z), norms and products are added up. On
            a CPU. With stop="consensus" it is the ranks that stop together, by default all. A z0 of DTensors says by
            its placements what is spread: leave ``group`` out.
        batch_dims: how many leading dims count samples: 1 (default), 0 (the whole state is one: a vector of unknowns,
            the nodes of a graph), 2 (every token of (B, T, ...)), and so on. ``converged``, ``steps`` and ``residual``
            have their shape.
        segments: samples of unequal length as rows of dim 0, one after the other: (rows,) int sample numbers, sorted,
            or offsets (samples + 1,), which is what numbers from 0 to the count of rows are taken for. In place of
            ``batch_dims``.
        compact: converged samples are dropped from what f sees, in the backward solve of ``Implicit`` too, with every
            tensor in args whose dim 0 is that of z0. "auto": if f is seen to treat samples independently, by holding
            f of some rows against f of all before the first are dropped; else the batch stays whole, and
            ``Solution.summary`` says why. True: f does, you say, and no shape of args is ambiguous. Both end with one
            evaluation of all samples that confirms it, where any was dropped. Or a pytree of bools shaped like args
            that says which tensors follow, and is believed. Default False.
        trace: record the (nfe, B) residuals.
        states: evaluations, counted from 1, whose answer so far is wanted too: ``Solution.states`` has what ``returns``
            asks for as it was then, in ascending order, copies without a gradient. After the end it is that of the end.
            ``States(at, of="last")`` has the iterates themselves, or another kind of state than the answer's;
            ``RandomStates`` draws the evaluations at every call.
        callback: called after every evaluation as callback(k, state) with a ``SolverState`` to look at; True stops.
        throw: raise ``ConvergenceError`` unless every sample converged.
        backend: "auto" (default), "native", "triton", "torch" or "reference"; ``python -m deqfast.info`` says what is
            available.
        mode: who runs the loop on a GPU. "loop" (default): Python launches every evaluation of f. "graph": f and the
            step are captured once as a CUDA graph, and a few evaluations replayed at a time. "device": the whole loop
            runs on the GPU. Both give the bits of "loop", may evaluate f a few times more, and run f's Python once per
            shape, not once per evaluation. Where that is impossible the plain loop runs, with a ``ModeWarning`` that
            says why, and ``Solution.mode`` is "loop". Not with trace, states, callback, progress or compact.
        progress: show a tqdm bar of evaluations.

    Returns:
        A ``Solution``. A sample that does not converge is a status, not an error, and never disturbs the others.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came, before any work.
        ConvergenceError: with ``throw=True``.
        RankError: ranks were given what does not fit together, or one of them what cannot be; on every rank.
    """
    try:
        options = Options(
            solver=choose_solver(solver),
            rtol=rtol,
            atol=atol,
            max_iter=max_iter,
            backward=choose_gradient(backward),
            returns=returns,
            stop=stop,
            group=group,
            batch_dims=batch_dims,
            segments=segments,
            compact=compact,
            trace=trace,
            states=checked(states),
            callback=callback,
            throw=throw,
            backend=backend,
            mode=mode,
            progress=progress,
        )
    except (TypeError, ValueError) as error:
        tell(group, stop, error)
        raise
    if unpack is not False:
        f = unpacked(f, z0, unpack)
    run = ranges.around(ranges.SOLVE, _solve_on_mesh if is_sharded(z0) else solve)
    if kwargs is None and not has_aux:
        return run(f, z0, args, options)
    check_callable("f", f)
    check_flag("has_aux", has_aux)
    called = Called(f, kwargs, has_aux)
    solution = run(called, z0, args, options)
    solution.aux = called.newest
    return solution


def solve(f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: Options) -> Solution:
    """``fixed_point`` with options that have been checked."""
    check_callable("f", f)
    check_args(args)
    gradient: Gradient | None = options.backward
    transformed = transforms.active()
    if transformed:
        f = compiled.eager(f)
    start = transforms.values(z0) if transformed else z0
    problem = _problem(f, start, args, options, transformed)
    layout = problem.layout
    if gradient is not None and gradient.solves and problem.differentiated:
        return gradient.solve(problem, z0)
    solution = None
    if options.max_iter == 0:
        solution = _unsolved(layout, start, options)
    elif options.mode != "loop" and layout.B and layout.total:
        solution = _replayed(problem, start)
    if solution is None and not transformed:
        solution = _run(f, args, problem, start)
    elif solution is None:
        with transforms.Outside() as outside:
            solution = _run(outside.inside(f), transforms.values(args), problem, start)
    if isinstance(f, (Called, LocalMap)):
        f.hold()
    if gradient is not None and problem.differentiated:
        solution.z = gradient.attach(problem, solution.z)
        solution.reports = problem.reports
    _tell(options, layout, solution)
    if options.throw and not bool(solution.converged.all()):
        raise ConvergenceError(solution)
    return solution


def _tell(options: Options, layout: Layout, solution: Solution) -> None:
    if telling():
        told = "%s, %d samples of %d numbers, backend %s, mode %s: %s"
        LOG.debug(told, options.solver, layout.B, layout.N, solution.backend, solution.mode, solution.summary())


def _unsolved(layout: Layout, start: Any, options: Options) -> Solution:
    """The solution of ``max_iter=0``."""
    backend = contract.choose(options.backend, layout.device).name
    solution = unsolved(layout, [t.detach().clone() for t in layout.tensors(start)], backend, options.trace)
    if options.states is not None:
        solution.states_at = options.states.draw()
        solution.states = [pytree.tree_map(torch.clone, solution.z) for _ in solution.states_at]
    return solution


def _pads(start: Any, options: Options) -> bool | None:
    """How segments of unequal length are laid out: one block where the loop is differentiated or captured."""
    gradient: Gradient | None = options.backward
    if options.segments is None or options.mode != "loop" or (gradient is not None and gradient.solves):
        return None
    return grouped.pads(options.backend, start)


def _solve_on_mesh(f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: Options) -> Solution:
    placed = Placed(z0, options.batch_dims, options.group, options.stop)
    local = dataclasses.replace(options, group=placed.group)
    solution = solve(LocalMap(f, placed), placed.local(z0), args, local)
    solution.z = placed.of_mesh(solution.z)
    if solution.states is not None:
        solution.states = [placed.of_mesh(state) for state in solution.states]
    return solution


def _problem(f: Callable[..., Any], start: Any, args: tuple[Any, ...], options: Options, transformed: bool) -> Problem:
    try:
        layout = layout_of(start, options.batch_dims, options.segments, pads=_pads(start, options))
        problem = Problem(f, args, layout, options, options.stopping(layout.dtype), transformed)
    except (TypeError, ValueError) as error:
        tell(options.group, options.stop, error)
        raise
    problem.share()
    return problem


def unpacked(f: Callable[..., Any], z0: Any, unpack: object) -> Callable[..., Any]:
    """``f(*z, *args)`` as a function of (z, *args)."""
    check_callable("f", f)
    if check_flag("unpack", unpack) and not isinstance(z0, (tuple, list)):
        raise TypeError(f"unpack=True hands f the entries of a tuple or list, got z0 as {type(z0).__name__}")
    return compiled.through(_spread, f)


@compiled.skip
def _spread(f: Callable[..., Any], z: Any, *args: Any, **kwargs: Any) -> Any:
    return f(*z, *args, **kwargs)


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

    return graphs.replayed(program, [t.detach() for t in layout.tensors(start)], finish)


def _run(f: Callable[..., Any], args: tuple[Any, ...], problem: Problem, start: Any) -> Solution:
    """Evaluate and step until every sample has stopped."""
    options = problem.options
    rule = problem.stopping
    if "next" in (options.returns, options.of) or options.of != options.returns:
        # To keep, besides, what all kinds of answers are made of.
        rule = stepping_on(rule)
    state = SolverState(
        options.solver,
        start,
        rule,
        backend=options.backend,
        layout=problem.layout,
        together=options.stop != "each",
        group=problem.group,
    )
    seen = Seen()
    f = ranges.around(ranges.F, f)
    with torch.no_grad():
        if options.looks:
            seen = look_on(f, args, state, options)
        else:
            while not state.done:
                state.step(f(state.z, *args))
    shared = options.callback is not None  # it may have kept the state
    solution = conclude(state, options.returns, seen.residuals, shared, seen.images)
    if seen.sampled is not None:
        solution.states_at, solution.states = seen.sampled.at, seen.sampled.end(problem.layout.tensors(solution.z))
    problem.copy_z = state.copies_z
    solution.compactable = options.compactable
    if seen.compactor is not None:
        solution.rows = seen.compactor.count
        problem.following = None if seen.compactor.whole or problem.transformed else seen.compactor.following
    if not shared:
        state.release()
    return solution
