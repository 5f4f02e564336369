"""Attacks within a maximum-norm ball and the pixel box: PGD, PGD whose step halves by itself, and a random search.

Each takes ``logits(pixels)`` -> (B, classes), pixels (B, N) in [0, 1], labels (B,) and a radius, and returns pixels
(B, N): of each sample the worst that it met, and one that is misclassified wherever it met one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def project(near: Tensor, pixels: Tensor, radius: float) -> Tensor:
    """The nearest pixels within ``radius`` of ``pixels`` and in [0, 1]."""
    return near.maximum(pixels - radius).minimum(pixels + radius).clamp(0, 1)


def cross_entropy(out: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(out, labels, reduction="none")


def margin(out: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit less that of the label: above 0 where it is misclassified."""
    other = out.scatter(1, labels[:, None], -torch.inf).amax(1)
    return other - out.gather(1, labels[:, None])[:, 0]


def scaled_margin(out: Tensor, labels: Tensor) -> Tensor:
    """The margin over the distance of the largest logit from the third: Croce and Hein's DLR, blind to scale."""
    ordered = out.sort(1, descending=True).values
    return margin(out, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


class Worst:
    """Of each sample the worst pixels so far: those misclassified before those that are not, then by loss."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels.clone()
        self.loss = torch.full((len(pixels),), -torch.inf, device=pixels.device)
        self.fooled = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)

    def look(self, near: Tensor, out: Tensor, loss: Tensor, labels: Tensor) -> None:
        fooled = out.argmax(1) != labels
        worse = (fooled & ~self.fooled) | ((fooled == self.fooled) & (loss > self.loss))
        self.pixels = torch.where(worse[:, None], near, self.pixels)
        self.loss = torch.where(worse, loss, self.loss)
        self.fooled |= fooled


def slope(logits: Logits, near: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the loss at ``near``, logits and losses there."""
    near = near.detach().requires_grad_()
    with torch.enable_grad():
        out = logits(near)
        each = loss(out, labels)
        (gradient,) = torch.autograd.grad(each.sum(), near)
    return gradient, out.detach(), each.detach()


def _start(start: Tensor | None, pixels: Tensor, radius: float) -> Tensor:
    return pixels.clone() if start is None else project(start, pixels, radius)


def pgd(
    logits: Logits,
    pixels: Tensor,
    labels: Tensor,
    radius: float,
    steps: int = 20,
    step: float = 0.25,
    loss: Loss = cross_entropy,
    start: Tensor | None = None,
) -> Tensor:
    """Signed gradient ascent from ``start`` or the pixels; ``step`` is in radii. Source: Madry et al., ICLR 2018."""
    near, worst = _start(start, pixels, radius), Worst(pixels)
    for _ in range(steps):
        gradient, out, each = slope(logits, near, labels, loss)
        worst.look(near, out, each, labels)
        near = project(near + step * radius * gradient.sign(), pixels, radius)
    with torch.no_grad():
        out = logits(near)
    worst.look(near, out, loss(out, labels), labels)
    return worst.pixels


def checkpoints(steps: int) -> list[int]:
    """After which steps ``apgd`` looks back: 22 % of them, then ever shorter periods."""
    at, period, found = 0, 22, set()  # per cent
    while at + period < 100:
        at += period
        found.add(-(-at * steps // 100))
        period = max(period - 3, 6)
    return sorted(found)


def apgd(
    logits: Logits,
    pixels: Tensor,
    labels: Tensor,
    radius: float,
    steps: int = 30,
    loss: Loss = scaled_margin,
    start: Tensor | None = None,
) -> Tensor:
    """Ascent with momentum whose step of each sample, 2 radii at first, halves where it has stopped to help.

    It halves, and goes back to the best point, where the loss rose in fewer than 75 % of the steps of a period, or
    neither step nor best loss have changed in it. Source: Croce and Hein, ICML 2020, algorithm 1.
    """
    x, worst = _start(start, pixels, radius), Worst(pixels)
    gradient, out, each = slope(logits, x, labels, loss)
    worst.look(x, out, each, labels)
    size = torch.full((len(x), 1), 2 * radius, device=x.device)
    best, best_x, best_gradient = each.clone(), x.clone(), gradient.clone()
    before, previous, rises = x.clone(), each, torch.zeros(len(x), device=x.device)
    halved, best_then, last, looks = torch.zeros_like(rises, dtype=torch.bool), best.clone(), 0, checkpoints(steps)
    for k in range(1, steps + 1):
        ahead = project(x + size * gradient.sign(), pixels, radius)
        if k > 1:
            ahead = project(x + 0.75 * (ahead - x) + 0.25 * (x - before), pixels, radius)
        before, x = x, ahead
        gradient, out, each = slope(logits, x, labels, loss)
        worst.look(x, out, each, labels)
        rises += each > previous
        previous = each
        better = each > best
        best = torch.where(better, each, best)
        best_x = torch.where(better[:, None], x, best_x)
        best_gradient = torch.where(better[:, None], gradient, best_gradient)
        if k in looks:
            stuck = ~halved & (best <= best_then)
            halved = (rises < 0.75 * (k - last)) | stuck
            size = torch.where(halved[:, None], size / 2, size)
            x = torch.where(halved[:, None], best_x, x)
            gradient = torch.where(halved[:, None], best_gradient, gradient)
            best_then, last = best.clone(), k
            rises.zero_()
    return worst.pixels


def square(
    logits: Logits,
    pixels: Tensor,
    labels: Tensor,
    radius: float,
    queries: int = 300,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random search that asks for logits alone: squares of pixels go to a side of the ball, and stay if that hurts.

    The pixels are a square image, row by row. It begins with stripes; the squares shrink from a third of the image's
    area to a pixel. Source: Andriushchenko et al., ECCV 2020, of which it is a simple variant.
    """
    side = round(pixels.shape[1] ** 0.5)
    if side * side != pixels.shape[1]:
        raise ValueError(f"pixels must be those of a square image, got {pixels.shape[1]} of them")
    generator = generator or torch.Generator().manual_seed(0)
    count, worst = len(pixels), Worst(pixels)
    index = torch.arange(side)

    def signs(*shape: int) -> Tensor:
        return 2 * torch.randint(0, 2, shape, generator=generator).to(pixels) - 1

    with torch.no_grad():
        stripes = signs(count, 1, side).expand(count, side, side).reshape(count, -1)
        for k in range(queries + 1):
            near = pixels if k == 0 else project(pixels + radius * stripes, pixels, radius)
            if k > 1:
                length = max(1, round(side * (0.33 * 0.5 ** (8 * k / queries)) ** 0.5))
                corner = torch.randint(0, side - length + 1, (2, count, 1), generator=generator)
                rows, columns = ((index >= c) & (index < c + length) for c in corner)
                inside = (rows[:, :, None] & columns[:, None, :]).reshape(count, -1).to(pixels.device)
                near = project(torch.where(inside, pixels + radius * signs(count, 1), worst.pixels), pixels, radius)
            out = logits(near)
            worst.look(near, out, margin(out, labels), labels)
    return worst.pixels


def standing(logits: Logits, attacked: Iterable[Tensor], labels: Tensor) -> float:
    """The share of samples that are classified rightly under every one of these attacks."""
    right = torch.ones_like(labels, dtype=torch.bool)
    with torch.no_grad():
        for near in attacked:
            right &= logits(near).argmax(1) == labels
    return right.double().mean().item()


def accuracy(logits: Logits, pixels: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (logits(pixels).argmax(1) == labels).double().mean().item()
