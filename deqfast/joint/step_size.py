"""A step of the input for ``joint_solve``: one over the curvature of the cost, by power iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import compiled, transforms
from ..gradients.implicit import Implicit
from ..gradients.linear import GradientWarning
from ..ops.layout import Layout
from ..options import check_args, check_callable, check_flag, check_int
from ..solve import fixed_point
from ..warning import warn
from .problem import check_alike, check_cost, ordinary


@compiled.entry("f", "loss")
def joint_step_size(
    f: Callable[..., Any],
    loss: Callable[..., Any],
    z0: Any,
    x0: Any,
    args: tuple[Any, ...] = (),
    *,
    iterations: int = 8,
    per_sample: bool = False,
    rtol: float | None = None,
    max_iter: int = 100,
    backend: str = "auto",
) -> Any:
    """A ``step_size`` for ``joint_solve``: 1/L, with L the curvature of x -> loss(z*(x), x) at ``x0``.

    L is the largest absolute eigenvalue of the Hessian, found by power iteration on products with it, which
    differentiate twice through the fixed point: one forward and one backward solve, then two linear solves an
    iteration. Power iteration approaches L from below; eight iterations usually come within a fifth. The curvature is
    that at ``x0``: where it grows along the way, take a fraction of the step. With ``normalize=True`` the step is a
    length, and this is no help.

    Args:
        f: as in ``joint_solve``, differentiable twice.
        loss: as in ``joint_solve``, differentiable twice.
        z0: start of the state.
        x0: where the curvature is measured, the start of the input.
        args: handed to f and loss after x.
        iterations: of the power method, default 8.
        per_sample: False (default): one number, for the largest curvature of the batch. True: tensors (B, 1, ...) that
            broadcast to x0, structured like it, a step for each sample; a sample whose curvature is 0 or no number gets
            the batch's, which leaves such samples out too.
        rtol: relative tolerance of every solve, default that of the dtype.
        max_iter: evaluations at most of every solve, default 100.
        backend: as in ``fixed_point``.

    Returns:
        A float, or tensors with ``per_sample=True``; either may be given to ``joint_solve(step_size=...)``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; loss does not return (B,), or is
            without finite, positive curvature in x (linear, for example).
        NotImplementedError: within torch.func transforms or forward mode.

    Warns:
        GradientWarning: the fixed point at x0 was not found, or a linear solve fell short.
    """
    _check(f, loss, args, iterations, per_sample)
    if transforms.active():
        raise NotImplementedError("joint_step_size within torch.func transforms or forward mode")
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            z0, x0, args = ordinary((z0, x0, args))
            return joint_step_size(
                f, loss, z0, x0, args, iterations=iterations, per_sample=per_sample, rtol=rtol, max_iter=max_iter,
                backend=backend,
            )  # fmt: skip
    loss = compiled.eager(loss)
    z_layout, x_layout = Layout(z0, "z0"), Layout(x0, "x0")
    check_alike(z_layout, x_layout)
    if not x_layout.B or not x_layout.N:
        raise ValueError(f"x0 must hold a number to step, got {x_layout.B} samples of {x_layout.N} numbers")
    # Batches that hold the same sample must agree on it: every sample starts from the same direction.
    generator = torch.Generator().manual_seed(0)
    x = [t.detach().clone().requires_grad_() for t in pytree.tree_leaves(x0)]
    v = [torch.randn(t.shape[1:], generator=generator).to(t).expand_as(t) for t in x]
    with torch.enable_grad():
        gradient = _gradient(f, loss, z0, x_layout.unflatten(x), x, args, rtol, max_iter, backend)
        curvature, v = _norm(v), _unit(v)
        for _ in range(iterations):
            found = torch.autograd.grad(gradient, x, v, retain_graph=True, allow_unused=True)
            image = [torch.zeros_like(t) if g is None else g for t, g in zip(x, found, strict=True)]
            curvature, v = _norm(image), _unit(image)
    known = torch.isfinite(curvature)
    largest = float(torch.where(known, curvature, 0.0).max())
    if not bool(known.any()):
        raise ValueError("loss(z*(x), x) must have a finite curvature in x, got none that is a number at x0")
    if not largest > 0:
        raise ValueError("loss(z*(x), x) must have positive curvature in x, got 0; is it linear in x?")
    if not per_sample:
        return 1 / largest
    rate = 1 / torch.where(known & (curvature > 0), curvature, largest)
    return x_layout.unflatten([rate.view(-1, *[1] * (t.dim() - 1)).to(t.dtype) for t in x])


def _check(f: Any, loss: Any, args: Any, iterations: Any, per_sample: Any) -> None:
    check_callable("f", f)
    check_callable("loss", loss)
    check_args(args, example="a")
    check_int("iterations", iterations)
    check_flag("per_sample", per_sample)


def _gradient(
    f: Any,
    loss: Any,
    z0: Any,
    x_tree: Any,
    x: list[Tensor],
    args: tuple[Any, ...],
    rtol: Any,
    max_iter: int,
    backend: str,
) -> list[Tensor]:
    """The gradient of loss(z*(x), x) in x, with its graph, zeros where loss ignores a tensor of x."""
    backward = Implicit(rtol=rtol, max_iter=max_iter)
    solution = fixed_point(f, z0, (x_tree, *args), rtol=rtol, max_iter=max_iter, backward=backward, backend=backend)
    failed = int((~solution.converged).sum())
    if failed:
        text = f"f's fixed point at x0 was not found for {failed} of {len(solution.converged)} samples"
        warn(f"{text}; the curvature there is a guess", GradientWarning)
    z = solution.z
    cost = loss(z, x_tree, *args)
    check_cost(cost, (x[0].shape[0],))
    found = torch.autograd.grad(cost.sum(), x, create_graph=True, allow_unused=True) if cost.requires_grad else [None]
    if all(g is None for g in found):
        raise ValueError("loss(z*(x), x) must depend on x through autograd, got one that does not")
    # The product with zero joins the graph: a gradient that is constant has the second derivative 0.
    return [0 * t if g is None else g + 0 * t for t, g in zip(x, found, strict=True)]


def _norm(v: list[Tensor]) -> Tensor:
    rows = [t.detach().reshape(t.shape[0], -1).double().square().sum(1) for t in v]
    return torch.stack(rows).sum(0).sqrt()


def _unit(v: list[Tensor]) -> list[Tensor]:
    size = _norm(v)
    scale = torch.where(size > 0, 1 / size, 0.0)
    return [t.detach() * scale.view(-1, *[1] * (t.dim() - 1)).to(t.dtype) for t in v]
