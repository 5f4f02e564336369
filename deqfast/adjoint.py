"""The backward solve: u = J^T u + g at a fixed point, once, and differentiably.

``attach`` evaluates f once more, at the solution and with a graph, and returns a fresh tensor whose backward solves the
adjoint equation with vjps of that graph; the engine then carries u through the same graph to whatever f used. That is
right to first order only: the graph hangs on a detached z. A backward with create_graph=True therefore evaluates f
again at the attached solution, and returns the gradients of f's inputs itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge
from torch.autograd.variable import Variable
from torch.utils import _pytree as pytree

from . import compiled, graphs
from .guards import identity
from .linear import LinearOptions, solve_linear, warn_of_failures
from .ops.layout import Layout
from .state import SolverState
from .transforms import forbid

with torch.inference_mode(False), torch.enable_grad():  # whatever mode surrounds the import
    _accumulate_grad = type(torch.zeros((), requires_grad=True).view(()).grad_fn.next_functions[0][0])  # type: ignore
_current_sequence_nr = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]


@dataclass
class Attachment:
    """What one attached solution needs for its backward."""

    f: Callable[..., Any]
    args: tuple[Any, ...]
    layout: Layout
    options: LinearOptions
    copy_z: bool  # f writes into the z that it is given
    tangents: bool  # f uses tensors that carry tangents
    autocast: tuple[bool, torch.dtype]
    z_in: list[Tensor]
    graph: Graph
    inputs: list[Tensor]  # tensors beside z that f's output depends on


class Graph:
    """The graph of one evaluation of f: its outputs as edges, so that f may write to the tensors themselves again."""

    def __init__(self, fz: list[Tensor]) -> None:
        self.which = [i for i, t in enumerate(fz) if t.requires_grad]
        self.tensors: list[Tensor] = [fz[i] for i in self.which]
        self.edges = tuple(torch.autograd.graph.get_gradient_edge(t) for t in self.tensors)
        self.dtypes = [t.dtype for t in self.tensors]

    def vjp(self, u: list[Tensor], inputs: Sequence[Tensor], create_graph: bool = False) -> Sequence[Tensor | None]:
        """The gradients of <u, f(z)> with respect to ``inputs``; the graph is kept."""
        cotangents = [u[i] for i in self.which]
        for i, dtype in enumerate(self.dtypes):
            if cotangents[i].dtype is not dtype:  # autocast made f's output narrower
                cotangents[i] = cotangents[i].to(dtype)
        return gradients(self.edges, cotangents, inputs, create_graph)


def gradients(
    outputs: Sequence[GradientEdge], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], create_graph: bool
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad(..., retain_graph=True, allow_unused=True)``.

    The engine is called directly: the public function's checks cost as much as a small f's vjp, and a backward solve
    makes many.
    """
    keep_graph = True
    return Variable._execution_engine.run_backward(
        tuple(outputs),
        tuple(cotangents),
        keep_graph,
        create_graph,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )


def attach(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    layout: Layout,
    leaves: list[Tensor],
    options: LinearOptions,
    *,
    copy_z: bool = False,
    tangents: bool = False,
) -> list[Tensor]:
    """The leaves of the solution z = f(z, *args), with its gradient; as they are if f depends on nothing else."""
    z_in = [t.detach().requires_grad_() for t in leaves]
    start = _current_sequence_nr()
    device = layout.device.type
    autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    with _autocast(device, autocast) if autocast[0] else _NOTHING:
        fz = _evaluate(f, z_in, args, layout, copy_z)
    graph = Graph(fz)
    if not graph.which:
        return leaves
    leaf_inputs, elsewhere, nodes = frontier(graph.edges, start, z_in)
    # A node written in Python may hide what it uses, as reentrant checkpointing does.
    if not leaf_inputs and not elsewhere and not any(isinstance(node, BackwardCFunction) for node in nodes):
        return leaves
    attachment = Attachment(
        f=f,
        args=args,
        layout=layout,
        options=options,
        copy_z=copy_z,
        tangents=tangents,
        autocast=autocast,
        z_in=z_in,
        graph=graph,
        inputs=leaf_inputs + [t for t in tensors_of(args) if t.requires_grad and not t.is_leaf],
    )
    tensors, graph.tensors = graph.tensors, []
    return list(_Attach.apply(attachment, *tensors, *attachment.inputs))


def _evaluate(
    f: Callable[..., Any], z: list[Tensor], args: tuple[Any, ...], layout: Layout, copy_z: bool
) -> list[Tensor]:
    given = [t.clone() for t in z] if copy_z else z
    return layout.flatten(f(layout.unflatten(given), *args), "f(z)")


_NOTHING = contextlib.nullcontext()


def _autocast(device: str, state: tuple[bool, torch.dtype]) -> contextlib.AbstractContextManager[Any]:
    """The mode in which f was evaluated. Cast parameters are not cached: a cached one hides where it came from."""
    return torch.autocast(device, dtype=state[1], enabled=state[0], cache_enabled=False)


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors in a tuple of arguments, in order."""
    if all(isinstance(a, Tensor) for a in args):
        return list(args)
    return [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]


def frontier(
    edges: Sequence[GradientEdge], start: int, known: Sequence[Tensor], beyond: Sequence[Any] = ()
) -> tuple[list[Tensor], bool, set[Any]]:
    """Where the graph made since ``start`` leaves f: leaf tensors, whether elsewhere too, and the nodes on the way.

    Nodes carry a number that grows within a thread, so the walk ends at what had been computed before f was called.

    Args:
        edges: outputs of f.
        start: number of the first node that belongs to f.
        known: leaves to skip.
        beyond: nodes at which the walk ends without counting them.
    """
    stack: list[Any] = []
    seen: set[Any] = set(beyond)  # holding the nodes keeps their identities from being used again
    leaves: list[Tensor] = []
    elsewhere = False
    following: Any = tuple((edge.node, 0) for edge in edges)
    while True:
        for node, _ in following:
            if node is None or node in seen:
                continue
            seen.add(node)
            if type(node) is _accumulate_grad:
                leaves.append(node.variable)  # type: ignore[union-attr]
            elif node._sequence_nr() < start:
                elsewhere = True
            else:
                stack.append(node)
        if not stack:
            break
        following = stack.pop().next_functions
    leaves = [t for t in leaves if not any(t is k for k in known)]
    return leaves, elsewhere, seen


class _Attach(torch.autograd.Function):
    """Value: the solution. Inputs: f's output there (first order), then what f depends on (second order)."""

    @staticmethod
    def forward(ctx: Any, attachment: Attachment, *tensors: Tensor) -> tuple[Tensor, ...]:
        z_in = attachment.z_in
        attachment.z_in = []  # saved instead, so that the engine frees it
        ctx.save_for_backward(*z_in)
        ctx.set_materialize_grads(False)
        ctx.attachment = attachment
        return tuple(t.clone() for t in z_in)  # storage of its own: writing to it leaves f's graph intact

    @staticmethod
    @compiled.entry()
    def backward(ctx: Any, *g: Tensor | None) -> tuple[Tensor | None, ...]:
        attachment: Attachment = ctx.attachment
        graph, inputs = attachment.graph, attachment.inputs
        z_in = ctx.saved_tensors
        nothing = (None,) * (len(graph.which) + len(inputs))
        if all(t is None for t in g):
            return None, *nothing
        forbid([t for t in g if t is not None], attachment.tangents)
        g_full = [torch.zeros_like(z) if t is None else t for t, z in zip(g, z_in, strict=True)]
        if torch.is_grad_enabled():
            return None, *nothing[: len(graph.which)], *second_order(attachment, z_in, g_full)
        u = None
        if attachment.options.mode != "loop":
            u = _replayed_adjoint(attachment, z_in, g_full)
        if u is None:
            u = solve_adjoint(graph, z_in, g_full, attachment.layout, attachment.options)
        return None, *(u[i] for i in graph.which), *nothing[len(graph.which) :]


def solve_adjoint(
    graph: Graph, z: Sequence[Tensor], g: list[Tensor], layout: Layout, options: LinearOptions
) -> list[Tensor]:
    """Leaves of u = J^T u + g, each sample to the relative tolerance of its own.

    Where a sample does not converge its best iterate is returned, with a ``GradientWarning``.
    """
    return solve_linear(adjoint_map(graph, z, g, layout), adjoint_start(g, layout, options), g, layout, options)


def adjoint_map(graph: Graph, z: Sequence[Tensor], g: list[Tensor], layout: Layout) -> Callable[[Any], Any]:
    """The function u -> J^T u + g."""
    if layout.single:
        g0 = g[0]

        def of_one(u: Any) -> Any:
            (v,) = graph.vjp([u], z)
            return g0 if v is None else v + g0

        return of_one

    def of_tree(u: Any) -> Any:
        vs = graph.vjp(pytree.tree_leaves(u), z)
        return layout.unflatten([b if v is None else v + b for v, b in zip(vs, g, strict=True)])

    return of_tree


def _replayed_adjoint(attachment: Attachment, z: Sequence[Tensor], g: list[Tensor]) -> list[Tensor] | None:
    """``solve_adjoint`` by a recording, which evaluates f once more; None, with a warning, where there can be none."""
    f, layout, options = attachment.f, attachment.layout, attachment.options
    autocast, copy_z = attachment.autocast, attachment.copy_z  # a recording must not keep the attachment's graph
    try:
        tensors, rebuild, rest, others = graphs.split(attachment.args, layout.device)
    except graphs.CannotRecord as reason:
        graphs.warn(options.mode, str(reason))
        return None
    many = len(z)

    def prepare(inputs: list[Tensor]) -> Callable[[Any], Any]:
        at = [t.detach().requires_grad_() for t in inputs[:many]]
        with torch.enable_grad(), _autocast(layout.device.type, autocast):
            graph = Graph(_evaluate(f, at, rebuild(inputs[2 * many :]), layout, copy_z))
        if not graph.which:
            raise graphs.CannotRecord("f does not depend on z")
        return adjoint_map(graph, at, inputs[many : 2 * many], layout)

    def finish(state: SolverState, evaluations: int | Tensor) -> list[Tensor]:
        if options.mode == "graph" and options.rtol > 0 and state.failed():
            warn_of_failures(state, g)
        return [t.clone() for t in state.answer()[0]]

    program = graphs.Program(
        prepare=prepare,
        inputs=[*z, *g, *tensors],
        key=("adjoint", identity(f, layout.device), rest, autocast, copy_z),
        family=graphs.family(f),
        layout=layout,
        solver=options.solver,
        rtol=options.rtol,
        atol=0.0,
        max_iter=options.max_iter,
        keep_best=True,
        backend=options.backend,
        mode=options.mode,
        alive=(f, others),
    )
    start = adjoint_start(g, layout, options)
    return graphs.replayed(program, [t.detach() for t in pytree.tree_leaves(start)], finish)


def adjoint_start(g: list[Tensor], layout: Layout, options: LinearOptions) -> Any:
    """Where a backward solve begins: at its right-hand side, or where the user said."""
    if options.u0 is None:
        return layout.unflatten(g)
    if callable(options.u0):
        return options.u0(g)
    layout.flatten(options.u0, "u0")
    return options.u0


class _Cut(torch.autograd.Function):
    """The identity; while ``gate`` is shut, its backward lets nothing through."""

    @staticmethod
    def forward(ctx: Any, gate: list[bool], t: Tensor) -> Tensor:
        ctx.gate = gate
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor | None]:
        return None, g if ctx.gate[0] else None


def second_order(attachment: Attachment, z_in: Sequence[Tensor], g: list[Tensor]) -> list[Tensor | None]:
    """The gradients of the attached inputs as differentiable functions of them, of the solution and of g.

    They are (df/dinput)^T u with f at the attached solution and with u attached as what it is, the fixed point of
    u -> J^T u + g: the same construction, so that any order works.
    """
    args, layout, options = attachment.args, attachment.layout, replace(attachment.options, u0=None)
    device = layout.device.type
    gate = [False]
    with torch.enable_grad():
        with _autocast(device, attachment.autocast):
            z_out = attach(attachment.f, args, layout, list(z_in), options, copy_z=attachment.copy_z)
        # The engine would follow an input into another one's history, and z into this very node.
        z = [_Cut.apply(gate, t) for t in z_out]
        flat, spec = pytree.tree_flatten(args)
        cut = [_Cut.apply(gate, t) if isinstance(t, Tensor) and t.requires_grad else t for t in flat]
        cut_args = pytree.tree_unflatten(cut, spec)
        shadows = [(t, c) for t, c in zip(flat, cut, strict=True) if t is not c]

        start = _current_sequence_nr()
        with _autocast(device, attachment.autocast):
            graph = Graph(_evaluate(attachment.f, z, cut_args, layout, attachment.copy_z))
        closed_over = _closed_over_leaves(attachment, graph, start, [*z, *(c for _, c in shadows)])
        u_value = solve_adjoint(graph, z, g, layout, attachment.options)
        u = attach(_AdjointMap(attachment), (z, cut_args, g), layout, u_value, options)
        wanted = [c for _, c in shadows] + closed_over
        found = graph.vjp(u, wanted, create_graph=True) if wanted else []
    gate[0] = True
    totals: list[Tensor | None] = [None] * len(attachment.inputs)
    owners = [t for t, _ in shadows] + closed_over
    for owner, grad in zip(owners, found, strict=True):
        for i, t in enumerate(attachment.inputs):
            if t is owner and grad is not None:
                known = totals[i]
                totals[i] = grad if known is None else known + grad
                break
    return totals


class _AdjointMap:
    """u -> J^T u + g as a function of everything it depends on."""

    def __init__(self, attachment: Attachment) -> None:
        self.f, self.layout, self.copy_z = attachment.f, attachment.layout, attachment.copy_z
        self.autocast = attachment.autocast

    def __call__(self, u: Any, z: list[Tensor], args: tuple[Any, ...], g: list[Tensor]) -> Any:
        layout = self.layout
        with torch.enable_grad():
            with _autocast(layout.device.type, self.autocast):
                graph = Graph(_evaluate(self.f, z, args, layout, self.copy_z))
            vs = graph.vjp([u] if layout.single else pytree.tree_leaves(u), z, create_graph=True)
        return layout.unflatten([b if v is None else v + b for v, b in zip(vs, g, strict=True)])


def _closed_over_leaves(attachment: Attachment, graph: Graph, start: int, cut: list[Tensor]) -> list[Tensor]:
    leaves, elsewhere, _ = frontier(graph.edges, start, (), beyond=[t.grad_fn for t in cut])
    if elsewhere:
        raise RuntimeError(
            "differentiating a fixed point twice needs every tensor that f uses and that was itself computed with "
            "gradients; f closes over one: pass it through args= instead"
        )
    # A leaf that was not there the first time is one that f makes itself, the start of an inner solve for example.
    leaves = [t for t in leaves if any(t is known for known in attachment.inputs)]
    if any(t._backward_hooks for t in leaves):
        raise RuntimeError(
            "differentiating a fixed point twice would run the hooks on a parameter that f closes over twice; "
            "remove them, or pass the parameter through args="
        )
    return leaves
