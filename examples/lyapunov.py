"""Stable dynamics on real handwritten digits: the same field with and without a Lyapunov projection, measured.

The state z starts at x = U pixels + b and follows dz/dt = F(z, x) = tanh(W z + x) - z for a fixed number of Euler
steps; an orthogonal layer and a linear one read it. "projected" takes from F what would keep V from decaying at the
rate alpha, as in LyaDEQ (Chu, Wei, Liu and Zhao, AAAI 2024); V is trained with the rest. V is anchored at 0: run for
long, every state would go there, so it is read at a finite time.

    python examples/lyapunov.py                 # a table, out/lyapunov.png and out/lyapunov.json

Both are trained as they are and on what an attack makes of the digits. The attack that is counted is projected gradient
ascent in the maximum norm. Its step size is swept, for a gradient that is masked shows as an attack that needs another
step, and each model also meets what the attack made of the digits for the other one: they need no gradient of it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import attacks
import torch
import torch.nn.functional as F
from attacks import accuracy, standing
from frame import INK, OURS, RIVALS, columns, digits, paint, progress, provenance
from torch import Tensor, nn

import deqfast as dq

ALPHA, STEP, STEPS = 1.0, 0.1, 10
RADIUS, ATTACK_STEPS, ASCENTS = 0.1, (0.05, 0.2, 0.5, 1.0), 20  # the steps in radii
TRAINING_ASCENTS, TRAINING_STEP = 3, 0.5
RANDOM_STATES = 10_000
PACKAGES = ("deqfast", "torch", "scikit-learn", "numpy")


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


def train(model: Model, pixels: Tensor, labels: Tensor, epochs: int, seed: int, adversarial: bool = False) -> float:
    """Seconds that it took."""
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels), generator=generator).split(128):
            given = pixels[rows]
            if adversarial:
                noise = RADIUS * (2 * torch.rand(given.shape, generator=generator) - 1)
                start_at = given + noise.to(given)
                given = attacks.pgd(model, given, labels[rows], RADIUS, TRAINING_ASCENTS, TRAINING_STEP, start=start_at)
            optimiser.zero_grad()
            F.cross_entropy(model(given), labels[rows]).backward()
            optimiser.step()
        schedule.step()
    return time.perf_counter() - start


def excess(model: Model, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """dV/dt + alpha V at each state, and it over ||grad V|| ||F|| + alpha V, which is what float32 can round to."""
    value, slope = model.flow.value_and_gradient(z)
    scale = slope.norm(dim=1) * model.flow.field(z, x).norm(dim=1) + ALPHA * value
    above = (slope * model.rate(z, x)).sum(1) + ALPHA * value
    return above, above / scale


@torch.no_grad()
def of_v(model: Model, pixels: Tensor, seed: int) -> dict[str, Any]:
    """What V does along the states of the test set, and at random states of sizes from 0.01 to 10."""
    x, states = model.read(pixels), model.states(pixels)
    v = torch.stack([model.flow.lyapunov(z) for z in states])
    along = torch.stack([excess(model, z, x)[1].max() for z in states]).max().item()
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (3 * torch.rand(RANDOM_STATES, 1, generator=generator) - 2)
    z = (size * torch.randn(RANDOM_STATES, x.shape[1], generator=generator)).to(x)
    above, relative = excess(model, z, x[torch.randint(len(x), (RANDOM_STATES,), generator=generator)])
    ratio = v / v[0]
    return {
        "along": along,
        "random": relative.max().item(),
        "random_absolute": above.max().item(),
        "falling": (v.diff(dim=0) <= 0).all(0).double().mean().item(),
        "relative": {str(q): ratio.quantile(q, dim=1).tolist() for q in (0.05, 0.5, 0.95)},
    }


def measure(models: dict[bool, Model], data: tuple[Tensor, ...], seed: int, training: str) -> list[dict[str, Any]]:
    """Rows of a plain and a projected model of the same training and seed, which also meet each other's attacks."""
    _, _, pixels, labels = data
    near = {
        projected: [attacks.pgd(model, pixels, labels, RADIUS, ASCENTS, step) for step in ATTACK_STEPS]
        for projected, model in models.items()
    }
    rows = []
    for projected, model in models.items():
        turn: Any = model.turn
        weight = turn.weight.detach()
        rows.append(
            {
                "training": training,
                "projected": projected,
                "seed": seed,
                "accuracy": accuracy(model, pixels, labels),
                "attacked": [accuracy(model, hit, labels) for hit in near[projected]],
                "transferred": standing(model, near[not projected], labels),
                "worst": standing(model, near[projected] + near[not projected], labels),
                "orthogonality": (weight @ weight.mT - torch.eye(len(weight))).norm().item(),
                **of_v(model, pixels, seed),
            }
        )
    return rows


def spread(values: list[float]) -> str:
    values = [100 * v for v in values]
    return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def named(projected: bool) -> str:
    return "projected" if projected else "plain"


def tables(rows: list[dict[str, Any]]) -> dict[str, tuple[list[str], list[list[str]]]]:
    robust, stable = [], []
    for training in ("clean", "adversarial"):
        for projected in (False, True):
            group = [row for row in rows if (row["training"], row["projected"]) == (training, projected)]
            sweep = [f"{100 * mean(row['attacked'][k] for row in group):.1f}" for k in range(len(ATTACK_STEPS))]
            spreads = [spread([row[key] for row in group]) for key in ("transferred", "worst")]
            first = [f"{named(projected)}, {training} training"]
            robust.append([*first, spread([row["accuracy"] for row in group]), *sweep, *spreads])
            most = [f"{max(row[key] for row in group):.0e}" for key in ("along", "random", "random_absolute")]
            falls = f"{min(100 * row['falling'] for row in group):.1f} %"
            seconds = f"{mean(row['train_s'] for row in group):.1f}"
            stable.append([*first, falls, *most, f"{max(row['orthogonality'] for row in group):.0e}", seconds])
    header = ["model", "clean", *(f"step {step:g} r" for step in ATTACK_STEPS), "transferred", "worst of all"]
    flow = ["model", "V never rises", "along, / scale", "random, / scale", "random", "norm of QQ' - I", "training, s"]
    return {"robust": (header, robust), "stable": (flow, stable)}


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    held = [row for row in rows if row["projected"]]
    most = max(max(row["along"], row["random"]) for row in held)
    turned = max(row["orthogonality"] for row in rows)
    what = f"projected: (dV/dt + alpha V) / scale, all test states and {RANDOM_STATES:,} random ones a model"
    found = [
        target(what, "at most 1e-6", f"{most:.0e}", most <= 1e-6),
        target("orthogonal layer: norm of QQ' - I", "below 1e-5", f"{turned:.0e}", turned < 1e-5),
    ]
    for training in ("clean", "adversarial"):
        group = [row for row in rows if row["training"] == training]
        pairs = zip(group[1::2], group[::2], strict=True)
        gains = [100 * (mine["worst"] - plain["worst"]) for mine, plain in pairs]
        points = ", ".join(f"{gain:+.1f}" for gain in gains)
        what = f"worst of all attacks, projected less plain, {training} training, by seed"
        found.append(target(what, "above 0 on every seed", f"{points} points", min(gains) > 0))
    return found


def target(what: str, asked: str, measured: str, met: bool) -> dict[str, Any]:
    return {"what": what, "target": asked, "measured": measured, "met": bool(met)}


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
    for row, colour in zip(rows[:2], (RIVALS[0], OURS), strict=True):  # of the first seed, clean training
        low, middle, high = row["relative"].values()
        axes[2].fill_between(times, low, high, color=colour, alpha=0.18, linewidth=0)
        axes[2].plot(times, middle, color=colour, label=named(row["projected"]))
    axes[2].plot(times, [torch.tensor(-ALPHA * t).exp() for t in times], "--", color=INK, label="exp(-alpha t)")
    axes[2].set(title="V(z(t)) / V(z(0)), test set", xlabel="t", yscale="log")
    axes[2].legend(frameon=False)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training set, for each model")
    parser.add_argument("--seeds", type=int, default=3, help="how often each model is trained")
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
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    data = digits(0, args.device, args.keep)
    turns = [
        (seed, training, projected)
        for seed in range(args.seeds)
        for training in ("clean", "adversarial")
        for projected in (False, True)
    ]
    rows: list[dict[str, Any]] = []
    models: dict[bool, Model] = {}
    seconds: dict[bool, float] = {}
    for seed, training, projected in progress(turns, lambda t: f"seed {t[0]}, {t[1]}, {named(t[2])}", "model"):
        torch.manual_seed(seed)
        models[projected] = Model(args.numbers, projected)
        seconds[projected] = train(models[projected], *data[:2], args.epochs, seed, training == "adversarial")
        if projected:
            rows += [{**row, "train_s": seconds[row["projected"]]} for row in measure(models, data, seed, training)]
    torch.manual_seed(0)
    flat = Model(2, True)
    train(flat, data[0], data[1], args.epochs, 0)
    found, met = tables(rows), targets(rows)
    for header, cells in found.values():
        print("\n" + columns(header, cells))
    notes = [
        f"attacked: {ASCENTS} ascents within r = {RADIUS} of every pixel; transferred: right under all attacks that "
        "were made for the other model of the same training and seed; worst of all: under every attack of the row.",
        "scale: ||grad V|| ||F|| + alpha V, what rounding in float32 is relative to; without it the largest "
        "dV/dt + alpha V itself. Largest values over the seeds. A plain model's V is as drawn: nothing trains it.",
    ]
    print("\n" + "\n".join(notes))
    for t in met:
        print(f"{'met   ' if t['met'] else 'MISSED'}  {t['what']}: {t['measured']} (target {t['target']})")
    picture = args.out / "lyapunov.png"
    painted = paint(lambda path: draw(path, rows, flat, data[2]), picture, title_pad=8)
    record = {
        "name": "lyapunov",
        "title": "A field without and with the Lyapunov projection, and V along the test set",
        "quick": args.keep is not None,
        **provenance(args, PACKAGES, silent=("out", "keep", "device")),
        "seconds": time.perf_counter() - started,
        "tables": {name: {"header": header, "rows": cells} for name, (header, cells) in found.items()},
        "targets": met,
        "notes": notes,
        "picture": picture.name if painted else None,
        "rows": rows,
    }
    (args.out / "lyapunov.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    if painted:
        print(f"\n{picture}: in a state of two numbers F of one digit, and V along the test set")


if __name__ == "__main__":
    main()
