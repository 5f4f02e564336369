"""A generative equilibrium model, its latent codes, and its training with a joint solve or with nested loops.

z* = tanh(W z* + U x + b) for a latent code x (B, codes); picture D z* + c; a sample costs
||D z* + c - picture||^2 + penalty ||x||^2. Training minimises over the codes inside and the weights outside the same
cost, so the gradient of the weights is the envelope's: codes are constants.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from joint_nested import Clock, Counted, nested_solve
from torch import Tensor, nn

import deqfast as dq

NORM_BOUND = 0.9  # of ||W||_2: above 1 the joint solve may walk to a saddle
PENALTY = 1e-2
JOINT_RTOL = 1e-3
NESTED_RTOL = 1e-2  # to its advantage


class Generator(nn.Module):
    """f, loss and the picture of a state."""

    def __init__(self, codes: int, hidden: int, pixels: int, mean: Tensor) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, hidden, bias=False)
        self.inject = nn.Linear(codes, hidden)
        self.decode = nn.Linear(hidden, pixels)
        with torch.no_grad():
            self.decode.bias.copy_(mean)
        self.codes, self.hidden = codes, hidden
        self.bound()

    def f(self, z: Tensor, x: Tensor, *_: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.inject(x))

    def loss(self, z: Tensor, x: Tensor, picture: Tensor, known: Tensor | None = None) -> Tensor:
        """Cost (B,); ``known``: 1 where the picture was observed, 0 where it was not."""
        error = (self.decode(z) - picture).square()
        error = error if known is None else error * known
        return error.sum(1) + PENALTY * x.square().sum(1)

    def start(self, batch: int) -> tuple[Tensor, Tensor]:
        weight = self.inner.weight
        return weight.new_zeros(batch, self.hidden), weight.new_zeros(batch, self.codes)

    @torch.no_grad()
    def bound(self) -> None:
        """Scale W back to ||W||_2 <= NORM_BOUND."""
        weight = self.inner.weight
        weight *= (NORM_BOUND / torch.linalg.matrix_norm(weight, 2)).clamp(max=1.0)


@dataclass
class Run:
    """One way to find the codes, its model, and what was measured on it, a round each."""

    name: str
    kind: str  # "joint" or a solver of joint_nested
    budget: int  # evaluations of the joint solve, or steps of Adam
    model: Generator
    optimiser: torch.optim.Optimizer
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    vjps: list[int] = field(default_factory=list)
    objective: list[float] = field(default_factory=list)  # mean inner cost during training
    test_objective: list[float] = field(default_factory=list)
    step_size: float = 0.0
    seen: int = 0

    @property
    def work(self) -> list[int]:
        return [a + b for a, b in zip(self.evaluations, self.vjps, strict=True)]


def make_run(name: str, kind: str, budget: int, args, pixels: Tensor, codes: int, hidden: int) -> Run:
    torch.manual_seed(args.seed)  # the same initial weights for every run
    model = Generator(codes, hidden, pixels.shape[1], pixels.mean(0)).to(pixels.device)
    return Run(name, kind, budget, model, torch.optim.Adam(model.parameters(), lr=3e-3))


def infer(run_kind: str, model: Generator, f, budget: int, step: float, picture: Tensor, known=None, **options):
    """Codes of the pictures: (z, x, mu, cost (B,))."""
    z0, x0 = model.start(len(picture))
    args = (picture,) if known is None else (picture, known)
    if run_kind == "joint":
        options = {"rtol": JOINT_RTOL, "returns": "cost", "backward": "none", "solver": dq.Anderson(m=10), **options}
        return dq.joint_solve(f, model.loss, z0, x0, args, step_size=step, max_iter=budget, **options)
    options = {"rtol": NESTED_RTOL, **options}
    return nested_solve(f, model.loss, z0, x0, args, step_size=step, steps=budget, solver=run_kind, **options)


def train_round(run: Run, pixels: Tensor, order: Tensor, batch: int, adam_step) -> None:
    """One pass over the pictures; appends seconds, counts and the mean cost."""
    model, clock, counted = run.model, Clock(pixels.device), Counted(run.model.f)
    total = 0.0
    for i, rows in enumerate(order.split(batch)):
        picture = pixels[rows]
        z0, x0 = model.start(len(picture))
        with clock:
            if run.kind == "joint":
                # The curvature grows while the decoder learns, fastest at first: measured often early, then rarely.
                if run.seen in (0, 2, 5) or i == 0:
                    run.step_size = dq.joint_step_size(
                        counted, model.loss, z0[:32], x0[:32], (picture[:32],), iterations=3, rtol=1e-2
                    )
                sol = infer("joint", model, counted, run.budget, run.step_size, picture, backward="envelope")
                z, x = sol.z, sol.x
            else:
                sol = infer(run.kind, model, counted, run.budget, adam_step, picture)
                z, x = attach(counted, sol, picture), sol.x
            run.optimiser.zero_grad(set_to_none=True)
            cost = model.loss(z, x, picture)
            cost.mean().backward()
            run.optimiser.step()
            model.bound()
        run.seen += 1
        total += float(cost.detach().sum())
    run.wall.append(clock.wall)
    run.cpu.append(clock.cpu)
    run.evaluations.append(counted.calls)
    run.vjps.append(counted.vjps)
    run.objective.append(total / len(order))


def attach(f, sol, picture: Tensor) -> Tensor:
    """The envelope for a nested result: its z as a function of the weights; its adjoint starts the backward solve."""
    with torch.no_grad():
        x = sol.x
    backward = dq.Implicit(rtol=1e-3, u0=lambda g: sol.mu / len(picture))
    return dq.fixed_point(f, sol.z, (x, picture), rtol=1e-3, backward=backward).z


def long_inference(model: Generator, pictures: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Reference cost (B,) and pictures: one judge for every model, Adam with a tight solver and many steps."""
    sol = infer("deqfast", model, model.f, steps, 0.1, pictures, rtol=1e-4)
    with torch.no_grad():
        return sol.cost, model.decode(sol.z)
