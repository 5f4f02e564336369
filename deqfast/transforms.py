"""Forward mode and torch.func transforms: what surrounds a call, and the values inside its tensors.

Inside a transform tensors are wrappers, without memory that a kernel could read. The solver sees the values inside
them. One transform at a time: what would need a derivative of a derivative raises.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack, temporarily_restore_interpreter_stack
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

_functorch = torch._C._functorch
in_functorch = torch._C._are_functorch_transforms_active
no_tangents = forward_ad._set_fwd_grad_enabled

_NO_VMAP = (
    "torch.func.vmap over a fixed point is not supported (nor jacrev, jacfwd, hessian or is_grads_batched, which use "
    "it): samples of a batch are solved independently already, so put the mapped dimension into dim 0 of z0"
)
ONE_TRANSFORM = "{} through a fixed point is not supported; use torch.autograd.grad(..., create_graph=True)"


def nested() -> bool:
    """Whether one torch.func transform surrounds another."""
    return in_functorch() and (_functorch.maybe_current_level() or 0) > 1


def in_jvp() -> bool:
    """Whether the innermost torch.func transform is jvp."""
    return in_functorch() and _functorch.peek_interpreter_stack().key() == _functorch.TransformType.Jvp


def active() -> bool:
    """Whether a torch.func transform or a forward-mode level surrounds this call."""
    return in_functorch() or forward_ad._current_level >= 0


def forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


def forbid(g: list[Tensor], tangents: bool = False) -> None:
    """Raise where a backward solve would see no more than the values of ``g``, or of an f with ``tangents``."""
    if any(_functorch.is_legacy_batchedtensor(t) for t in g) or (
        in_functorch() and any(_functorch.is_batchedtensor(t) for t in g)
    ):
        raise NotImplementedError(_NO_VMAP)
    # The level is one for all threads: that it is open says nothing about these tensors.
    if forward_ad._current_level >= 0 and (tangents or have_tangents(g)):
        raise NotImplementedError(ONE_TRANSFORM.format("forward mode over reverse mode"))


def have_tangents(tensors: list[Tensor]) -> bool:
    """Whether one of the tensors carries a tangent."""
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def value(t: Any) -> Any:
    """The tensor inside the wrappers of all surrounding transforms, without tangent.

    Raises:
        NotImplementedError: one of them is vmap.
    """
    if forward_ad._current_level >= 0 and isinstance(t, Tensor):
        t = forward_ad.unpack_dual(t).primal
    while isinstance(t, Tensor) and _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            raise NotImplementedError(_NO_VMAP)
        t = _functorch.get_unwrapped(t)
    return t


def values(tree: Any) -> Any:
    """``value`` of every leaf."""
    return pytree.tree_map(value, tree)


class Outside:
    """Where the solver runs: no torch.func level (there, even new tensors are wrappers) and no tangents.

    F is evaluated ``inside`` again.
    """

    def __enter__(self) -> Outside:
        with ExitStack() as stack:
            self._levels = stack.enter_context(temporarily_clear_interpreter_stack())
            stack.enter_context(no_tangents(False))
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._leave.__exit__(*error)

    def inside(self, f: Callable[..., Any], tangents: bool = False) -> Callable[..., Any]:
        """F for a caller outside: evaluated among the levels that were left, its result unwrapped."""

        def evaluate(*args: Any) -> Any:
            with temporarily_restore_interpreter_stack(self._levels), no_tangents(tangents):
                return values(f(*args))

        return evaluate


class _Once(torch.autograd.Function):
    """The identity on its first input; whoever differentiates it is told why that would be wrong."""

    @staticmethod
    def forward(t: Tensor, *depends_on: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        raise NotImplementedError(ONE_TRANSFORM.format("a second derivative by torch.func or forward mode"))


def once(t: Tensor, depends_on: list[Tensor]) -> Tensor:
    """``t``; an error for whoever differentiates it, where it depends on what can be differentiated."""
    return _Once.apply(t, *depends_on) if any(d.requires_grad for d in depends_on) else t
