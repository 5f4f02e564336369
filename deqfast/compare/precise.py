"""f in float64, where it allows that: the residual and the gradient that everybody is judged by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..gradients.implicit import Implicit
from ..solve import fixed_point
from ..solvers.anderson import Anderson
from .case import Case, Map

_WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
_AGREES = 1e-5  # of a float32 f with itself in float64
_TIGHT = 1e-10
_LIMIT = 1000


class _InPlace(RuntimeError):
    """f changes a tensor in place, which would be changed in a copy."""


class _Wide(TorchFunctionMode):
    """Every function of torch's takes its floating arguments in float64; gradients reach the narrow ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("__get__", "requires_grad_", "register_hook"):
            return func(*args, **kwargs)
        changed = args[0] if args and _IN_PLACE.fullmatch(name) else kwargs.get("out")
        if any(isinstance(t, Tensor) and t.dtype in _WIDER for t in pytree.tree_leaves(changed)):
            raise _InPlace(name)
        args, kwargs = pytree.tree_map(widened, (args, kwargs))
        return func(*args, **kwargs)


_IN_PLACE = re.compile(r"[a-z]\w*[a-z0-9]_|__setitem__|__i(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor)__")


def widened(value: Any) -> Any:
    """A tensor in float64 or complex128, and a dtype as one of these; anything else as it is."""
    if isinstance(value, Tensor):
        wide = _WIDER.get(value.dtype)
        return value if wide is None else value.to(wide)
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


class Precise:
    """f and loss in float64, or as they are where that is not the same f.

    Attributes:
        name: of the precision that z is in: "float64", or that of z0.
    """

    def __init__(self, case: Case, target: float) -> None:
        self._case = case
        first = pytree.tree_leaves(case.z0)[0]
        self.name = str(first.dtype).removeprefix("torch.")
        self._wide = False
        if first.dtype in _WIDER and self._agrees(case, max(_AGREES, target / 4)):
            self._wide, self.name = True, str(_WIDER[first.dtype]).removeprefix("torch.")

    def _agrees(self, case: Case, tolerance: float) -> bool:
        try:
            with torch.no_grad():
                z = case.f(case.z0)
                narrow, wide = case.f(z), self._f(pytree.tree_map(widened, z))
                if case.params:
                    with _Wide():
                        case.loss(wide)
        except Exception:  # whatever f does not like about it
            return False
        if any(t.dtype not in _WIDER.values() for t in pytree.tree_leaves(wide)):
            return False
        return case.relative(wide, pytree.tree_map(widened, narrow)) <= tolerance

    def _f(self, z: Any) -> Any:
        with _Wide():
            return self._case.f(z)

    @property
    def f(self) -> Map:
        """Of a z that ``z`` has made."""
        return self._f if self._wide else self._case.f

    def z(self, z: Any) -> Any:
        """The z in this precision, detached."""
        return pytree.tree_map(lambda t: widened(t.detach()) if self._wide else t.detach(), z)

    def loss(self, z: Any) -> Tensor:
        """The loss in this precision."""
        if not self._wide:
            return self._case.loss(z)
        with _Wide():
            return self._case.loss(z)

    def residual(self, z: Any) -> float:
        """The worst sample's ||f(z) - z|| / ||f(z)||, by one evaluation."""
        with torch.no_grad():
            z = self.z(z)
            return self._case.relative(self.f(z), z)


@dataclass(frozen=True)
class Reference:
    """A tight solve: its z and the flat gradient in float64, None where it is not tight, and what it reached."""

    z: Any | None
    gradient: Tensor | None
    dtype: str
    residual: float


def reference(case: Case, precise: Precise, start: Any, target: float) -> Reference:
    """Solve as tightly as the precision allows, from ``start``; without a gradient where that is not much tighter."""
    eps = torch.finfo(pytree.tree_leaves(precise.z(case.z0))[0].dtype).eps
    rtol = max(_TIGHT, 8 * eps)
    backward = Implicit(rtol=rtol, max_iter=_LIMIT) if case.params else "none"
    with torch.enable_grad():
        sol = fixed_point(
            precise.f,
            precise.z(start),
            solver=Anderson(m=20, history_dtype=None),
            rtol=rtol,
            max_iter=_LIMIT,
            backward=backward,
            batch_dims=case.batch_dims,
        )
        gradient = flat_gradient(precise.loss(sol.z), case.params) if case.params else None
    residual = precise.residual(sol.z)
    report = sol.backward
    exact = residual <= target / 10 and (report is None or float(report.residual.max()) <= target / 10)
    z = precise.z(sol.z) if residual <= target / 10 else None
    return Reference(z, gradient if exact else None, precise.name, residual)


def flat_gradient(loss: Tensor, params: list[Tensor]) -> Tensor:
    """The gradients by all params, one after the other, in float64."""
    found = torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)  # z0 and args may have one
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
    wide = [torch.view_as_real(g) if g.is_complex() else g for g in parts]
    return torch.cat([g.detach().double().reshape(-1) for g in wide])
