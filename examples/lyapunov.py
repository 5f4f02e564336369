"""Stable dynamics on real handwritten digits: the same field with and without a Lyapunov projection, measured.

The state z starts at x = U pixels + b and follows dz/dt = F(z, x) = tanh(W z + x) - z for a fixed number of Euler
steps; an orthogonal layer and a linear one read it. "projected" takes from F what would keep V from decaying at the
rate alpha, as in LyaDEQ (Chu, Wei, Liu and Zhao, AAAI 2024); V is trained with the rest. V is anchored at 0: run for
long, every state would go there, so it is read at a finite time.

    python examples/lyapunov.py                 # a table, out/lyapunov.png and out/lyapunov.json

The attack is projected gradient ascent in the maximum norm. Its step size is swept and each model is counted at the one
that hurts it most, for a gradient that is masked shows as an attack that needs another step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from frame import INK, OURS, RIVALS, columns, digits, paint, progress, provenance
from torch import Tensor, nn

import deqfast as dq

ALPHA, STEP, STEPS = 1.0, 0.1, 10
RADIUS, ATTACK_STEPS, ASCENTS = 0.1, (0.005, 0.02, 0.05, 0.1), 20


class Field(nn.Module):
    """F(z, x) = tanh(W z + x) - z."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(numbers, numbers, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x) - z


class Model(nn.Module):
    def __init__(self, numbers: int, projected: bool) -> None:
        super().__init__()
        self.projected = projected
        self.read = nn.Linear(64, numbers)
        self.flow = dq.nn.LyapunovProjection(Field(numbers), dq.nn.ICNN(numbers, hidden=(32, 32)), ALPHA)
        self.turn = nn.utils.parametrizations.orthogonal(nn.Linear(numbers, numbers))
        self.head = nn.Linear(numbers, 10)

    def rate(self, z: Tensor, x: Tensor) -> Tensor:
        return self.flow(z, x) if self.projected else self.flow.field(z, x)

    def states(self, pixels: Tensor) -> list[Tensor]:
        """z at each step, the start included."""
        x = self.read(pixels)
        states = [x]
        for _ in range(STEPS):
            states.append(states[-1] + STEP * self.rate(states[-1], x))
        return states

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.turn(self.states(pixels)[-1]))


def train(model: Model, pixels: Tensor, labels: Tensor, epochs: int, seed: int) -> float:
    """Seconds that it took."""
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels), generator=generator).split(128):
            optimiser.zero_grad()
            F.cross_entropy(model(pixels[rows]), labels[rows]).backward()
            optimiser.step()
        schedule.step()
    return time.perf_counter() - start


def attacked(model: Model, pixels: Tensor, labels: Tensor, step: float) -> float:
    """Accuracy on what gradient ascent makes of the pixels."""
    near = pixels.clone()
    for _ in range(ASCENTS):
        near.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(near), labels, reduction="sum"), near)
        near = near.detach() + step * slope.sign()
        near = (pixels + (near - pixels).clamp(-RADIUS, RADIUS)).clamp(0, 1)
    return accuracy(model, near, labels)


@torch.no_grad()
def accuracy(model: Model, pixels: Tensor, labels: Tensor) -> float:
    return (model(pixels).argmax(1) == labels).double().mean().item()


@torch.no_grad()
def of_v(model: Model, pixels: Tensor) -> dict[str, Any]:
    """What V does along the states of the test set."""
    x, states = model.read(pixels), model.states(pixels)
    v = torch.stack([model.flow.lyapunov(z) for z in states])
    excess = []
    for z in states:
        value, slope = model.flow.value_and_gradient(z)
        scale = slope.norm(dim=1) * model.flow.field(z, x).norm(dim=1) + ALPHA * value
        excess.append((((slope * model.rate(z, x)).sum(1) + ALPHA * value) / scale).max())
    relative = v / v[0]
    return {
        "excess": torch.stack(excess).max().item(),
        "falling": (v.diff(dim=0) <= 0).all(0).double().mean().item(),
        "relative": {str(q): relative.quantile(q, dim=1).tolist() for q in (0.05, 0.5, 0.95)},
    }


def measure(name: str, model: Model, data: tuple[Tensor, ...], seconds: float) -> dict[str, Any]:
    _, _, pixels, labels = data
    turn: Any = model.turn
    weight = turn.weight.detach()
    return {
        "name": name,
        "train_s": seconds,
        "accuracy": accuracy(model, pixels, labels),
        "attacked": {str(step): attacked(model, pixels, labels, step) for step in ATTACK_STEPS},
        "orthogonality": (weight @ weight.mT - torch.eye(len(weight))).norm().item(),
        **of_v(model, pixels),
    }


def table(rows: list[dict[str, Any]]) -> str:
    header = ["model", "accuracy", f"attacked {RADIUS}", "of step", "V never rises", "(dV/dt + alpha V) / scale"]
    header += ["|QQ' - I|", "training"]
    cells = []
    for row in rows:
        step, worst = min(row["attacked"].items(), key=lambda pair: pair[1])
        first = [row["name"], f"{row['accuracy']:.1%}", f"{worst:.1%}", step, f"{row['falling']:.1%}"]
        cells.append([*first, f"{row['excess']:.0e}", f"{row['orthogonality']:.0e}", f"{row['train_s']:.1f} s"])
    return columns(header, cells)


def draw(path: Path, rows: list[dict[str, Any]], flat: Model, pixels: Tensor) -> None:
    """The field of one digit without and with the projection, in a state of two numbers; V along the test set."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12.5, 4.3), layout="constrained")
    x = flat.read(pixels[:1]).detach()
    size = 1.3 * x.abs().max().clamp(min=1).item()
    grid = torch.linspace(-size, size, 41)
    plane = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).reshape(-1, 2)
    with torch.no_grad():
        v = flat.flow.lyapunov(plane).reshape(41, 41)
        rates = [f(plane, x.expand(len(plane), 2)).reshape(41, 41, 2) for f in (flat.flow.field, flat.flow)]
    for ax, rate, title, colour in zip(axes, rates, ("F", "F projected"), (RIVALS[0], OURS), strict=False):
        ax.contour(grid, grid, (v + 1e-6).log(), 12, colors="#BBBBBB", linewidths=0.8, linestyles="solid")
        ax.streamplot(
            grid.numpy(), grid.numpy(), rate[..., 0].numpy(), rate[..., 1].numpy(), color=colour, linewidth=0.9
        )
        ax.plot(*x[0].tolist(), "o", color=INK)
        ax.plot(0, 0, "+", color=INK, markersize=10)
        ax.set(title=title, xlabel="$z_1$", ylabel="$z_2$", xlim=(-size, size), ylim=(-size, size))
    times = [STEP * k for k in range(STEPS + 1)]
    for row, colour in zip(rows[:2], (RIVALS[0], OURS), strict=True):
        low, middle, high = row["relative"].values()
        axes[2].fill_between(times, low, high, color=colour, alpha=0.18, linewidth=0)
        axes[2].plot(times, middle, color=colour, label=row["name"])
    axes[2].plot(times, [torch.tensor(-ALPHA * t).exp() for t in times], "--", color=INK, label="exp(-alpha t)")
    axes[2].set(title="V(z(t)) / V(z(0)), test set", xlabel="t", yscale="log")
    axes[2].legend(frameon=False)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training set, for each model")
    parser.add_argument("--seeds", type=int, default=2, help="how often each model is trained")
    parser.add_argument("--numbers", type=int, default=32, help="numbers in the state")
    parser.add_argument("--keep", type=int, default=None, help="digits used of each set; all without it")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture and the JSON")
    args = parser.parse_args()
    for name in ("epochs", "seeds", "numbers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    args.device = "cpu"
    return args


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = digits(0, args.device, args.keep)
    turns = [(seed, projected) for seed in range(args.seeds) for projected in (False, True)]
    rows = []
    for seed, projected in progress(turns, lambda turn: f"seed {turn[0]}", "model"):
        torch.manual_seed(seed)
        model = Model(args.numbers, projected)
        seconds = train(model, data[0], data[1], args.epochs, seed)
        rows.append(measure(f"{'projected' if projected else 'plain'}, seed {seed}", model, data, seconds))
    torch.manual_seed(0)
    flat = Model(2, True)
    train(flat, data[0], data[1], args.epochs, 0)
    print(table(rows))
    print(
        f"\nattacked: {ASCENTS} ascents within {RADIUS} of every pixel, the worst of the steps {ATTACK_STEPS}; "
        "scale: ||grad V|| ||F|| + alpha V.\nA plain model's V is as it was drawn: nothing trains it."
    )
    record = {"rows": rows, **provenance(args, ["deqfast", "torch", "scikit-learn"])}
    (args.out / "lyapunov.json").write_text(json.dumps(record, indent=1) + "\n")
    picture = args.out / "lyapunov.png"
    if paint(lambda path: draw(path, rows, flat, data[2]), picture, title_pad=8):
        print(f"\n{picture}: in a state of two numbers F of one digit, and V along the test set")


if __name__ == "__main__":
    main()
