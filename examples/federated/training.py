"""What a client does with the weights it receives: train on its own digits, and say how good the result is."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping

import data
import model as models
import numpy as np
import torch
import torch.nn.functional as F
from fusion import Update
from torch import Tensor

import deqfast as dq


@dataclasses.dataclass(frozen=True)
class Options:
    """What server and clients agree on; it travels with every message."""

    model: str = "equilibrium"
    weighting: str = "data"
    seed: int = 0
    clients: int = 10
    rounds: int = 20
    epochs: int = 3
    batch: int = 32
    rate: float = 5e-3
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.model not in models.MODELS:
            raise ValueError(f"model: expected one of {', '.join(models.MODELS)}, got {self.model!r}")
        for name in ("clients", "rounds", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def initial(options: Options) -> dict[str, np.ndarray]:
    """The weights of round 0."""
    torch.manual_seed(options.seed)
    return models.weights_of(models.make(options.model, max(data.BUDGETS)))


def fit(model: models.Model, part: data.Part, options: Options, seed: int) -> None:
    """Some epochs of Adam on the digits of one client; the order of the batches is the seed's."""
    optimiser = torch.optim.Adam(model.parameters(), lr=options.rate)
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = part.pixels.to(options.device), part.labels.to(options.device)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(options.batch):
            optimiser.zero_grad()
            F.cross_entropy(model(pixels[rows]), labels[rows]).backward()
            optimiser.step()
            model.project()


def train(weights: Mapping[str, np.ndarray], client: int, turn: int, budget: int, options: Options) -> Update:
    """The update of a client in a round, the same wherever it is computed: it depends on these arguments alone."""
    part = data.split(options.seed, options.clients)[client]
    model = models.make(options.model, budget).to(options.device)
    models.load(model, weights)
    with warnings.catch_warnings():
        # A device that affords four iterations is not expected to converge; its residual says how far it came.
        warnings.simplefilter("ignore", dq.GradientWarning)
        fit(model, part, options, seed=1_000_003 * options.seed + 1_009 * turn + client)
    return Update(
        client=client,
        weights=models.weights_of(model),
        examples=len(part.labels),
        budget=budget,
        residual=model.residual(part.pixels.to(options.device)),
        score=accuracy(model, part.held_pixels, part.held_labels, options.device),
    )


@torch.no_grad()
def accuracy(model: torch.nn.Module, pixels: Tensor, labels: Tensor, device: str) -> float:
    return (model(pixels.to(device)).argmax(1).cpu() == labels).double().mean().item()


def test_accuracy(weights: Mapping[str, np.ndarray], options: Options) -> float:
    """Of fused weights, on digits that no client has, with the largest budget."""
    model = models.make(options.model, max(data.BUDGETS)).to(options.device)
    models.load(model, weights)
    _, _, pixels, labels = data.digits(options.seed)
    return accuracy(model, pixels, labels, options.device)
