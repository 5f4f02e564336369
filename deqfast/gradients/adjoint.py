"""The backward solve: u = J^T u + g at a fixed point, once, and differentiably.

``attach`` evaluates f once more, at the solution and with a graph, and returns a fresh tensor whose backward solves the
adjoint equation with vjps of that graph; the engine then carries u through the same graph to whatever f used. That is
right to first order only: the graph hangs on a detached z. A backward with create_graph=True therefore evaluates f
again at the attached solution, and returns the gradients of f's inputs itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree

from .. import compiled
from ..ops.layout import Layout
from ..transforms import forbid
from . import replay
from .graph import Attachment, Graph, adjoint_map, autocast_as, evaluate, frontier, tensors_of
from .linear import LinearOptions, adjoint_start, solve_linear
from .shrinking import AdjointRows

_current_sequence_nr = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]


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
    with autocast_as(device, autocast) if autocast[0] else _NOTHING:
        fz = evaluate(f, z_in, args, layout, copy_z)
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
        hooked=_saved_by_hooks(),
        inputs=leaf_inputs + [t for t in tensors_of(args) if t.requires_grad and not t.is_leaf],
    )
    tensors, graph.tensors = graph.tensors, []
    return list(_Attach.apply(attachment, *tensors, *attachment.inputs))


_NOTHING = contextlib.nullcontext()


def _saved_by_hooks() -> bool:
    """Whether hooks on saved tensors are in force, as under non-reentrant checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


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
            u = replay.replayed_adjoint(attachment, z_in, g_full)
        if u is None:
            solved, at = another_graph(attachment, z_in) if attachment.hooked else (graph, z_in)
            u = solve_adjoint(solved, at, g_full, attachment.layout, attachment.options, attachment)
        return None, *(u[i] for i in graph.which), *nothing[len(graph.which) :]


def solve_adjoint(
    graph: Graph,
    z: Sequence[Tensor],
    g: list[Tensor],
    layout: Layout,
    options: LinearOptions,
    attachment: Attachment | None = None,
) -> list[Tensor]:
    """Leaves of u = J^T u + g, each sample to the relative tolerance of its own.

    Where a sample does not converge its best iterate is returned, with a ``GradientWarning``. ``attachment``: whose
    adjoint it is, where the options let the batch shrink.
    """
    whole, rows = adjoint_map(graph, z, g, layout), None
    if attachment is not None and options.following is not None:
        rows = AdjointRows(attachment, z, g, whole, options.following)
    return solve_linear(whole, adjoint_start(g, layout, options), g, layout, options, rows)


def another_graph(attachment: Attachment, z_in: Sequence[Tensor]) -> tuple[Graph, list[Tensor]]:
    """The graph of one more evaluation, and the z that it is of.

    For vjps where hooks decide what the first evaluation saved: checkpointing would make it anew at each of them.
    """
    z = [t.detach().requires_grad_() for t in z_in]
    with torch.enable_grad(), autocast_as(attachment.layout.device.type, attachment.autocast):
        return Graph(evaluate(attachment.f, z, attachment.args, attachment.layout, attachment.copy_z)), z


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
    args, layout = attachment.args, attachment.layout
    options = replace(attachment.options, u0=None, tell=None, watch=None)
    device = layout.device.type
    gate = [False]
    with torch.enable_grad():
        with autocast_as(device, attachment.autocast):
            z_out = attach(attachment.f, args, layout, list(z_in), options, copy_z=attachment.copy_z)
        # The engine would follow an input into another one's history, and z into this very node.
        z = [_Cut.apply(gate, t) for t in z_out]
        flat, spec = pytree.tree_flatten(args)
        cut = [_Cut.apply(gate, t) if isinstance(t, Tensor) and t.requires_grad else t for t in flat]
        cut_args = pytree.tree_unflatten(cut, spec)
        shadows = [(t, c) for t, c in zip(flat, cut, strict=True) if t is not c]

        start = _current_sequence_nr()
        with autocast_as(device, attachment.autocast):
            graph = Graph(evaluate(attachment.f, z, cut_args, layout, attachment.copy_z))
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
            with autocast_as(layout.device.type, self.autocast):
                graph = Graph(evaluate(self.f, z, args, layout, self.copy_z))
            vs = graph.vjp(layout.tensors(u), z, create_graph=True)
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
