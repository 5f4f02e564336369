"""A few-shot equilibrium learner: its context vector is the input that a joint solve optimises, an episode a sample.

In an episode with support digits s_1..s_n, z*_i = tanh(W z*_i + U s_i + V x + b) share the context x (codes,), which
also writes the read-out: logits (H_0 + M x) z*_i. The context minimises the summed cross-entropy of
the support and penalty ||x||^2; the weights then minimise that of the queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORM_BOUND = 0.9  # of ||W||_2
PENALTY = 0.1


class Learner(nn.Module):
    """f, the cost of the support, and the logits at a context."""

    def __init__(self, ways: int, codes: int, hidden: int) -> None:
        super().__init__()
        self.ways, self.codes, self.hidden = ways, codes, hidden
        self.inner = nn.Linear(hidden, hidden, bias=False)
        self.inject = nn.Linear(64, hidden)
        self.context = nn.Linear(codes, hidden, bias=False)
        self.write = nn.Linear(codes, ways * hidden)
        with torch.no_grad():
            self.write.weight.mul_(0.5)
        self.bound()

    def f(self, z: Tensor, x: Tensor, digits: Tensor, *_: Tensor) -> Tensor:
        """z (B, n, hidden), x (B, codes), digits (B, n, 64)."""
        return torch.tanh(self.inner(z) + self.inject(digits) + self.context(x).unsqueeze(1))

    def logits(self, z: Tensor, x: Tensor) -> Tensor:
        read_out = self.write(x).view(-1, self.ways, self.hidden)
        return z @ read_out.mT

    def loss(self, z: Tensor, x: Tensor, digits: Tensor, labels: Tensor) -> Tensor:
        """(B,): cross-entropy summed over the support, and the penalty."""
        entropy = nn.functional.cross_entropy(self.logits(z, x).mT, labels, reduction="none").sum(1)
        return entropy + PENALTY * x.square().sum(1)

    def start(self, digits: Tensor) -> tuple[Tensor, Tensor]:
        return digits.new_zeros(*digits.shape[:2], self.hidden), digits.new_zeros(len(digits), self.codes)

    @torch.no_grad()
    def bound(self) -> None:
        """Scale W back to ||W||_2 <= NORM_BOUND."""
        weight = self.inner.weight
        weight *= (NORM_BOUND / torch.linalg.matrix_norm(weight, 2)).clamp(max=1.0)


def turned(pools: list[Tensor]) -> list[Tensor]:
    """Eight classes of each: quarter turns, and those of the mirror image."""
    found = []
    for pool in pools:
        image = pool.view(-1, 8, 8)
        found += [torch.rot90(t, k, (1, 2)).reshape(len(pool), 64) for t in (image, image.mT) for k in range(4)]
    return found


class Episodes:
    """Draws episodes: ``ways`` of the classes in random order, ``shots`` support digits and ``queries`` of each."""

    def __init__(self, pools: list[Tensor], ways: int, seed: int) -> None:
        self.pools, self.ways, self.generator = pools, ways, torch.Generator().manual_seed(seed)

    def draw(self, batch: int, shots: int, queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Support (B, ways * shots, 64) and its labels, queries (B, ways * queries, 64) and theirs."""
        support, asked = [], []
        for _ in range(batch):
            chosen = torch.randperm(len(self.pools), generator=self.generator)[: self.ways].tolist()
            picks = []
            for c in chosen:
                order = torch.randperm(len(self.pools[c]), generator=self.generator)[: shots + queries]
                picks.append(self.pools[c][order.to(self.pools[c].device)])
            support.append(torch.cat([p[:shots] for p in picks]))
            asked.append(torch.cat([p[shots:] for p in picks]))
        device = support[0].device
        truth = [torch.arange(self.ways, device=device).repeat_interleave(n).repeat(batch, 1) for n in (shots, queries)]
        return torch.stack(support), truth[0], torch.stack(asked), truth[1]
