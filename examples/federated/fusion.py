"""What the server makes of the clients' weights: theta = sum_k w_k theta_k, w_k proportional to n_k^a q_k.

n_k is the number of digits that client k trained on, q_k its quality, a function of what the client reports. Equal
weights give the plain average bit for bit: weights are divided by the largest before anything else, which makes equal
ones 1, and sums are in float64.

Nothing here knows Flower: it takes and returns plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CLOSE = 1e-2  # c of 1 / (residual + c): a residual far below it is as good as 0


@dataclass(frozen=True)
class Update:
    """What one client sends back."""

    client: int
    weights: Mapping[str, np.ndarray]
    examples: int  # n_k
    budget: int  # evaluations of f that the device can afford
    residual: float  # relative, of its solves with this budget after training
    score: float  # accuracy on its own held-out digits


@dataclass(frozen=True)
class Weighting:
    """w_k proportional to n_k^exponent quality(update of k)."""

    exponent: float
    quality: Callable[[Update], float]

    def __call__(self, update: Update) -> float:
        return float(update.examples**self.exponent * self.quality(update))


WEIGHTINGS: dict[str, Weighting] = {
    "equal": Weighting(0.0, lambda update: 1.0),
    "data": Weighting(1.0, lambda update: 1.0),
    "budget": Weighting(1.0, lambda update: update.budget),
    "residual": Weighting(1.0, lambda update: 1 / (update.residual + CLOSE)),
    "score": Weighting(1.0, lambda update: update.score),
}


class NobodyLeft(ValueError):
    """No client of a round can be fused; the message says why, client by client."""


def sift(
    updates: Sequence[Update], reference: Mapping[str, np.ndarray], weighting: Weighting
) -> tuple[list[Update], list[float], dict[int, str]]:
    """Updates that can be fused, by client, with their weights w_k (not normalised); and why others are left out."""
    kept: dict[int, tuple[Update, float]] = {}
    left_out: dict[int, str] = {}
    for update in sorted(updates, key=lambda update: update.client):
        if update.client in kept or update.client in left_out:
            kept.pop(update.client, None)
            left_out[update.client] = "more than one update came from it"
            continue
        fault = fault_of(update, reference)
        if fault is None:
            weight = weighting(update)
            if math.isfinite(weight) and weight >= 0:
                kept[update.client] = update, weight
                continue
            fault = f"its weight is {weight}, expected a finite number that is not negative"
        left_out[update.client] = fault
    return [update for update, _ in kept.values()], [weight for _, weight in kept.values()], left_out


def fault_of(update: Update, reference: Mapping[str, np.ndarray]) -> str | None:
    """Why an update cannot be fused with weights like ``reference``; None if it can."""
    missing, unknown = reference.keys() - update.weights.keys(), update.weights.keys() - reference.keys()
    if missing or unknown:
        return f"another architecture: without {sorted(missing) or 'nothing'}, with {sorted(unknown) or 'nothing'} more"
    for name, expected in reference.items():
        if (fault := fault_of_array(update.weights[name], expected)) is not None:
            return f"{name} {fault}"
    if update.examples < 1:
        return f"it trained on {update.examples} digits, expected at least 1"
    for name in ("residual", "score"):
        if not math.isfinite(getattr(update, name)):
            return f"its {name} is {getattr(update, name)}, expected a finite number"
    return None


def fault_of_array(array: np.ndarray, expected: np.ndarray) -> str | None:
    if array.shape != expected.shape:
        return f"has shape {array.shape}, expected {expected.shape}: another architecture"
    if array.dtype != expected.dtype:
        return f"has dtype {array.dtype}, expected {expected.dtype}"
    if not np.isfinite(array).all():
        return f"has {int((~np.isfinite(array)).sum())} numbers that are not finite"
    return None


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1, of finite ones that are not negative."""
    for k, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights[{k}]: expected a finite number that is not negative, got {weight}")
    largest = max(weights, default=0.0)
    if largest == 0:
        raise NobodyLeft(f"weights: expected one that is positive at least, got {list(weights)}")
    scaled = [weight / largest for weight in weights]
    return [weight / math.fsum(scaled) for weight in scaled]


def fuse(updates: Sequence[Update], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """sum_k w_k theta_k / sum_k w_k, array by array, in their own dtype."""
    if len(updates) != len(weights):
        raise ValueError(f"weights: expected {len(updates)}, one an update, got {len(weights)}")
    normalised(weights)
    scaled = [weight / max(weights) for weight in weights]
    total, fused = math.fsum(scaled), {}
    for name, first in updates[0].weights.items():
        summed = np.zeros(first.shape, np.float64)
        for update, weight in zip(updates, scaled, strict=True):
            summed += weight * update.weights[name].astype(np.float64)
        fused[name] = (summed / total).astype(first.dtype)
    return fused
