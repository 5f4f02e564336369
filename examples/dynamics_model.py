"""The classifier of dynamics.py: the states of its solve, its training, and entropy reduced while it solves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attacks import project
from torch import Tensor, nn

import deqfast as dq

LAST = 8  # evaluations of a whole solve, T
RADIUS = 0.15  # of every attack, in the maximum norm
RTOL = 1e-3  # of training
PHANTOM, DAMPING = 5, 0.5
BETA, ATTACK_STEPS, BATCH = 6.0, 10, 128  # of TRADES
ROUNDS, STEPS_A_ROUND, INPUT_STEPS = 4, 2, 10  # of the entropy reduction
REDUCTION_RADIUS, REDUCTION_STEP = RADIUS, RADIUS / 5  # the step halves every round

Solve = Callable[[nn.Module, Tensor, int], Tensor]


class Cell(nn.Module):
    """(z, x) -> tanh(W z + x)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def by_deqfast(cell: nn.Module, x: Tensor, budget: int, solver: Any = None) -> Tensor:
    """The state after ``budget`` evaluations, and its K-step phantom gradient."""
    backward = dq.Phantom(PHANTOM, DAMPING)
    options: dict[str, Any] = {"rtol": RTOL, "max_iter": budget, "returns": "next", "backward": backward}
    return dq.fixed_point(cell, torch.zeros_like(x), (x,), solver=solver or dq.Broyden(), **options).z


class Classifier(nn.Module):
    """Logits of digits; the state starts at 0."""

    def __init__(self, hidden: int, solve: Solve = by_deqfast) -> None:
        super().__init__()
        self.inject = nn.Linear(64, hidden)
        self.cell = Cell(hidden)
        self.head = nn.Linear(hidden, 10)
        self.solve = solve

    def trained(self, pixels: Tensor, budget: int) -> Tensor:
        """What training sees: logits of the phantom steps' end."""
        return self.head(self.solve(self.cell, self.inject(pixels), budget))

    def at(self, pixels: Tensor, state: int) -> Tensor:
        """Logits of a state, differentiated exactly, through the solver: nothing is hidden from an attack."""
        x = self.inject(pixels)
        backward = dq.Unroll() if torch.is_grad_enabled() else "none"
        options: dict[str, Any] = {"rtol": 0.0, "max_iter": state, "returns": "next", "backward": backward}
        return self.head(dq.fixed_point(self.cell, torch.zeros_like(x), (x,), solver=dq.Broyden(), **options).z)


class Budgets:
    """Evaluations that a call of training may make: LAST, or drawn from 1 to LAST."""

    def __init__(self, random: bool, seed: int) -> None:
        self.drawn = dq.RandomStates(1, upto=LAST, generator=torch.Generator().manual_seed(seed)) if random else None

    def __call__(self) -> int:
        return LAST if self.drawn is None else self.drawn.draw()[0]


def trades(
    model: Classifier, pixels: Tensor, labels: Tensor, budget: Budgets, generator: torch.Generator | None
) -> Tensor:
    """CE(clean) + BETA KL(attacked || clean), the attack's calls and the loss's each with a budget of its own."""
    with torch.no_grad():
        clean = model.trained(pixels, budget()).softmax(1)
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    near = project(pixels + 1e-3 * noise, pixels, RADIUS)
    for _ in range(ATTACK_STEPS):
        near.requires_grad_()
        out = model.trained(near, budget()).log_softmax(1)
        (slope,) = torch.autograd.grad(F.kl_div(out, clean, reduction="sum"), near)
        near = project(near.detach() + RADIUS / 4 * slope.sign(), pixels, RADIUS)
    both = model.trained(torch.cat([pixels, near]), budget())
    clean_out, out = both.chunk(2)
    kl = F.kl_div(out.log_softmax(1), clean_out.softmax(1), reduction="batchmean")
    return F.cross_entropy(clean_out, labels) + BETA * kl


def train_pass(
    model: Classifier, optimiser: torch.optim.Optimizer, data: tuple[Tensor, ...], budget: Budgets, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.randperm(len(data[0]), generator=generator).split(BATCH):
        optimiser.zero_grad()
        trades(model, data[0][rows], data[1][rows], budget, generator).backward()
        optimiser.step()


def entropy(out: Tensor) -> Tensor:
    """Of softmax(out), (B,), in nats."""
    logs = out.log_softmax(1)
    return -(logs.exp() * logs).sum(1)


class Defence:
    """Logits of pixels whose entropy is reduced while the state is solved for.

    A round makes two evaluations of the solve, which keeps its memory under the pixels that have moved (``repair``),
    and then moves the pixels: signed steps against the entropy of softmax(head(f(z, x))) at the state z.

    Args:
        through: what a gradient of the logits passes. None: none. "identity": the pixels' moves count as constants.
            "signs": it goes through every move, a sign having the derivative of what it is the sign of, scaled. Values
            are the same; the states have a phantom gradient.
    """

    def __init__(self, model: Classifier, through: str | None = None, rounds: int = ROUNDS) -> None:
        self.model, self.through, self.rounds = model, through, rounds
        self.entropies: list[Tensor] = []  # of the last call: at the end of each round
        self.left = torch.empty(0)  # pixels that the last call ended at

    def __call__(self, pixels: Tensor) -> Tensor:
        model, x = self.model, pixels
        self.entropies = []
        state = dq.Broyden().init(torch.zeros_like(model.inject(pixels.detach())), rtol=0.0)
        for number in range(self.rounds):
            with torch.no_grad():
                given = model.inject(x.detach())
                for k in range(STEPS_A_ROUND):
                    if k == 0 and self.entropies:
                        state.repair(model.cell(state.evaluated(), given))
                    else:
                        state.step(model.cell(state.z, given))
                z = state.z.clone()
            for _ in range(INPUT_STEPS):
                x = self.moved(x, z, pixels, REDUCTION_STEP / 2**number)
            with torch.no_grad():
                self.entropies.append(entropy(self.read(z, x.detach())))
        self.left = x.detach()
        if self.through == "identity":
            x = pixels + (x - pixels).detach()
        if self.through is None:
            return self.read(z, x.detach())
        given, steered = model.inject(x), z
        for _ in range(PHANTOM + 4):
            steered = steered + DAMPING * (model.cell(steered, given) - steered)
        return self.read(z + steered - steered.detach(), x)

    def read(self, z: Tensor, x: Tensor) -> Tensor:
        return self.model.head(self.model.cell(z, self.model.inject(x)))

    def moved(self, x: Tensor, z: Tensor, pixels: Tensor, step: float) -> Tensor:
        """One signed step of the pixels."""
        deep = self.through == "signs" and x.requires_grad
        with torch.enable_grad():
            leaf = x if deep else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(entropy(self.read(z, leaf)).sum(), leaf, create_graph=deep)
        signs = slope.sign()
        if deep:
            soft = slope / slope.detach().abs().mean(1, keepdim=True).clamp(min=1e-12)
            signs = signs.detach() + soft - soft.detach()
            return project(x - step * signs, pixels, REDUCTION_RADIUS)
        return project(x.detach() - step * signs, pixels.detach(), REDUCTION_RADIUS)
