"""What the ranks of tests/distributed/ do; each is given its rank and how many there are."""

from __future__ import annotations

import torch
import torch.distributed as dist

import deqfast as dq


def parts_of(N, size):
    """Where each rank's numbers begin and end: uneven, and the last rank may have none."""
    cuts = [0, *((N * (r + 1)) // (size + 1) + r for r in range(size - 1)), N]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def problem(B, N, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, N, generator=generator, dtype=torch.float64)
    W *= 0.9 / torch.linalg.matrix_norm(W, 2)
    x = torch.randn(B, N, generator=generator, dtype=torch.float64)
    return W.to(dtype), x.to(dtype)


def whole_map(z, W, x):
    return torch.tanh(z @ W + x)


class Gather(torch.autograd.Function):
    """The tensors of all ranks; the gradient is the sum of what each rank says of this one's."""

    @staticmethod
    def forward(ctx, t):
        every = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(every, t.contiguous())
        return torch.stack(every)

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous()
        dist.all_reduce(g)
        return g[dist.get_rank()]


class SpreadMap:
    """The same map, each rank with some columns of z: it gathers what the others have of it."""

    def __init__(self, rank, size, W, x):
        self.parts = parts_of(W.shape[0], size)
        self.mine, self.rank = self.parts[rank], rank
        self.width = max(p.stop - p.start for p in self.parts)
        self.W, self.x = W[:, self.mine].clone(), x[:, self.mine].clone()

    def __call__(self, z, W, x):
        padded = torch.nn.functional.pad(z, (0, self.width - z.shape[1]))
        every = Gather.apply(padded)
        full = torch.cat([t[:, : p.stop - p.start] for t, p in zip(every, self.parts, strict=True)], dim=1)
        return torch.tanh(full @ W + x)


def solve(rank, size, B, N, dtype, solver, options, grad=False, scale=1.0):
    W, x = problem(B, N, dtype)
    f = SpreadMap(rank, size, W, x * scale)
    for t in (f.W, f.x):
        t.requires_grad_(grad)
    sol = dq.fixed_point(f, torch.zeros_like(f.x), (f.W, f.x), solver=solver, group=dist.group.WORLD, **options)
    found = {"z": sol.z.detach(), "steps": sol.steps, "status": sol.status, "residual": sol.residual}
    found |= {"evaluations": sol.evaluations, "events": sol.events}
    if grad:
        sol.z.square().sum().backward()
        found |= {"W": f.W.grad, "x": f.x.grad}
    return found
