"""``ICNN``: a network that is convex in its input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..options import check_callable, check_int

__all__ = ["ICNN", "value_and_gradient"]


def softplus(a: Tensor) -> Tensor:
    """log(1 + exp(a)), convex to rounding: torch's own threshold of 20 would leave a step of 2e-9."""
    return functional.softplus(a, threshold=40.0)


class ICNN(nn.Module):
    """The input-convex network g of Amos, Xu and Kolter (ICML 2017): g(z) is a number a sample, convex in z.

    With activation s and L hidden layers:

    ::

        h_1 = s(A_0 z + b_0)
        h_(i+1) = s(P_i h_i + A_i z + b_i)
        g(z) = p h_L + a z + c

    ``P_i`` and ``p`` are not negative: softplus of a raw parameter, over the number of inputs of the layer, so that no
    step of an optimiser leaves the set and no weight is stuck at its edge. A and a are free: they are the skip
    connections. With s convex and nondecreasing, g is convex.

    ::

        potential = dq.nn.ICNN(8, hidden=(32, 32))
        value = potential(torch.randn(5, 8))  # (5,)

    Args:
        features: N, the numbers of a sample.
        hidden: width of each hidden layer, at least one.
        activation: elementwise, convex, nondecreasing, and smooth where a gradient of a gradient is wanted; None is
            softplus, whose gradient is taken in closed form. Another one is looked at between -20 and 20.

    Raises:
        TypeError, ValueError: a width below one, or an activation that is seen to be neither convex nor nondecreasing.
    """

    def __init__(
        self,
        features: int,
        hidden: Iterable[int] = (64, 64),
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.features = check_int("features", features)
        self.hidden = tuple(check_int("a width in hidden", width) for width in hidden)
        if not self.hidden:
            raise ValueError("hidden must name at least one width, got none")
        self.activation: Any = softplus if activation is None else _check_activation(activation)
        self.skips = nn.ModuleList(nn.Linear(self.features, width) for width in (*self.hidden, 1))
        pairs = zip((*self.hidden[1:], 1), self.hidden, strict=True)
        self.raw = nn.ParameterList(nn.Parameter(torch.empty(pair)) for pair in pairs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew; the weights of a row of P add up to about one."""
        for skip in self._layers():
            skip.reset_parameters()
        for raw in self.raw:
            nn.init.uniform_(raw, -0.5, 1.5)

    def path(self) -> list[Tensor]:
        """The weights P_1, ..., P_(L-1) (out, in) and p (1, in) that act on hidden layers; none is negative."""
        return [softplus(raw) / raw.shape[1] for raw in self.raw]

    def forward(self, z: Tensor) -> Tensor:
        """g(z), (B,), for z (B, N)."""
        self._check(z)
        first, *skips = self._layers()
        h = first(z)
        for weight, skip in zip(self.path(), skips, strict=True):
            h = functional.linear(self.activation(h), weight) + skip(z)
        return h.squeeze(-1)

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """g(z), (B,), and its gradient in z, (B, N), both differentiable, under ``torch.no_grad`` too."""
        if self.activation is not softplus:
            return value_and_gradient(self, z)
        self._check(z)
        path, skips = self.path(), self._layers()
        before = [skips[0](z)]
        for weight, skip in zip(path, skips[1:], strict=True):
            before.append(functional.linear(softplus(before[-1]), weight) + skip(z))
        value = before.pop().squeeze(-1)
        gradient = skips[-1].weight.expand(z.shape[0], -1)
        above = torch.ones_like(value)[:, None]  # the derivative of g in what came before an activation
        for a, weight, skip in reversed(list(zip(before, path, skips, strict=False))):
            above = torch.sigmoid(a) * (above @ weight)
            gradient = gradient + above @ skip.weight
        return value, gradient

    def _layers(self) -> list[Any]:
        return list(self.skips)

    def _check(self, z: Tensor) -> None:
        if z.ndim != 2 or z.shape[1] != self.features:
            raise ValueError(f"z must be (B, {self.features}), as features says, got {tuple(z.shape)}")

    def extra_repr(self) -> str:
        """What it was made of."""
        return f"features={self.features}, hidden={self.hidden}"


def value_and_gradient(potential: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """The value (B,) of any potential at z (B, N), and its gradient (B, N), both differentiable, in every grad mode."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # what was made in inference mode can be saved for no gradient
            return value_and_gradient(potential, z.clone())

    def checked(point: Tensor) -> Tensor:
        value = potential(point)
        check_value(value, point)
        return value

    value, pull, *_ = torch.func.vjp(checked, z)
    (gradient,) = pull(torch.ones_like(value))
    return value, gradient


def check_value(value: object, z: Tensor) -> None:
    """Raise TypeError or ValueError unless ``value`` is a number a sample of z."""
    if not isinstance(value, Tensor):
        raise TypeError(f"potential must return a tensor, got {type(value).__name__}")
    if value.shape != z.shape[:1]:
        raise ValueError(f"potential must return a number a sample, {tuple(z.shape[:1])}, got {tuple(value.shape)}")


def _check_activation(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    check_callable("activation", activation)
    with torch.no_grad():
        rises = activation(torch.linspace(-20, 20, 401)).diff()
    if rises.min() < -1e-5:
        raise ValueError("activation must be nondecreasing, else g is not convex")
    if rises.diff().min() < -1e-5:
        raise ValueError("activation must be convex, else g is not")
    return activation
