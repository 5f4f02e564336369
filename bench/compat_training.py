"""torchdeq's own training, without and under `dq.compat.torchdeq.installed()`: the digits, and an MLP with sines."""

from __future__ import annotations

import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deqfast as dq
from bench import peers, targets, timing

EXAMPLES = Path(__file__).parents[1] / "examples"
RTOL = 1e-4  # of both passes, relative
BATCH = 64
SOLVERS = ("anderson", "broyden", "fixed_point_iter")
SMALL_RIDGE = "anderson_small_ridge"

Row = dict[str, Any]


def held(what: str, found: timing.Ratio, asked: float, *, at_most: bool = False) -> Row:
    """What was asked of a row, and whether it was met."""
    met = found.ratio <= asked if at_most else found.ratio >= asked
    facts = {"what": what, "value": found.ratio, "low": found.low, "high": found.high}
    return {**facts, "asked": asked, "at_most": at_most, "met": met}


def times(taken: timing.Timing) -> Row:
    low, high = taken.quartiles
    return {"ms": 1e3 * taken.median, "ms_low": 1e3 * low, "ms_high": 1e3 * high}


class WithOptions(nn.Module):
    """A module of torchdeq, called with options of its forward solver as its scripts hand them over."""

    def __init__(self, deq: Any, options: Mapping[str, float]) -> None:
        super().__init__()
        self.deq, self.options = deq, options

    def forward(self, f: Callable[[Tensor], Tensor], z: Tensor) -> Any:
        return self.deq(f, z, solver_kwargs=dict(self.options))


class Training:
    """A few epochs of examples/digits.py from the same weights, with the test at the end; one call is all of it."""

    def __init__(self, epochs: int, forward: str, backward: str, options: Mapping[str, float]) -> None:
        from digits_model import Classifier, TorchdeqLayer
        from frame import digits

        torch.manual_seed(0)
        layer = functools.partial(TorchdeqLayer, rtol=RTOL, forward_solver=forward, backward_solver=backward)
        self.model: Any = Classifier(128, layer)
        if options:
            self.model.layer.deq = WithOptions(self.model.layer.deq, options)
        self.start = copy.deepcopy(self.model.state_dict())
        self.pixels, self.labels, self.test_pixels, self.test_labels = digits(0, "cpu")
        generator = torch.Generator().manual_seed(0)
        self.orders = [torch.randperm(len(self.pixels), generator=generator) for _ in range(epochs)]
        self.accuracy = 0.0

    def __call__(self) -> None:
        model = self.model
        model.load_state_dict(self.start)
        model.counted.reset()
        model.train()
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
        for order in self.orders:
            for rows in order.split(BATCH):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(self.pixels[rows]), self.labels[rows]).backward()
                optimiser.step()
                model.cell.project()
        self.calls, self.vjps = model.counted.calls, model.counted.vjps
        model.eval()
        with torch.no_grad():
            self.accuracy = float((model(self.test_pixels).argmax(1) == self.test_labels).double().mean())

    def facts(self) -> Row:
        """Evaluations a batch, the share of test digits that are right, and median residuals over the test digits."""
        from digits_measure import final_residuals

        forward, backward = final_residuals(self.model, self.test_pixels, self.test_labels, BATCH)
        batches = sum(len(order.split(BATCH)) for order in self.orders)
        facts = {"calls": self.calls / batches, "vjps": self.vjps / batches, "accuracy": self.accuracy}
        return {**facts, "residual": float(forward.median()), "gradient_residual": float(backward.median())}


def digits_runs(epochs: int) -> dict[str, Training]:
    """torchdeq's solvers without and with deqfast's in their place, and torchdeq with all that makes it faster."""
    from torchdeq.solver import register_solver
    from torchdeq.solver.anderson import anderson_solver

    # torchdeq hands no lam to its backward solver, so it is bound to a solver of its own.
    register_solver(SMALL_RIDGE, functools.partial(anderson_solver, lam=1e-8))
    runs = {}
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {"torchdeq": nullcontext, "installed": _installed}
    for library, way in ways.items():
        with way():
            for name in SOLVERS:
                runs[f"{library}, {name}"] = Training(epochs, name, name, {})
            runs[f"{library}, anderson, lam 1e-8"] = Training(epochs, "anderson", "anderson", {"lam": 1e-8})
    runs["torchdeq, anderson, lam 1e-8 in both passes"] = Training(epochs, SMALL_RIDGE, SMALL_RIDGE, {})
    runs["torchdeq, anderson, lam 1e-8, then broyden"] = Training(epochs, SMALL_RIDGE, "broyden", {})
    return runs


def _installed() -> AbstractContextManager[None]:
    return dq.compat.torchdeq.installed()


def digits_rows(quick: bool) -> list[Row]:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    epochs = 1 if quick else 4
    runs = digits_runs(epochs)
    rounds = 1 if quick else 5
    taken = timing.alternate(runs, rounds=rounds, least_rounds=rounds, clock=time.process_time)
    rows = {
        name: {"part": "digits", "row": name, "epochs": epochs, **times(taken[name]), **run.facts()}
        for name, run in runs.items()
    }
    theirs = _fastest([row for row in rows.values() if row["row"].startswith("torchdeq")])
    ours = _fastest([row for row in rows.values() if row["row"].startswith("installed") and _solved(row)])
    found = timing.ratio(taken[theirs].seconds, taken[ours].seconds)
    rows[ours]["held"] = held(f"fastest of torchdeq ({theirs}) / row", found, targets.COMPAT_TRAINING)
    return list(rows.values())


def _fastest(rows: list[Row]) -> str:
    return str(min(rows, key=lambda row: row["ms"])["row"])


def _solved(row: Row) -> bool:
    """Whether both passes reach the tolerance at the end; a rival may be fast without."""
    return max(row["residual"], row["gradient_residual"]) <= 2 * RTOL


class Sines(nn.Module):
    """f(z, x) = sin(V sin(W z) + x), V and W orthogonal times a bit less than 1: ||J|| is at most 0.95."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(n, n), nn.Linear(n, n)
        self.calls = self.vjps = 0
        with torch.no_grad():
            for linear in (self.inner, self.outer):
                nn.init.orthogonal_(linear.weight, gain=0.95**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        out = torch.sin(self.outer(torch.sin(self.inner(z))) + x)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, _: Tensor) -> None:
        self.vjps += 1


class Step:
    """Forward and backward solve of `Sines` with a module of torchdeq's."""

    def __init__(self, solver: str, net: Sines, x: Tensor) -> None:
        from torchdeq import get_deq

        self.net, self.x = copy.deepcopy(net), x
        self.deq = get_deq(
            f_solver=solver, b_solver=solver, f_max_iter=60, b_max_iter=60, f_tol=RTOL, b_tol=RTOL,
            f_stop_mode="rel", b_stop_mode="rel", ift=True,
        )  # fmt: skip

    def __call__(self) -> None:
        self.net.zero_grad()
        self.net.calls = self.net.vjps = 0
        z, _ = self.deq(lambda z: self.net(z, self.x), torch.zeros_like(self.x))
        self.z = z[-1].detach()
        z[-1].square().sum().backward()

    def gradient(self) -> Tensor:
        return _gradient(self.net)


def _gradient(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None]).double()


_F, _VJP = "f alone", "a product alone"


def _alone(net: Sines, x: Tensor) -> dict[str, Callable[[], object]]:
    """What no solver can save: f, and its product with a vector."""
    z = torch.zeros_like(x, requires_grad=True)
    out = net(z, x)

    def f() -> Tensor:
        with torch.no_grad():
            return net(z, x)

    return {_F: f, _VJP: lambda: torch.autograd.grad(out, z, out, retain_graph=True)}


def inr_rows(quick: bool) -> list[Row]:
    torch.manual_seed(0)
    net, x = Sines(64), torch.randn(64 if quick else 1024, 64)
    steps = {f"torchdeq, {name}": Step(name, net, x) for name in SOLVERS}
    with _installed():
        steps.update({f"installed, {name}": Step(name, net, x) for name in SOLVERS})
    rounds = 3 if quick else 15
    ways: dict[str, Callable[[], object]] = {**steps, **_alone(copy.deepcopy(net), x)}
    taken = timing.alternate(ways, rounds=rounds, least_rounds=rounds, clock=time.process_time)
    exact = copy.deepcopy(net).double()
    tight = dq.Implicit(rtol=1e-9, max_iter=500)
    solved = dq.fixed_point(exact, torch.zeros_like(x).double(), (x.double(),), rtol=1e-9, max_iter=500, backward=tight)
    solved.z.square().sum().backward()
    reference = _gradient(exact)
    rows = []
    for name, step in steps.items():
        facts: Row = {"calls": step.net.calls, "vjps": step.net.vjps}
        facts["f_ms"] = 1e3 * (facts["calls"] * taken[_F].median + facts["vjps"] * taken[_VJP].median)
        with torch.no_grad():
            facts["residual"] = statistics.median(peers.relative_residual(step.z, step.net(step.z, x)).tolist())
        error = float((step.gradient() - reference).norm() / reference.norm())
        rows.append({"part": "sines", "row": name, **times(taken[name]), **facts, "gradient_error": error})
        library, solver = name.split(", ")
        if library == "installed":
            found = timing.ratio(taken[f"torchdeq, {solver}"].seconds, taken[name].seconds)
            rows[-1]["held"] = held(f"torchdeq, {solver} / row", found, targets.COMPAT_INR[solver])
    return rows
