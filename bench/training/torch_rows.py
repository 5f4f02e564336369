"""torch's rows: training steps with deqfast and torchdeq, and the bare calls of f and of its vjp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import deqfast as dq
from bench.training.nets import RTOL, Net

LIMIT = 100
BARE = "bare calls of f and its vjp, as often as Broyden()"
Map = Callable[[Tensor], Tensor]


def _channels_first(t: Tensor) -> Tensor:
    return t.movedim(-1, 1).contiguous() if t.dim() == 4 else t


class Cell(torch.nn.Module):
    """F of one net; its parameters lie as JAX has them, but for kernels."""

    def __init__(self, net: Net, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.kind = net.kind
        for name, value in net.params.items():
            t = torch.from_numpy(value).to(dtype)
            t = t.permute(3, 2, 0, 1).contiguous() if t.dim() == 4 else t
            self.register_parameter(name, torch.nn.Parameter(t))
        self.x, self.c = (_channels_first(torch.from_numpy(t).to(dtype)) for t in (net.x, net.c))

    def forward(self, z: Tensor) -> Tensor:
        p: dict[str, Any] = self._parameters
        if self.kind == "mlp":
            return torch.tanh(torch.nn.functional.linear(z, p["w"], p["b"]) + self.x)
        if self.kind == "conv":
            inner = torch.relu(torch.nn.functional.conv2d(z, p["w"], p["b"], padding=1))
            return torch.tanh(torch.nn.functional.conv2d(inner, p["v"], padding=1) + self.x)
        q, k, v = z @ p["q"], z @ p["k"], z @ p["v"]
        return torch.tanh(torch.softmax(q @ k.mT / 8, -1) @ v + z @ p["w"] + self.x)

    def gradient(self) -> Tensor:
        """Flat, in float64, as JAX has it: parameters by name, kernels (height, width, in, out)."""
        found = []
        for name in sorted(self._parameters):
            t = self._parameters[name]
            assert t is not None and t.grad is not None
            found.append((t.grad.permute(2, 3, 1, 0) if t.dim() == 4 else t.grad).double().reshape(-1))
        return torch.cat(found)


@dataclass
class Step:
    """One row: a solver in both passes, with f as it is or compiled."""

    cell: Cell
    f: Map
    solve: Callable[[Map, Tensor], Tensor]

    def __call__(self) -> None:
        self.cell.zero_grad()
        self.z = self.solve(self.f, torch.zeros_like(self.cell.x))
        (self.z * self.cell.c).sum().backward()

    def facts(self) -> dict[str, Any]:
        """What one more call makes and finds."""
        self.calls = 0
        f = self.f

        def counted(z: Tensor) -> Tensor:
            self.calls += 1
            return f(z)

        self.f = counted
        try:
            self()
        finally:
            self.f = f
        with torch.no_grad():
            z = self.z.detach()
            gap = (self.cell(z) - z).double().flatten(1).norm(dim=1) / self.cell(z).double().flatten(1).norm(dim=1)
        return {"evaluations": self.calls, "residual": float(gap.max())}


def own(solver: Any) -> Callable[[Map, Tensor], Tensor]:
    """By ``fixed_point``."""
    return lambda f, z0: dq.fixed_point(f, z0, solver=solver, rtol=RTOL, max_iter=LIMIT).z


def torchdeqs(name: str) -> Callable[[Map, Tensor], Tensor]:
    """By torchdeq's module, both passes with the same solver and relative tolerances."""
    from torchdeq import get_deq

    deq = get_deq(
        f_solver=name, b_solver=name, f_max_iter=LIMIT, b_max_iter=LIMIT, f_tol=RTOL, b_tol=RTOL,
        f_stop_mode="rel", b_stop_mode="rel", ift=True,
    )  # fmt: skip
    return lambda f, z0: deq(f, z0)[0][-1]


def steps(net: Net) -> Iterator[tuple[str, Step]]:
    """Every row but the bare calls."""
    ways = {f"deqfast {type(s).__name__}()": own(s) for s in (dq.Anderson(), dq.Broyden(), dq.Picard())}
    ways |= {f"torchdeq {name}": torchdeqs(name) for name in ("anderson", "broyden", "fixed_point_iter")}
    for name, way in ways.items():
        cell = Cell(net)
        yield name, Step(cell, cell, way)
        cell = Cell(net)
        yield f"{name}, f compiled", Step(cell, torch.compile(cell), way)


class Bare:
    """The calls that no solver can do without."""

    def __init__(self, net: Net) -> None:
        self.cell = Cell(net)
        reports: list[Any] = []
        solution = dq.fixed_point(
            self.cell, torch.zeros_like(self.cell.x), solver="broyden", rtol=RTOL, max_iter=LIMIT,
            backward=dq.Implicit(callback=reports.append),
        )  # fmt: skip
        (solution.z * self.cell.c).sum().backward()
        self.evaluations, self.products = solution.evaluations, int(reports[0].evaluations)

    def __call__(self) -> None:
        cell, z = self.cell, torch.zeros_like(self.cell.x)
        cell.zero_grad()
        with torch.no_grad():
            for _ in range(self.evaluations):
                cell(z)
        z.requires_grad_()
        fz = cell(z)
        for _ in range(self.products):
            torch.autograd.grad(fz, z, cell.c, retain_graph=True)
        (fz * cell.c).sum().backward()


def exact_gradient(net: Net) -> Tensor:
    """In float64, solved to 1e-10."""
    cell = Cell(net, torch.float64)
    tight = dq.Implicit(rtol=1e-10, max_iter=1000)
    start = torch.zeros_like(cell.x)
    solution = dq.fixed_point(cell, start, rtol=1e-10, max_iter=1000, backward=tight, throw=True)
    (solution.z * cell.c).sum().backward()
    return cell.gradient()
