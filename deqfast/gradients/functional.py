"""Derivatives of a fixed point inside transforms: torch.func.vjp of f at the solution, and tangents by dual numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import compiled
from ..ops.layout import Layout
from ..transforms import (
    ONE_TRANSFORM,
    Outside,
    forbid,
    forward_mode,
    in_functorch,
    in_jvp,
    nested,
    no_tangents,
    once,
    value,
)
from . import adjoint
from .linear import LinearOptions, adjoint_start, solve_linear


def attach(
    f: Callable[..., Any], args: tuple[Any, ...], layout: Layout, leaves: list[Tensor], options: LinearOptions
) -> list[Tensor]:
    """The leaves of the solution, with gradient and tangent, inside transforms."""
    if nested():
        raise NotImplementedError(ONE_TRANSFORM.format("a torch.func transform inside another one"))
    leaves = [t.detach() for t in leaves]
    functional = in_functorch()
    forward = forward_mode() and (in_jvp() or not functional)
    tangent = _solve_tangent(f, args, layout, leaves, options) if forward else None
    if torch.is_grad_enabled():
        # Tangents from outside a torch.func.grad are refused, so they must be there to be seen.
        with no_tangents(functional and not in_jvp()):
            if functional:
                leaves = _attach_in_functorch(f, args, layout, leaves, options)
            else:
                has_tangent = tangent is not None
                leaves = adjoint.attach(f, args, layout, leaves, options, copy_z=True, tangents=has_tangent)
    if tangent is None:
        return leaves
    return [forward_ad.make_dual(t, v) for t, v in zip(leaves, tangent, strict=True)]


def _solve_tangent(
    f: Callable[..., Any], args: tuple[Any, ...], layout: Layout, leaves: list[Tensor], options: LinearOptions
) -> list[Tensor] | None:
    """The leaves of v = J v + t, where t is the tangent that f's other inputs give it; None if they give none."""

    def tangent_map(v: list[Tensor] | None) -> tuple[list[Tensor | None], list[Tensor]]:
        z = [t.clone() for t in leaves] if v is None else list(map(forward_ad.make_dual, leaves, v))
        fz = layout.flatten(f(layout.unflatten(z), *args), "f(z)")
        return [value(forward_ad.unpack_dual(t).tangent) for t in fz], fz

    found, fz = tangent_map(None)
    if all(t is None for t in found):
        return None
    known = [None if t is None else t.detach() for t in found]

    def step(z: Any) -> Any:
        found, _ = tangent_map(layout.tensors(z))
        return layout.unflatten([torch.zeros_like(z) if t is None else t for t, z in zip(found, leaves, strict=True)])

    with Outside() as outside:
        filled = [torch.zeros_like(z) if t is None else t.to(z.dtype) for t, z in zip(known, leaves, strict=True)]
        start = layout.unflatten(filled)
        solved = solve_linear(outside.inside(step, True), start, filled, layout, replace(options, u0=None, tell=None))
    if not torch.is_grad_enabled():
        return solved
    plain = [value(t) for t in fz]
    with no_tangents(False):
        return [once(v, plain) for v in solved]


class _Pullback:
    """What a backward inside transforms needs."""

    def __init__(self, vjp: Callable[..., Any], layout: Layout, leaves: list[Tensor], options: LinearOptions) -> None:
        self.vjp = vjp
        self.layout = layout
        self.leaves = leaves
        self.options = options
        self.plain: list[Tensor] = []

    def solve(self, g: list[Tensor]) -> list[Tensor]:
        """The leaves of u = J^T u + g."""
        layout, options = self.layout, self.options

        with Outside() as outside:
            vjp = outside.inside(lambda u: self.vjp(u)[0])

            def step(z: Any) -> Any:
                u = [t.to(p.dtype) for t, p in zip(layout.tensors(z), self.plain, strict=True)]
                vs = layout.tensors(vjp(layout.unflatten(u)))
                return layout.unflatten([v + b for v, b in zip(vs, g, strict=True)])

            return solve_linear(step, adjoint_start(g, layout, options), g, layout, options)


def _attach_in_functorch(
    f: Callable[..., Any], args: tuple[Any, ...], layout: Layout, leaves: list[Tensor], options: LinearOptions
) -> list[Tensor]:
    fz, vjp = torch.func.vjp(lambda z: f(z, *args), layout.unflatten([t.clone() for t in leaves]))  # type: ignore[misc]
    pullback = _Pullback(vjp, layout, leaves, options)
    return list(_Attach.apply(pullback, *layout.flatten(fz, "f(z)")))


class _Attach(torch.autograd.Function):
    """The solution, attached to f's output there, in the form that torch.func understands."""

    @staticmethod
    def forward(pullback: _Pullback, *fz: Tensor) -> tuple[Tensor, ...]:
        pullback.plain = list(fz)
        return tuple(t.clone() for t in pullback.leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.pullback = inputs[0]

    @staticmethod
    @compiled.entry()
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        forbid(list(g))
        plain = ctx.pullback.plain
        u = ctx.pullback.solve([value(t).detach() for t in g])
        return None, *(once(t, plain) for t in u)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(ONE_TRANSFORM.format("forward mode over reverse mode"))
