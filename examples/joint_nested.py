"""The nested loops that a joint solve replaces: solve z*, solve the adjoint, step x, again.

    z   <-  z = f(z, x)                     to a relative tolerance, from the last z where warm
    mu  <-  mu = l_z + f_z^T mu             the same, from the last mu where warm
    x   <-  Adam's or PGD's step along      l_x + f_x^T mu

Both solves run on a solver of torchdeq or on ``deqfast.fixed_point``. Every evaluation of f and every vector-Jacobian
product is counted, by one code for all, the joint solve included: wrap f in ``Counted``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import deqfast as dq

# torchdeq's Anderson as it comes, and with the small ridge that makes it faster on well-scaled problems.
SOLVERS = ("torchdeq", "torchdeq default ridge", "torchdeq Broyden", "torchdeq plain", "deqfast")
OPTIMISERS = ("adam", "pgd")
Function = Callable[..., Tensor]


class Counted:
    """f, with its calls and its vector-Jacobian products counted, a batch each."""

    def __init__(self, f: Function) -> None:
        self.f = f
        self.calls = self.vjps = 0

    def __call__(self, *inputs: Any) -> Tensor:
        self.calls += 1
        out = self.f(*inputs)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, _: Tensor) -> None:
        self.vjps += 1

    @property
    def work(self) -> int:
        """Evaluations and products together."""
        return self.calls + self.vjps


@dataclass
class Clock:
    """Seconds of wall clock and of processor time inside of ``with``, summed; a GPU's queue is waited for.

    With one thread the processor's seconds are what the wall clock would show on an idle machine.
    """

    device: torch.device | str = "cpu"
    wall: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> Clock:
        self._wait()
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.wall += time.perf_counter() - self._start[0]
        self.cpu += time.process_time() - self._start[1]

    def _wait(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Nested:
    """What ``nested_solve`` found: z is solved for the returned x, and cost (B,) is there."""

    z: Tensor
    x: Tensor
    mu: Tensor
    cost: Tensor
    evaluations: int
    vjps: int
    seconds: float
    trace: list[float] = field(default_factory=list)  # mean cost before each step of x


def solve(f: Callable[[Tensor], Tensor], z0: Tensor, solver: str, rtol: float, max_iter: int) -> Tensor:
    """A fixed point of f, with nothing differentiated."""
    with torch.no_grad():
        if solver == "deqfast":
            return dq.fixed_point(f, z0, rtol=rtol, max_iter=max_iter, backward="none").z
        z, _, _ = _torchdeq(solver)(f, z0, max_iter=max_iter, tol=rtol, stop_mode="rel")
        return z


def _torchdeq(name: str) -> Callable[..., Any]:
    from torchdeq.solver import get_solver
    from torchdeq.solver.anderson import anderson_solver

    if name == "torchdeq":
        return functools.partial(anderson_solver, lam=1e-8)
    kinds = {
        "torchdeq default ridge": "anderson",
        "torchdeq Broyden": "broyden",
        "torchdeq plain": "fixed_point_iter",
    }
    return get_solver(kinds[name])


def nested_solve(
    f: Function,
    loss: Function,
    z0: Tensor,
    x0: Tensor,
    args: tuple[Any, ...] = (),
    *,
    step_size: float | Callable[[int], float],
    steps: int,
    optimiser: str = "adam",
    project: Callable[[Tensor], Tensor] | None = None,
    normalize: bool = False,
    solver: str = "torchdeq",
    rtol: float = 1e-3,
    adjoint_rtol: float | None = None,
    max_iter: int = 60,
    warm: bool = True,
    trace: bool = False,
    last_solve: bool = True,
) -> Nested:
    """Minimise loss(z*(x), x) over x, sample by sample, with ``steps`` gradients.

    Args:
        f, loss, z0, x0, args: as in ``joint_solve``, a tensor each for z and x.
        step_size: of Adam or PGD, a number or a function of the step.
        steps: of x.
        optimiser: "adam", or "pgd": x <- P(x - step q).
        project: x -> x, after every step.
        normalize: with "pgd", q divided by its norm, sample by sample.
        solver: one of ``SOLVERS``, for both solves.
        rtol: relative tolerance of the forward solve; ``adjoint_rtol``: of the adjoint one, default the same.
        max_iter: of each solve.
        warm: each solve starts where the last step's ended; False: at z0 and at 0.
        trace: keep the mean cost before each step.
        last_solve: solve z for the returned x; False: z and cost are those before the last step.
    """
    for name, value, known in (("solver", solver, SOLVERS), ("optimiser", optimiser, OPTIMISERS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    counted, clock = Counted(f), Clock(z0.device)
    adjoint_rtol = rtol if adjoint_rtol is None else adjoint_rtol
    rate = step_size if callable(step_size) else (lambda k: step_size)
    z, mu, x = z0.detach(), torch.zeros_like(z0), x0.detach().clone()
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    means: list[float] = []
    with clock:
        for k in range(steps):
            z = solve(lambda z: counted(z, x, *args), z if warm else z0, solver, rtol, max_iter)  # noqa: B023
            mu, q, cost = _gradient(counted, loss, z, x, mu if warm else None, args, solver, adjoint_rtol, max_iter)
            if trace:
                means.append(float(cost.mean()))
            if optimiser == "adam":
                first.lerp_(q, 0.1)
                second.lerp_(q * q, 0.001)
                q = (first / (1 - 0.9 ** (k + 1))) / ((second / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
            elif normalize:
                q = q / q.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, *[1] * (q.dim() - 1))
            x = x - rate(k) * q
            x = x if project is None else project(x)
        if last_solve:
            z = solve(lambda z: counted(z, x, *args), z if warm else z0, solver, rtol, max_iter)
            with torch.no_grad():
                cost = loss(z, x, *args)
    return Nested(z, x, mu, cost, counted.calls, counted.vjps, clock.wall, means)


def _gradient(
    f: Function, loss: Function, z: Tensor, x: Tensor, mu: Tensor | None, args: Any, solver: str, rtol: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint at (z, x), the gradient l_x + f_x^T mu, and the cost (B,)."""
    with torch.enable_grad():
        z, x = z.detach().requires_grad_(), x.detach().requires_grad_()
        fz, cost = f(z, x, *args), loss(z, x, *args)
        l_z, l_x = torch.autograd.grad(cost.sum(), (z, x), allow_unused=True)
        if l_z is None:
            l_z = torch.zeros_like(z)

        def adjoint(u: Tensor) -> Tensor:
            return torch.autograd.grad(fz, z, u, retain_graph=True)[0] + l_z

        mu = solve(adjoint, l_z if mu is None else mu, solver, rtol, most)
        (q,) = torch.autograd.grad(fz, x, mu)
    return mu, (q if l_x is None else q + l_x), cost.detach()
