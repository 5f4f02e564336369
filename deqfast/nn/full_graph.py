"""A layer as one operation, so that torch.compile(fullgraph=True) holds it."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import compiled
from ..gradients.choose import choose_gradient
from ..gradients.graph import frontier
from ..gradients.implicit import Implicit
from ..solve import fixed_point
from . import DEQ

_LAYERS: WeakValueDictionary[str, FullGraph] = WeakValueDictionary()
# The loop looks at data, which no recorded CUDA graph can.
_TAGS = (torch.Tag.cudagraph_unsafe,)


class FullGraph(nn.Module):
    """A ``DEQ`` that ``torch.compile(fullgraph=True)`` takes, as one operation with a backward of its own.

    ``torch.compile(dq.nn.FullGraph(dq.DEQ(cell)), fullgraph=True)`` holds the solve in its graph.
    Outside of a compiled graph it is the layer itself. In one, the operation ``deqfast::solve`` makes the solve, and
    ``deqfast::solve_backward`` evaluates the cell once more and solves for the gradient. The cell runs eagerly in
    both, unless it came out of ``torch.compile`` itself: then the solve evaluates its graph.

    Args:
        layer: its cell a module, its ``backward`` an ``Implicit`` or "none". What the cell needs gradients of must be
            its parameters, x or args: a compiled graph sees no other tensor.

    In a compiled graph x, args and z0 are tensors, there is no autocast, and no second derivative.

    Raises:
        TypeError: ``layer`` is no ``DEQ``, its cell no module, or its gradient another one.
        RuntimeError: in backward, the cell uses another tensor that requires gradients.
    """

    def __init__(self, layer: DEQ) -> None:
        super().__init__()
        if not isinstance(layer, DEQ):
            raise TypeError(f"layer must be a dq.DEQ, got {type(layer).__name__}")
        if not isinstance(layer.cell, nn.Module):
            raise TypeError(
                "FullGraph needs a cell that is an nn.Module, whose parameters it can hand to the graph, got "
                f"{type(layer.cell).__name__}: make it one, or leave out fullgraph=True"
            )
        gradient = choose_gradient(layer.options.get("backward"))
        if gradient is not None and not isinstance(gradient, Implicit):
            raise TypeError(
                f"FullGraph needs backward=dq.Implicit() or 'none', got {type(gradient).__name__}: others "
                "differentiate evaluations, which one operation hides; leave out fullgraph=True"
            )
        self.layer = layer
        self._register()

    def _register(self) -> None:
        self.key = uuid.uuid4().hex  # a string, which the tracer takes as a constant
        _LAYERS[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which is a layer of its own."""
        super().__setstate__(state)
        self._register()

    def forward(self, x: Any, *args: Any, z0: Any = None) -> Any:
        """The equilibrium z for input x, as of ``DEQ``."""
        if not torch.compiler.is_compiling():
            return self.layer(x, *args, z0=z0)
        cell = self.layer.cell
        if z0 is None:
            z0 = cell.init(x) if hasattr(cell, "init") else torch.zeros_like(x)
        given = [x, *args]
        for t in (z0, *given):
            if not isinstance(t, Tensor):
                raise TypeError("dq.nn.FullGraph takes tensors alone in a compiled graph: leave out fullgraph=True")
        if torch.is_autocast_enabled(z0.device.type):
            raise RuntimeError("dq.nn.FullGraph cannot be compiled under autocast: leave out fullgraph=True")
        parameters = [p for _, p in self.layer.named_parameters()]
        wanted = [t.requires_grad for t in (*given, *parameters)]
        return torch.ops.deqfast.solve(self.key, z0, given, parameters, wanted)

    def _value(self, z0: Tensor, args: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """The solution without a gradient."""
        given = dict(zip(self._names(), parameters, strict=True))
        with torch.no_grad():
            return functional_call(self.layer, given, tuple(args), {"z0": z0})

    def _gradients(
        self, z: Tensor, args: Sequence[Tensor], parameters: Sequence[Tensor], wanted: Sequence[bool], g: Tensor
    ) -> list[Tensor]:
        """Those of the ``wanted`` among args and parameters, in order, for the gradient ``g`` of the solution z."""
        inputs = [t.detach() for t in (*args, *parameters)]
        sought = [t.requires_grad_() for t, want in zip(inputs, wanted, strict=True) if want]
        cell: Any = compiled.eager(self.layer.cell)
        prefix = "cell." if cell is self.layer.cell else "cell._orig_mod."
        given = dict(zip((name.removeprefix(prefix) for name in self._names()), inputs[len(args) :], strict=True))

        def f(z: Tensor, *rest: Any, **kwargs: Any) -> Any:
            return functional_call(cell, given, (z, *rest), kwargs)

        options = dict(self.layer.options)
        gradient = choose_gradient(options.pop("backward", None))
        if not isinstance(gradient, Implicit):
            raise RuntimeError("the layer has backward='none', so that nothing is to be differentiated")
        if gradient.max_iter is None and options.get("max_iter"):
            gradient = dataclasses.replace(gradient, max_iter=options["max_iter"])
        for name in ("states", "trace", "callback", "throw", "progress", "compact", "returns", "mode"):
            options.pop(name, None)  # what the forward solve was asked for
        with torch.enable_grad():
            # No evaluation of the loop: the solution is there, its gradient is not.
            attached = fixed_point(f, z, tuple(inputs[: len(args)]), **{**options, "max_iter": 0, "backward": gradient})
            if not attached.z.requires_grad:
                return [torch.zeros_like(t) for t in sought]
            edge = torch.autograd.graph.get_gradient_edge(attached.z)
            if frontier([edge], 0, [*sought, *_evaluated_at(attached.z)])[0]:
                raise RuntimeError(
                    "the cell uses a tensor that requires gradients and is none of its parameters nor arguments, which "
                    "a compiled graph of dq.nn.FullGraph cannot see: pass it through args, or leave out fullgraph=True"
                )
            found = torch.autograd.grad(attached.z, sought, g, allow_unused=True)
        return [torch.zeros_like(t) if v is None else _like(t, v) for t, v in zip(sought, found, strict=True)]

    def _names(self) -> list[str]:
        return [name for name, _ in self.layer.named_parameters()]


def _evaluated_at(z: Tensor) -> Sequence[Tensor]:
    """The leaves of the evaluation behind an attached z."""
    node: Any = z.grad_fn
    while not hasattr(node, "attachment"):
        node = node.next_functions[0][0]
    return node.saved_tensors


def _like(t: Tensor, value: Tensor) -> Tensor:
    """``value`` in memory of its own laid out as that of t: what the compiler has been told."""
    return torch.empty_like(t).copy_(value)


@contextmanager
def _outside_of_an_operation() -> Iterator[None]:
    """What an operation calls is again seen by autograd; the dispatcher leaves that out below one."""
    keys = torch._C.DispatchKey
    hidden = torch._C.DispatchKeySet(keys.AutogradFunctionality) | torch._C.DispatchKeySet(keys.ADInplaceOrView)
    exclude = torch._C._dispatch_tls_local_exclude_set() - hidden
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
        yield


def _layer(key: str) -> FullGraph:
    layer = _LAYERS.get(key)
    if layer is None:
        raise RuntimeError("this graph was compiled for a dq.nn.FullGraph that is gone: compile it again")
    return layer


@torch.library.custom_op("deqfast::solve", mutates_args=(), tags=_TAGS)
def _solve(key: str, z0: Tensor, args: list[Tensor], parameters: list[Tensor], wanted: list[bool]) -> Tensor:
    with _outside_of_an_operation():
        return _like(z0, _layer(key)._value(z0, args, parameters))


@torch.library.custom_op("deqfast::solve_backward", mutates_args=(), tags=_TAGS)
def _backward(
    key: str, z: Tensor, args: list[Tensor], parameters: list[Tensor], wanted: list[bool], g: Tensor
) -> list[Tensor]:
    with _outside_of_an_operation():
        return _layer(key)._gradients(z, args, parameters, wanted, g)


@_solve.register_fake
def _(key: str, z0: Tensor, args: list[Tensor], parameters: list[Tensor], wanted: list[bool]) -> Tensor:
    return torch.empty_like(z0)


@_backward.register_fake
def _(key: str, z: Tensor, args: list[Tensor], parameters: list[Tensor], wanted: list[bool], g: Tensor) -> list[Tensor]:
    return [torch.empty_like(t) for t, want in zip((*args, *parameters), wanted, strict=True) if want]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.key, _, args, parameters, ctx.wanted = inputs
    ctx.args = len(args)
    ctx.save_for_backward(output, *args, *parameters)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    z, *inputs = ctx.saved_tensors
    args, parameters = inputs[: ctx.args], inputs[ctx.args :]
    found = iter(torch.ops.deqfast.solve_backward(ctx.key, z, args, parameters, ctx.wanted, g))
    grads = [next(found) if want else None for want in ctx.wanted]
    return None, None, grads[: ctx.args], grads[ctx.args :], None


_solve.register_autograd(_differentiate, setup_context=_keep)
