"""Who has which digits, and which device: a split that is not even, the same wherever it is made.

A client of the simulation, a process on another machine and the server each make the split of a seed themselves; no
digit is sent.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

ALPHA = 0.5  # of the Dirichlet distribution: at 100 all clients are alike, at 0.1 most have one or two labels
LEAST = 10  # digits that every client has; a draw that leaves one with fewer is made again
# Evaluations of f that a device can afford in a forward solve, and products in a backward one; the weak come first.
BUDGETS = (4, 4, 6, 6, 8, 10, 12, 16, 24, 40)


@dataclass(frozen=True)
class Part:
    """One client's digits: most to train on, a fifth to judge its own model by."""

    pixels: Tensor  # (n, 64) in [0, 1]
    labels: Tensor  # (n,)
    held_pixels: Tensor
    held_labels: Tensor


def budget(client: int) -> int:
    """The iteration budget of a client whose device says none."""
    return BUDGETS[client % len(BUDGETS)]


@functools.lru_cache(maxsize=8)
def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train pixels and labels, test pixels and labels; a quarter, stratified, is for the test."""
    pixels, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        pixels / 16, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    floats = [torch.tensor(a, dtype=torch.float32) for a in (train, test)]
    return floats[0], torch.tensor(train_labels), floats[1], torch.tensor(test_labels)


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int, least: int = LEAST) -> list[np.ndarray]:
    """The rows of each client: of every label, shares drawn from Dirichlet(alpha)."""
    if clients < 1:
        raise ValueError(f"clients: expected at least 1, got {clients}")
    if not alpha > 0:
        raise ValueError(f"alpha: expected a positive number, got {alpha}")
    if clients * least > len(labels):
        raise ValueError(f"clients: {clients} of them cannot have {least} digits each, there are {len(labels)}")
    generator = np.random.default_rng(seed)
    for _ in range(1000):
        shares: list[list[int]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            rows = generator.permutation(np.flatnonzero(labels == label))
            cuts = np.cumsum(generator.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)
            for share, piece in zip(shares, np.split(rows, cuts.astype(int)), strict=True):
                share.extend(piece.tolist())
        if min(map(len, shares)) >= least:
            return [generator.permutation(share) for share in shares]
    raise ValueError(f"alpha: no draw of 1000 with {alpha} gave each of {clients} clients {least} digits; raise it")


@functools.lru_cache(maxsize=8)
def split(seed: int, clients: int) -> list[Part]:
    """The digits of every client."""
    pixels, labels, _, _ = digits(seed)
    parts = []
    for rows in dirichlet(labels.numpy(), clients, ALPHA, seed):
        held, kept = torch.as_tensor(rows[: len(rows) // 5]), torch.as_tensor(rows[len(rows) // 5 :])
        parts.append(Part(pixels[kept], labels[kept], pixels[held], labels[held]))
    return parts
