"""What is solved: f with its args bound, the start, the loss and what it is differentiated by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..options import check_args, check_callable, check_samples

Map = Callable[[Any], Any]


class Case:
    """One problem, as everybody solves it.

    Args:
        f: callable (z, *args) -> like z.
        z0: start.
        args: handed to f after z.
        loss: callable z -> a scalar, or None for the mean of |z|^2.
        params: tensors to differentiate the loss by, or None for every leaf that f(z0) hangs on.
        batch_dims: leading dims that count samples.

    Attributes:
        f: of z alone.
        z0: the start, detached.
        params: those tensors; none, and nothing is differentiated.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        z0: Any,
        args: tuple[Any, ...] = (),
        loss: Callable[[Any], Tensor] | None = None,
        params: Iterable[Tensor] | None = None,
        batch_dims: int = 1,
    ) -> None:
        check_callable("f", f)
        check_args(args)
        check_samples(batch_dims, None)
        if loss is not None:
            check_callable("loss", loss)
        leaves = pytree.tree_leaves(z0)
        if not leaves or not all(isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) for t in leaves):
            raise TypeError(f"z0 must be a floating tensor or a tree of them, got {type(z0).__name__}")
        if any(t.dim() < batch_dims for t in leaves):
            raise ValueError(f"z0 must have the {batch_dims} dims of batch_dims, got shape {tuple(leaves[0].shape)}")
        self.f: Map = (lambda z: f(z, *args)) if args else f
        self.z0 = pytree.tree_map(torch.detach, z0)
        self.batch_dims = batch_dims
        self._loss = loss
        self._check_f()
        with torch.no_grad():
            self.loss(self.z0)
        self.params = self._found() if params is None else _checked(params)

    def loss(self, z: Any) -> Tensor:
        """The loss at z, a scalar."""
        if self._loss is None:
            return sum(t.abs().square().mean() for t in pytree.tree_leaves(z))
        value = self._loss(z)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss(z) must be a tensor of one number, got {got}")
        return value

    def norms(self, z: Any) -> Tensor:
        """2-norm of every sample, in float64."""
        squares = [
            t.detach().abs().double().reshape(math.prod(t.shape[: self.batch_dims]), -1).square().sum(1)
            for t in pytree.tree_leaves(z)
        ]
        return torch.stack(squares).sum(0).sqrt()

    def relative(self, z: Any, other: Any) -> float:
        """The worst sample's ||z - other|| / ||z||; infinity where that is no number."""
        gap = self.norms(pytree.tree_map(lambda a, b: a.detach() - b.detach(), as_tuples(z), as_tuples(other)))
        quotient = torch.where(gap == 0, gap, gap / self.norms(z).clamp_min(torch.finfo(torch.float64).tiny))
        worst = float(quotient.max()) if quotient.numel() else 0.0
        return worst if math.isfinite(worst) else math.inf

    def check(self, z: Any, what: str, hint: str = "") -> None:
        """TypeError unless z is like z0."""
        expected, got = pytree.tree_structure(as_tuples(self.z0)), pytree.tree_structure(as_tuples(z))
        if expected != got:
            raise TypeError(f"{what} must return z, structured like z0, got {type(z).__name__}{hint}")
        for t, v in zip(pytree.tree_leaves(self.z0), pytree.tree_leaves(z), strict=True):
            if not isinstance(v, Tensor) or v.shape != t.shape:
                shape = f"shape {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
                raise TypeError(f"{what} must return z, shaped like z0, expected {tuple(t.shape)}, got {shape}{hint}")

    def _check_f(self) -> None:
        with torch.no_grad():
            first, second = self.f(self.z0), self.f(self.z0)
        self.check(first, "f")
        finite = all(bool(torch.isfinite(t).all()) for t in pytree.tree_leaves(first))
        if finite and self.relative(first, second) > 1e-2:
            raise ValueError("f gave another value at the same z: it must be a function, with nothing random inside")

    def _found(self) -> list[Tensor]:
        """The leaves that f(z0) hangs on, and require grad."""
        with torch.enable_grad():
            image = self.f(self.z0)
        found: dict[int, Tensor] = {}
        nodes = [t.grad_fn for t in pytree.tree_leaves(image) if t.grad_fn is not None]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            variable = getattr(node, "variable", None)
            if variable is not None:
                found[id(variable)] = variable
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    nodes.append(following)
        return list(found.values())


def as_tuples(tree: Any) -> Any:
    """The tree with lists as tuples: f may return one for the other."""
    if isinstance(tree, (list, tuple)):
        return tuple(as_tuples(t) for t in tree)
    return {k: as_tuples(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _checked(params: Iterable[Tensor]) -> list[Tensor]:
    found = [params] if isinstance(params, Tensor) else list(params)
    for p in found:
        if not isinstance(p, Tensor) or not p.requires_grad:
            got = "one that does not" if isinstance(p, Tensor) else type(p).__name__
            raise TypeError(f"params must be tensors that require grad, got {got}")
    return found


class Recorded:
    """f, counting its evaluations and vector-Jacobian products, and the worst sample's residual at each."""

    def __init__(self, case: Case, residuals: bool = False) -> None:
        self._case, self._residuals = case, residuals
        self.evaluations = self.products = 0
        self.trace: list[float] = []

    def __call__(self, z: Any) -> Any:
        """Evaluate f."""
        self.evaluations += 1
        image = self._case.f(z)
        if self._residuals:
            with torch.no_grad():
                self.trace.append(self._case.relative(image, z))
        first = pytree.tree_leaves(image)[0]
        if first.requires_grad:
            first.register_hook(self._product)
        return image

    def _product(self, gradient: Tensor) -> None:
        self.products += 1
