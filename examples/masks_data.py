"""The data of masks.py: digits, patches of photographs, and a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from frame import digits
from masks_model import Task
from torch import Tensor

# Photographs and scans that come with scikit-image itself.
PHOTOGRAPHS = (
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "immunohistochemistry",
    "moon",
    "retina",
)
PATCH, TILE = 8, 32
LENGTH, LINES = 48, 16  # characters a line and lines a batch


@dataclass
class Data:
    """Inputs and labels to train on and to be tested on."""

    name: str
    task: Task
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor

    def batches(self, updates: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As many as there are updates: shuffled passes, one after the other; the last of a pass may be short."""
        generator = torch.Generator().manual_seed(seed)
        rows: list[Tensor] = []
        for _ in range(updates):
            rows = rows or list(torch.randperm(len(self.inputs), generator=generator).split(batch))
            chosen = rows.pop(0).to(self.inputs.device)
            yield self.inputs[chosen], self.labels[chosen]

    def first(self, keep: int | None) -> Data:
        """Trained on the first ``keep`` alone; they are in random order."""
        return Data(self.name, self.task, self.inputs[:keep], self.labels[:keep], self.test_inputs, self.test_labels)


def load_digits(seed: int, device: str) -> Data:
    """Which digit it is: 8 x 8 pixels."""
    return Data("digits", Task(64, 10), *digits(seed, device))


def load_photographs(seed: int, device: str, train: int = 6000, test: int = 2000) -> Data:
    """Which of ten photographs a patch of 8 x 8 pixels is from, in grey.

    Photographs are cut into tiles of 32 x 32; a quarter of these, drawn by the seed, is for the test alone.
    """
    import skimage.color
    import skimage.data

    generator = np.random.default_rng(seed)
    found: list[list[np.ndarray]] = [[], []]
    for name in PHOTOGRAPHS:
        image = getattr(skimage.data, name)()
        image = skimage.color.rgb2gray(image) if image.ndim == 3 else image / 255
        high, wide = (n // TILE for n in image.shape)
        held_out = generator.permutation(high * wide).reshape(high, wide) < high * wide // 4
        for part, count in ((0, train), (1, test)):
            tiles = np.argwhere(held_out == bool(part))
            corners = tiles[generator.integers(len(tiles), size=count // len(PHOTOGRAPHS))] * TILE
            corners += generator.integers(TILE - PATCH + 1, size=corners.shape)
            found[part].append(np.stack([image[i : i + PATCH, j : j + PATCH] for i, j in corners]))
    parts = []
    for patches in found:
        labels = torch.arange(len(PHOTOGRAPHS)).repeat_interleave(len(patches[0]))
        pixels = torch.tensor(np.concatenate(patches), dtype=torch.float32).flatten(1)
        pixels = 2 * pixels - 1
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        parts += [pixels[order].to(device), labels[order].to(device)]
    return Data("photographs", Task(PATCH**2, len(PHOTOGRAPHS)), *parts)


def load_text(seed: int, device: str) -> Data:
    """The next character of scikit-learn's descriptions of its data sets; the last tenth of each is for the test."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "descr"
    texts = [path.read_text(encoding="utf-8").lower() for path in sorted(folder.glob("*.rst"))]
    cuts = [len(text) * 9 // 10 for text in texts]
    train = "".join(text[:cut] for text, cut in zip(texts, cuts, strict=True))
    test = "".join(text[cut:] for text, cut in zip(texts, cuts, strict=True))
    known = sorted(set(train))
    codes = {c: i + 1 for i, c in enumerate(known)}  # 0: any other

    def lines(text: str, start: int) -> tuple[Tensor, Tensor]:
        numbers = torch.tensor([codes.get(c, 0) for c in text[start:]], device=device)
        count = (len(numbers) - 1) // LENGTH
        return numbers[: count * LENGTH].view(count, LENGTH), numbers[1 : count * LENGTH + 1].view(count, LENGTH)

    pieces = [lines(train, start) for start in range(0, LENGTH, LENGTH // 4)]  # every character at four places
    inputs, labels = (torch.cat(part) for part in zip(*pieces, strict=True))
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed)).to(device)
    return Data(
        "text", Task(len(known) + 1, len(known) + 1, sequence=True), inputs[order], labels[order], *lines(test, 0)
    )
