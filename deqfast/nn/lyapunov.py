"""``LyapunovProjection``: a vector field along which a Lyapunov function decays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..options import check_callable, check_not_negative
from .icnn import check_value, value_and_gradient

__all__ = ["EulerMap", "LyapunovProjection"]


class LyapunovProjection(nn.Module):
    """A field F(z, x), less what of it would keep V from decaying at the rate alpha (Manek and Kolter, NeurIPS 2019).

    With a convex potential g, such as ``ICNN``, and the smooth ReLU s that is 0 below 0, u^2 / (2 width) up to width
    and u - width / 2 from there:

    ::

        V(z) = s(g(z) - g(0)) + eps ||z||^2
        P(z, x) = F - grad V relu(grad V . F + alpha V) / ||grad V||^2

    so that dV/dt + alpha V <= 0 along dz/dt = P(z, x), and V(z(t)) <= V(z(0)) exp(-alpha t). In float32
    tests hold the left side to 1e-6 (||grad V|| ||F|| + alpha V). V(0) = 0 and grad V(0) = 0 hold exactly, and
    P(0, x) = 0 by definition, where the quotient is 0 / 0. V is convex, so grad V vanishes nowhere else.

    Chu, Wei, Liu and Zhao (AAAI 2024) put such a field into a DEQ, before an orthogonal layer and the classifier:
    ``torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(N, N))``.

    V is anchored: its minimum is 0 whatever x is. With alpha > 0, 0 is therefore the only equilibrium, and a
    solve that converges goes to 0 and forgets x. What a head reads is the state at a finite time: a fixed number
    of steps of ``as_map``, from a start that is not 0. Where F(0, x) is not 0, P jumps at 0, and steps of a fixed size
    stall about ``step * ||F(0, x)||`` from there.

    ::

        flow = dq.nn.LyapunovProjection(field, dq.nn.ICNN(8), alpha=0.5)
        dz = flow(z, x)

    Args:
        field: callable or module (z, x, *args) -> like z.
        potential: callable or module (B, N) -> (B,), convex, given each sample of z as N numbers. If it has a method
            ``value_and_gradient(z)``, that is asked for both; else ``torch.func.vjp`` is.
        alpha: rate of decay, at least 0. With 0 V does not grow, and there may be other equilibria.
        eps: weight of ||z||^2 in V, above 0: what makes 0 the only minimum.
        width: where the smooth ReLU becomes linear, above 0.

    Under autocast the potential is evaluated in float32 all the same. The bound is one of the V that ``lyapunov``
    returns; that one knows g(z) - g(0) up to the rounding of g, which shows near 0.

    Raises:
        TypeError, ValueError: an option that cannot be, or in a call a field that does not return the shape of z, or a
            potential that does not return a number a sample or was made for another N.
    """

    def __init__(
        self,
        field: Callable[..., Tensor],
        potential: Callable[[Tensor], Tensor],
        alpha: float = 1.0,
        *,
        eps: float = 1e-3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        check_callable("field", field)
        check_callable("potential", potential)
        self.field = field
        self.potential = potential
        self.alpha = check_not_negative("alpha", alpha)
        self.eps = _check_positive("eps", eps)
        self.width = _check_positive("width", width)

    def forward(self, z: Tensor, *args: Any) -> Tensor:
        """P(z, *args), shaped like z (B, ...) and in its dtype."""
        rate = self.field(z, *args)
        if not isinstance(rate, Tensor):
            raise TypeError(f"field must return a tensor, got {type(rate).__name__}")
        if rate.shape != z.shape:
            raise ValueError(f"field must return the shape of z, {tuple(z.shape)}, got {tuple(rate.shape)}")
        value, gradient = self.value_and_gradient(z)
        rate, gradient = rate.to(value.dtype).flatten(1), gradient.flatten(1)
        # In units of its largest number no square of the gradient vanishes; P does not depend on the unit, so neither
        # do its derivatives.
        unit = gradient.detach().abs().amax(1, keepdim=True)
        anchored = unit == 0
        unit = unit.masked_fill(anchored, 1.0)
        normal = gradient / unit
        square = normal.square().sum(1, keepdim=True).masked_fill(anchored, 1.0)
        excess = (normal * rate).sum(1, keepdim=True) + self.alpha * value[:, None] / unit
        projected = rate - normal * (excess.relu() / square)
        return projected.masked_fill(anchored, 0.0).view_as(z).to(z.dtype)

    def lyapunov(self, z: Tensor) -> Tensor:
        """V(z), (B,), for z (B, ...)."""
        return self.value_and_gradient(z)[0]

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """V(z), (B,), and its gradient in z, shaped like z; both differentiable, under ``torch.no_grad`` too.

        They are float32 where z has fewer bits.
        """
        if z.ndim < 2:
            raise ValueError(f"z must be (B, ...) with at least two dimensions, got {tuple(z.shape)}")
        flat = z.flatten(1)
        features = getattr(self.potential, "features", None)
        if isinstance(features, int) and features != flat.shape[1]:
            raise ValueError(f"potential was made for {features} features, a sample of z has {flat.shape[1]}")
        if torch.is_autocast_enabled(z.device.type):
            with torch.autocast(z.device.type, enabled=False):
                return self._value_and_gradient(z, flat.to(_accurate(flat.dtype)))
        return self._value_and_gradient(z, flat)

    def _value_and_gradient(self, z: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        own = getattr(self.potential, "value_and_gradient", None)
        value, slope = own(flat) if callable(own) else value_and_gradient(self.potential, flat)
        check_value(value, flat)
        zero = self.potential(torch.zeros_like(flat[:1]))
        flat, value, slope, zero = (t.to(_accurate(t.dtype)) for t in (flat, value, slope, zero))
        # A batch and a single row may round differently, so 0 itself is told.
        rise = (value - zero).masked_fill((flat == 0).all(1), 0.0)
        rise = rise.clamp(min=0)
        near = rise.clamp(max=self.width)
        smooth = near * (rise - near / 2) / self.width
        v = smooth + self.eps * flat.square().sum(1)
        gradient = (near / self.width)[:, None] * slope + 2 * self.eps * flat
        return v, gradient.view_as(z)

    def as_map(self, step: float) -> EulerMap:
        """The map z + step P(z, x), a module for ``dq.fixed_point`` and ``dq.DEQ``.

        Args:
            step: of explicit Euler, above 0. V decays along steps that are small; how small depends on V and the field.
        """
        return EulerMap(self, step)

    def extra_repr(self) -> str:
        """Its numbers."""
        return f"alpha={self.alpha}, eps={self.eps}, width={self.width}"


class EulerMap(nn.Module):
    """f(z, x) = z + step P(z, x); made by ``LyapunovProjection.as_map``."""

    def __init__(self, projection: LyapunovProjection, step: float) -> None:
        super().__init__()
        self.projection = projection
        self.step = _check_positive("step", step)

    def forward(self, z: Tensor, *args: Any) -> Tensor:
        """The state one step later, shaped like z."""
        return z + self.step * self.projection(z, *args)

    def init(self, x: Any) -> Any:
        """Where a ``DEQ`` starts: ``field.init(x)`` if the field has it, else x, for 0 would stay 0."""
        init = getattr(self.projection.field, "init", None)
        return init(x) if callable(init) else x

    def extra_repr(self) -> str:
        """Its step."""
        return f"step={self.step}"


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_positive(name: str, value: object) -> float:
    number = check_not_negative(name, value)
    if number == 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return number
