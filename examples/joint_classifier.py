"""An equilibrium classifier of digits, the joint attack on it, and the nested attack (projected gradient descent).

z* = tanh(W z* + U pixels + b), logits H z* + c. The attack moves the pixels within a Euclidean ball so that the
cross-entropy grows; its cost is -CE, a sample at a time.
"""

from __future__ import annotations

import torch
from joint_nested import nested_solve
from torch import Tensor, nn

import deqfast as dq

NORM_BOUND = 0.9  # of ||W||_2
RTOL = 1e-3  # of solves whose result is judged
TRAINING_RTOL = 1e-2  # of solves in training, whoever makes them


class Classifier(nn.Module):
    """f, head and the cost of an attack."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, hidden, bias=False)
        self.inject = nn.Linear(64, hidden)
        self.head = nn.Linear(hidden, 10)
        self.hidden = hidden
        self.bound()

    def f(self, z: Tensor, x: Tensor, *_: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.inject(x))

    def cost(self, z: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        """-CE (B,): what an attack minimises."""
        return -nn.functional.cross_entropy(self.head(z), labels, reduction="none")

    def start(self, pixels: Tensor) -> Tensor:
        return pixels.new_zeros(len(pixels), self.hidden)

    @torch.no_grad()
    def bound(self) -> None:
        """Scale W back to ||W||_2 <= NORM_BOUND."""
        weight = self.inner.weight
        weight *= (NORM_BOUND / torch.linalg.matrix_norm(weight, 2)).clamp(max=1.0)

    @torch.no_grad()
    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        z = dq.fixed_point(self.f, self.start(pixels), (pixels,), rtol=RTOL, backward="none").z
        return float((self.head(z).argmax(1) == labels).double().mean())


def joint_attack(model: Classifier, f, pixels: Tensor, labels: Tensor, radius: float, budget: int, **options):
    """Adversarial pixels ``.x`` by one joint solve of ``budget`` evaluations.

    The state and its adjoint are accelerated; the pixels take plain normalised steps, which shrink, because with a
    projection their residual is no measure of progress. The last evaluation is for the state and the adjoint alone.
    """
    late, last = max(1, budget // 2), budget - 1
    return dq.joint_solve(
        f,
        model.cost,
        model.start(pixels),
        pixels,
        (labels,),
        step_size=lambda k: radius * (0.6 if k < late else 0.25 if k < last else 1e-6),
        normalize=True,
        project=dq.project.L2Ball(radius, center=pixels),
        accelerate=("z", "mu"),
        solver=dq.Anderson(m=5),
        damping=1.0,
        returns="last",
        rtol=0.0,
        max_iter=budget,
        **options,
    )


def nested_attack(model, f, pixels: Tensor, labels: Tensor, radius: float, steps: int, solver: str, **more):
    """Adversarial pixels ``.x`` by projected gradient descent, two solves a step, warm-started."""
    return nested_solve(
        f,
        model.cost,
        model.start(pixels),
        pixels,
        (labels,),
        step_size=2.5 * radius / steps,
        steps=steps,
        optimiser="pgd",
        normalize=True,
        project=dq.project.L2Ball(radius, center=pixels),
        solver=solver,
        **{"rtol": RTOL, **more},
    )
