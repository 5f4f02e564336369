"""The graph of one evaluation of f, its vjps, and where it leaves f."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.autograd.variable import Variable
from torch.utils import _pytree as pytree

from ..ops.layout import Layout
from ..ops.samples import FIRST_DIM
from .linear import LinearOptions

with torch.inference_mode(False), torch.enable_grad():  # whatever mode surrounds the import
    _accumulate_grad = type(torch.zeros((), requires_grad=True).view(()).grad_fn.next_functions[0][0])  # type: ignore


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


def evaluate(
    f: Callable[..., Any], z: list[Tensor], args: tuple[Any, ...], layout: Layout, copy_z: bool
) -> list[Tensor]:
    """The leaves of f at z."""
    given = [t.clone() for t in z] if copy_z else z
    return layout.flatten(f(layout.unflatten(given), *args), "f(z)")


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
    hooked: bool  # hooks on saved tensors were in force
    inputs: list[Tensor]  # tensors beside z that f's output depends on


def autocast_as(device: str, state: tuple[bool, torch.dtype]) -> contextlib.AbstractContextManager[Any]:
    """The mode in which f was evaluated. Cast parameters are not cached: a cached one hides where it came from."""
    return torch.autocast(device, dtype=state[1], enabled=state[0], cache_enabled=False)


def adjoint_map(graph: Graph, z: Sequence[Tensor], g: list[Tensor], layout: Layout) -> Callable[[Any], Any]:
    """The function u -> J^T u + g."""
    if layout.single and layout.samples is FIRST_DIM:
        g0 = g[0]

        def of_one(u: Any) -> Any:
            (v,) = graph.vjp([u], z)
            return g0 if v is None else v + g0

        return of_one

    def of_tree(u: Any) -> Any:
        vs = graph.vjp(layout.tensors(u), z)
        return layout.unflatten([b if v is None else v + b for v, b in zip(vs, g, strict=True)])

    return of_tree


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
