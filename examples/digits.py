"""Train a DEQ classifier on real handwritten digits with deqfast, and the same model with torchdeq.

The model is f(z, x) = tanh(W z + x) with x = U pixels + b, a linear head on its fixed point z*, cross-entropy, Adam.
Every run starts from the same weights, sees the same batches, stops at the same relative tolerance in both passes and
differentiates implicitly. The runs take turns, an epoch each, so a change in the machine's speed falls on all of them.

    python examples/digits.py                   # a table, out/digits.png and out/digits.json
    python examples/digits.py --no-torchdeq     # deqfast alone

Read `DeqfastLayer` and `TorchdeqLayer` in digits_model.py for the two ways to write the layer, `train_epoch` here for
what is timed, and digits_measure.py for how evaluations and residuals are counted, by one code for both libraries.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from digits_figure import draw
from digits_measure import final_residuals
from digits_model import HAS_TORCHDEQ, Classifier, DeqfastLayer, TorchdeqLayer
from digits_report import print_report, save_json
from frame import digits, progress
from torch import Tensor, nn

# The gradient's error is about the tolerance over 1 - ||J||. 1e-4 leaves it well under the noise between batches, and
# float32 rounding sets in near 1e-6. The table's second deqfast row shows what a tenth of it changes.
RTOL = 1e-4


@dataclass
class Run:
    """One way to solve, its model, and what was measured on it."""

    name: str
    library: str
    rtol: float
    model: Classifier
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    forward_s: list[float] = field(default_factory=list)  # one entry an epoch, here and below
    backward_s: list[float] = field(default_factory=list)
    rest_s: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)  # of f, a batch
    vjps: list[float] = field(default_factory=list)  # of f, a batch
    accuracy: list[float] = field(default_factory=list)
    forward_residual: Tensor | None = None  # (samples,), of the z the layer returned
    backward_residual: Tensor | None = None  # (samples,), of the gradient it delivered

    @property
    def epoch_s(self) -> list[float]:
        return [sum(parts) for parts in zip(self.forward_s, self.backward_s, self.rest_s, strict=True)]


@dataclass
class Data:
    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor


def load_data(seed: int, device: str) -> Data:
    """1797 scanned digits of 8 x 8 pixels in [0, 1]; a quarter of them, stratified, is held out."""
    return Data(*digits(seed, device))


def make_run(name: str, rtol: float, make_layer: Callable[..., nn.Module], args: argparse.Namespace) -> Run:
    torch.manual_seed(args.seed)  # the same initial weights for every run
    model = Classifier(args.hidden, functools.partial(make_layer, rtol=rtol)).to(args.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.epochs)
    return Run(name, name.split()[0], rtol, model, optimiser, schedule)


def make_runs(args: argparse.Namespace) -> list[Run]:
    """deqfast first, then torchdeq as it comes and with everything known to make it faster here."""
    runs = [make_run("deqfast", RTOL, DeqfastLayer, args)]
    runs.append(make_run("deqfast at a tenth of the tolerance", RTOL / 10, DeqfastLayer, args))
    if args.no_torchdeq:
        return runs
    if not HAS_TORCHDEQ:
        print(
            "torchdeq is not installed, so deqfast trains alone and there is nothing to compare it with.\n"
            "To compare:  pip install torchdeq==0.1.0 --no-deps   (--no-torchdeq silences this message)\n"
        )
        return runs
    from torchdeq.solver import register_solver
    from torchdeq.solver.anderson import anderson_solver

    # torchdeq hands no lam to its backward solver, so it is bound to a solver of its own.
    register_solver("anderson_small_ridge", functools.partial(anderson_solver, lam=1e-8))
    solvers = {
        "torchdeq Anderson": ("anderson", "anderson"),
        "torchdeq Anderson, lam 1e-8": ("anderson_small_ridge", "anderson_small_ridge"),
        "torchdeq Broyden": ("broyden", "broyden"),
        "torchdeq plain iteration": ("fixed_point_iter", "fixed_point_iter"),
        "torchdeq lam 1e-8, then Broyden": ("anderson_small_ridge", "broyden"),
    }
    for name, (forward, backward) in solvers.items():
        make_layer = functools.partial(TorchdeqLayer, forward_solver=forward, backward_solver=backward)
        runs.append(make_run(name, RTOL, make_layer, args))
    return runs


def train_epoch(run: Run, data: Data, order: Tensor, batch: int) -> None:
    """One pass over the training set; appends the seconds and the counts to `run`."""
    model, counted = run.model, run.model.counted
    clock = make_clock(data.train_pixels.device)
    seconds = [0.0, 0.0, 0.0]
    counted.reset()
    model.train()
    batches = order.split(batch)
    for rows in batches:
        start = clock()
        pixels, labels = data.train_pixels[rows], data.train_labels[rows]
        run.optimiser.zero_grad()
        ready = clock()
        loss = nn.functional.cross_entropy(model(pixels), labels)
        solved = clock()
        loss.backward()
        differentiated = clock()
        run.optimiser.step()
        model.cell.project()
        end = clock()
        seconds[0] += solved - ready
        seconds[1] += differentiated - solved
        seconds[2] += end - differentiated + ready - start
    run.schedule.step()
    for log, value in zip((run.forward_s, run.backward_s, run.rest_s), seconds, strict=True):
        log.append(value)
    run.calls.append(counted.calls / len(batches))
    run.vjps.append(counted.vjps / len(batches))


def make_clock(device: torch.device) -> Callable[[], float]:
    """A wall clock that waits for a GPU's queue, so that each part of a batch pays for its own work."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


@torch.no_grad()
def test_accuracy(model: Classifier, data: Data) -> float:
    model.eval()
    return (model(data.test_pixels).argmax(1) == data.test_labels).double().mean().item()


def train(runs: list[Run], data: Data, args: argparse.Namespace) -> None:
    """All runs, an epoch each in turn; who goes first rotates."""
    for run in runs:
        warm_up(run.model, data, args.batch)
    generator = torch.Generator().manual_seed(args.seed)
    orders = [torch.randperm(len(data.train_pixels), generator=generator) for _ in range(args.epochs)]
    turns = [(epoch, runs[(turn + epoch) % len(runs)]) for epoch in range(args.epochs) for turn in range(len(runs))]
    for epoch, run in progress(turns, lambda t: f"epoch {t[0] + 1:2}, {t[1].name:35}", "epoch"):
        train_epoch(run, data, orders[epoch].to(args.device), args.batch)
        run.accuracy.append(test_accuracy(run.model, data))


def warm_up(model: Classifier, data: Data, batch: int) -> None:
    """The first calls load code, fill caches and wake threads; they are timed for nobody."""
    model.train()
    for _ in range(20):
        model(data.train_pixels[:batch]).sum().backward()
    model.zero_grad()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training set, for each run")
    parser.add_argument("--batch", type=int, default=64, help="samples a step")
    parser.add_argument("--hidden", type=int, default=128, help="numbers in the equilibrium state")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture and the JSON")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-torchdeq", action="store_true", help="train with deqfast alone")
    args = parser.parse_args()
    for name in ("epochs", "batch", "hidden"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = load_data(args.seed, args.device)
    runs = make_runs(args)
    train(runs, data, args)
    for run in runs:
        residuals = final_residuals(run.model, data.test_pixels, data.test_labels, args.batch)
        run.forward_residual, run.backward_residual = residuals
    print_report(runs)
    save_json(runs, args, args.out / "digits.json")
    written = [args.out / "digits.json"]
    if draw(runs, data, args, args.out / "digits.png"):
        written.append(args.out / "digits.png")
    print("\nWrote " + " and ".join(map(str, written)))


if __name__ == "__main__":
    main()
