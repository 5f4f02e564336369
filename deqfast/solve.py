"""``fixed_point`` and ``root``: the loop, written once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import compiled, graphs, transforms
from .called import Called
from .gradients.base import Gradient
from .gradients.choose import choose_gradient
from .loop.compaction import Compactor
from .loop.conclude import conclude, out_of_evaluations, unsolved
from .loop.images import Images, take
from .loop.progress import progress_bar
from .loop.sampled import Sampled
from .loop.state import SolverState
from .naming import check_names
from .ops import contract, grouped
from .ops.codes import Int
from .ops.layout import as_tuples, layout_of
from .options import Options, check_args, check_callable, check_flag
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
    kwargs: Mapping[str, Any] | None = None,
    has_aux: bool = False,
    unpack: bool = False,
    returns: str = "best",
    stop: str = "each",
    batch_dims: int = 1,
    segments: Any = None,
    compact: Any = False,
    trace: bool = False,
    states: Sequence[int] | None = None,
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
            float32, bfloat16, float16 or complex.
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
            finite sample is within tolerance.
        batch_dims: how many leading dims count samples: 1 (default), 0 (the whole state is one: a vector of unknowns,
            the nodes of a graph), 2 (every token of (B, T, ...)), and so on. ``converged``, ``steps`` and ``residual``
            have their shape.
        segments: samples of unequal length as rows of dim 0, one after the other: (rows,) int sample numbers, sorted,
            or offsets (samples + 1,). In place of ``batch_dims``.
        compact: True when f treats samples independently: converged ones are dropped from what f sees, with every
            tensor in args whose dim 0 is that of z0, and one evaluation of all of them at the end confirms it; or a
            pytree of bools shaped like args that says which tensors follow, and is believed.
        trace: record the (nfe, B) residuals.
        states: evaluations, counted from 1, whose answer so far is wanted too: ``Solution.states`` has what ``returns``
            asks for as it was then, in ascending order, copies without a gradient. After the end it is that of the end.
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
    """
    options = Options(
        solver=choose_solver(solver),
        rtol=rtol,
        atol=atol,
        max_iter=max_iter,
        backward=choose_gradient(backward),
        returns=returns,
        stop=stop,
        batch_dims=batch_dims,
        segments=segments,
        compact=compact,
        trace=trace,
        states=states,
        callback=callback,
        throw=throw,
        backend=backend,
        mode=mode,
        progress=progress,
    )
    if unpack is not False:
        f = _unpacked(f, z0, unpack)
    if kwargs is None and not has_aux:
        return solve(f, z0, args, options)
    check_callable("f", f)
    check_flag("has_aux", has_aux)
    called = Called(f, kwargs, has_aux)
    solution = solve(called, z0, args, options)
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
    layout = layout_of(start, options.batch_dims, options.segments, pads=_pads(start, options, gradient))
    problem = Problem(f, args, layout, options, options.stopping(layout.dtype), transformed)
    if gradient is not None and gradient.solves and problem.differentiated:
        return gradient.solve(problem, z0)
    solution = None
    if options.max_iter == 0:
        backend = contract.choose(options.backend, layout.device).name
        solution = unsolved(layout, [t.detach().clone() for t in layout.tensors(start)], backend, options.trace)
        solution.states = [pytree.tree_map(torch.clone, solution.z) for _ in options.states] or None
    elif options.mode != "loop" and layout.B and layout.N:
        solution = _replayed(problem, start)
    if solution is None and not transformed:
        solution = _run(f, args, problem, start)
    elif solution is None:
        with transforms.Outside() as outside:
            solution = _run(outside.inside(f), transforms.values(args), problem, start)
    if isinstance(f, Called):
        f.hold()
    if gradient is not None and problem.differentiated:
        solution.z = gradient.attach(problem, solution.z)
        solution.reports = problem.reports
    if options.throw and not bool(solution.converged.all()):
        raise ConvergenceError(solution)
    return solution


def _pads(start: Any, options: Options, gradient: Gradient | None) -> bool | None:
    """How segments of unequal length are laid out: one block where the loop is differentiated or captured."""
    if options.segments is None or options.mode != "loop" or (gradient is not None and gradient.solves):
        return None
    return grouped.pads(options.backend, start)


_OPTIONS = [name for name, p in inspect.signature(fixed_point).parameters.items() if p.kind is p.KEYWORD_ONLY]


@compiled.skip
def root(g: Callable[..., Any], z0: Any, args: tuple[Any, ...] = (), **options: Any) -> Solution:
    """Solve g(z, *args) = 0 as the fixed point of z + g(z, *args).

    Takes every option of ``fixed_point``; stops a sample on ||g(z)|| <= atol + rtol ||z + g(z)||.
    """
    check_callable("g", g)
    check_names("root", options, _OPTIONS)
    unpack = options.pop("unpack", False)
    if unpack is not False:
        g = _unpacked(g, z0, unpack)
    way = _shifted_beside_aux if options.get("has_aux") is True else _shifted
    return fixed_point(functools.partial(way, g), z0, args, **options)


def _unpacked(f: Callable[..., Any], z0: Any, unpack: object) -> Callable[..., Any]:
    """``f(*z, *args)`` as a function of (z, *args)."""
    check_callable("f", f)
    if check_flag("unpack", unpack) and not isinstance(z0, (tuple, list)):
        raise TypeError(f"unpack=True hands f the entries of a tuple or list, got z0 as {type(z0).__name__}")
    return compiled.through(_spread, f)


@compiled.skip
def _spread(f: Callable[..., Any], z: Any, *args: Any, **kwargs: Any) -> Any:
    return f(*z, *args, **kwargs)


@compiled.skip
def _shifted_beside_aux(g: Callable[..., Any], z: Any, *args: Any, **kwargs: Any) -> Any:
    found = g(z, *args, **kwargs)
    if not isinstance(found, tuple) or len(found) != 2:
        return found  # which is refused where aux is taken off
    return _sum(z, found[0]), found[1]


@compiled.skip
def _shifted(g: Callable[..., Any], z: Any, *args: Any, **kwargs: Any) -> Any:
    return _sum(z, g(z, *args, **kwargs))


@compiled.skip
def _sum(z: Any, value: Any) -> Any:
    expected, got = pytree.tree_structure(z), pytree.tree_structure(value)
    if expected != got and pytree.tree_structure(as_tuples(z)) != pytree.tree_structure(as_tuples(value)):
        raise TypeError(f"g(z) must have the structure of z0, expected {expected}, got {got}")
    pairs = list(zip(pytree.tree_leaves(z), pytree.tree_leaves(value), strict=True))
    for t, v in pairs:
        if not isinstance(v, Tensor) or v.shape != t.shape:
            shape = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"g(z) must have the shape of z0, expected {tuple(t.shape)}, got {shape}")
    return pytree.tree_unflatten([t + v for t, v in pairs], expected)


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
    if options.returns == "next":  # the kernels are to step from the last evaluation too
        rule = rule._replace(max_iter=min(rule.max_iter + 1, 2**31 - 1))
    state = SolverState(
        options.solver, start, rule, backend=options.backend, layout=problem.layout, together=options.stop == "all"
    )
    rows = images = sampled = None
    with torch.no_grad():
        if options.looks:
            rows, images, sampled = _look_on(f, args, state, options)
        else:
            while not state.done:
                state.step(f(state.z, *args))
    shared = options.callback is not None  # it may have kept the state
    solution = conclude(state, options.returns, rows, shared, images)
    if sampled is not None:
        solution.states = sampled.end(problem.layout.tensors(solution.z))
    problem.copy_z = state.copies_z
    if not shared:
        state.release()
    return solution


def _look_on(
    f: Callable[..., Any], args: tuple[Any, ...], state: SolverState, options: Options
) -> tuple[list[Tensor] | None, list[Tensor] | None, Sampled | None]:
    """The loop with what somebody wants to see or do between evaluations: recorded residuals, images, states."""
    compactor = Compactor(state, args, options.compact) if options.compact is not False else None
    images = Images(state) if options.returns == "image" else None
    sampled = Sampled(state, options.states, options.returns, images) if options.states else None
    rows: list[Tensor] | None = [] if options.trace else None
    bar = progress_bar(options.max_iter) if options.progress else None
    lookers = [one for one in (images, sampled) if one is not None]
    leaves: list[Tensor] = []
    which: Tensor | None = None
    try:
        while not (state.done or state.nfe == options.max_iter) or (compactor is not None and compactor.unsure):
            if compactor is None:
                leaves = state.layout.flatten(f(state.z, *args), "f(z)")
                state.advance(leaves, None)
            else:
                leaves, which = compactor.evaluate(f)
            for one in lookers:
                one.look(leaves, which)
            if rows is not None:
                rows.append(torch.where(state.steps == state.nfe, state.residual, float("nan")))
            if bar is not None:
                bar.update()
                bar.set_postfix_str(f"{state.known_running} running", refresh=False)
            if options.callback is not None and state.show(options.callback):
                state.judge(which)
                break
        else:
            if not state.done:  # only with returns="next"
                state.judge(which)
                out_of_evaluations(state)
    finally:
        if bar is not None:
            bar.close()
    if options.returns == "next":
        converged = state.ws.int_row(Int.STATUS) == int(Status.CONVERGED)
        take(state.layout, state.ws.x[state.ws.cur], converged, leaves, which)
    return rows, None if images is None else images.leaves, sampled
