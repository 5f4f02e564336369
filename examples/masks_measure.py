"""What masks.py measures: training, test, memory, torchdeq's fastest solver, masked storage, the way back."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from joint_nested import Clock
from masks_data import LINES, Data
from masks_model import TORCHDEQ, Kind, Model
from torch import Tensor

import deqfast as dq
from deqfast.compare.tally import Tally
from deqfast.ops import pool

BATCH, RATE = 128, 1e-2
RATES = {"penalised": 3e-3}  # of these two the better one for each, in a trial


def batch_of(data: Data) -> int:
    return LINES if data.task.sequence else BATCH


def updates_of(model: Model, data: Data, updates: int, seed: int) -> Iterator[int]:
    """Train, an update at a time."""
    kind = model.kind
    optimiser = torch.optim.Adam(model.parameters(), lr=RATES.get(kind.way, RATE), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    model.train()
    for k, (inputs, labels) in enumerate(data.batches(updates, batch_of(data), seed)):
        optimiser.zero_grad()
        model.loss(inputs, labels).backward()
        optimiser.step()
        model.cell.project()
        schedule.step()
        if kind.learn == "magnitude" and (k + 1) % max(1, updates // 10) == 0 and k < 0.7 * updates:
            for layer in model.masked_layers():
                layer.update_masks()
        yield k


def run(kind: Kind, data: Data, updates: int, seed: int) -> dict[str, Any]:
    """Train a model and test it: what a row of the tables is made of, for one seed."""
    model = Model(kind, data.task, seed).to(data.inputs.device)
    clock = Clock(data.inputs.device)
    with clock:
        for _ in updates_of(model, data, updates, seed):
            pass
    found = test(model, data)
    block, whole = model.multiply_adds(found["evaluations"])
    seconds = clock.wall if data.inputs.is_cuda else clock.cpu
    counts = {"parameters": model.parameters_used(), "block": block, "whole": whole}
    return {**found, **counts, "seconds": seconds, "wall": clock.wall, "peak": peak_memory(model, data)}


@torch.no_grad()
def test(model: Model, data: Data) -> dict[str, float]:
    """Accuracy, bits a label, evaluations of f a batch."""
    model.eval()
    model.counted.reset()
    right = nats = 0.0
    batches = list(zip(data.test_inputs.split(BATCH), data.test_labels.split(BATCH), strict=True))
    for inputs, labels in batches:
        logits = model(inputs)
        right += (logits.argmax(-1) == labels).sum().item()
        nats += F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum").item()
    count = data.test_labels.numel()
    evaluations = model.counted.calls / len(batches)
    return {"accuracy": right / count, "bits": nats / count / math.log(2), "evaluations": evaluations}


def peak_memory(model: Model, data: Data) -> int:
    """Bytes of a pass forward and backward beside parameters and data: the most that were alive at once."""
    model.train()
    batch = slice(0, batch_of(data))
    inputs, labels = data.inputs[batch], data.labels[batch]
    model.zero_grad()
    model.loss(inputs, labels).backward()
    model.zero_grad(set_to_none=False)  # gradients of parameters are there already
    pool.clear()  # of the solver's: what it keeps for the next solve would not be counted
    if not inputs.is_cuda:
        with Tally() as found:
            model.loss(inputs, labels).backward()
        return found.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.loss(inputs, labels).backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_by_depth(data: Data, width: int, depths: Sequence[int]) -> dict[str, list[int]]:
    """Bytes by the number of steps, for each way that ``dq.unroll`` has to keep them."""
    ways: dict[str, dict[str, Any]] = {
        "every step": {},
        "checkpoint": {"checkpoint": True},
        "reversible": {"reversible": True, "damping": 0.1},
    }
    found: dict[str, list[int]] = {name: [] for name in ways}
    for depth in depths:
        for name, options in ways.items():
            model = Model(Kind("tied", width, depth), data.task, 0).to(data.inputs.device)
            model.options = options
            found[name].append(peak_memory(model, data))
    return found


def torchdeq_fastest(
    kind: Kind, data: Data, before: int, updates: int = 8, rounds: int = 2
) -> tuple[str, dict[str, float]]:
    """Of the pairs of solvers the one that trains fastest, and the seconds of each; they take turns.

    All go on from weights that deqfast has trained ``before``: the first ones are so small that any solver does.
    """
    pairs = TORCHDEQ[:4] if kind.way == "phantom" else TORCHDEQ  # it has no backward solver
    seconds: dict[str, list[float]] = {pair: [] for pair in pairs}
    trained = Model(kind, data.task, 0).to(data.inputs.device)
    for _ in updates_of(trained, data, before, 0):
        pass
    for r in range(rounds + 1):
        for pair in pairs:
            model, clock = Model(kind.but(solver=pair), data.task, 0).to(data.inputs.device), Clock(data.inputs.device)
            model.load_state_dict(trained.state_dict())
            with clock:
                for _ in updates_of(model, data, updates, 0):
                    pass
            if r:  # the first round warms up
                seconds[pair].append(clock.wall if data.inputs.is_cuda else clock.cpu)
    medians = {pair: statistics.median(s) for pair, s in seconds.items()}
    return min(medians, key=medians.__getitem__), medians


def best_seconds(ways: Sequence[Callable[[], Any]], device: str, repeats: int) -> list[float]:
    """The least of each, in turns."""
    best = [math.inf] * len(ways)
    for turn in range(repeats + 1):
        for i, way in enumerate(ways):
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn:
                best[i] = min(best[i], time.perf_counter() - start)
    return best


@torch.no_grad()
def storage(size: int, rows: int, densities: Sequence[float], device: str, repeats: int = 7) -> dict[str, Any]:
    """Seconds of a square ``Linear``, by its sparse matrix over by its dense one, both kept, for each density."""
    x = torch.randn(rows, size, device=device)
    ratios = []
    for density in densities:
        layer = dq.nn.StepMasked(torch.nn.Linear(size, size), 1, density, storage="sparse").eval().to(device)
        dense, bias = layer.module.weight * layer.masks[0], layer.module.bias
        sparse_s, dense_s = best_seconds(
            (lambda: layer(x, 0), lambda: F.linear(x, dense, bias)),  # noqa: B023
            device,
            repeats,
        )
        ratios.append(sparse_s / dense_s)
    return {"size": size, "rows": rows, "ratios": ratios, "overtakes": overtakes(densities, ratios)}


def overtakes(densities: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The density below which sparse is the faster, interpolated between falling densities; None: at none of them."""
    for i, ratio in enumerate(ratios):
        if ratio < 1:
            if i == 0:
                return densities[0]
            (d, e), (r, s) = densities[i - 1 : i + 1], ratios[i - 1 : i + 1]
            part = math.log(r) / (math.log(r) - math.log(s))
            return d * (e / d) ** part
    return None


def reversibility(dtype: torch.dtype, steps: int, damping: float, width: int, device: str) -> dict[str, Any]:
    """A masked block by ``dq.unroll(reversible=True)`` against autograd through the same iteration in float64.

    W is 0.9 times orthogonal before it is masked, each mask of density 0.25 then divided by its root.
    """
    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q * 0.9 / math.sqrt(0.25)
    layer = dq.nn.StepMasked(torch.nn.Linear(width, width, bias=False), steps, 0.25)
    layer.module.weight.data = weight
    x = torch.randn(64, width, dtype=torch.float64)
    seen: list[Tensor] = []

    def block(z: Tensor, x: Tensor, step: int) -> Tensor:
        seen[:] = [z.detach()]
        return torch.tanh(layer(z, step) + x)

    def gradients(z: Tensor, x: Tensor) -> list[Tensor]:
        inputs = [x, *layer.parameters()]
        return [g.double().cpu() for g in torch.autograd.grad(z.square().sum(), inputs)]

    layer, start = layer.to(device), x.to(device).requires_grad_()
    y = z = start
    for k in range(steps):
        y = (1 - damping) * y + damping * block(z, start, k)
        z = (1 - damping) * z + damping * block(y, start, k)
    state, expected = z.detach(), gradients(z, start)

    layer, start = layer.to(dtype), x.to(device, dtype).requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        z = dq.unroll(block, start, steps, (start,), reversible=True, damping=damping, pass_step=True)
        found = gradients(z, start)
    back = seen[0]  # the last evaluation of the way back is at the start, as it was found again
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "steps": steps,
        "damping": damping,
        "state": apart(z.detach(), state),
        "gradient": max(apart(a, b) for a, b in zip(found, expected, strict=True)),
        "drift": apart(back, start.detach()),
        "warned": any(issubclass(w.category, dq.GradientWarning) for w in caught),
    }


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
