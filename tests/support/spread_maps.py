"""What the ranks of tests/distributed/ do; each is given its rank and how many there are."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.distributed as dist

import deqfast as dq


def parts_of(N, size):
    """Where each rank's numbers begin and end: uneven, and of three ranks the middle one has none."""
    cuts = [0, N] if size == 1 else [0, N // 3, N] if size == 2 else [0, N // 3, N // 3, N]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def problem(B, N, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, N, generator=generator, dtype=torch.float64)
    W *= 0.9 / torch.linalg.matrix_norm(W, 2)
    x = torch.randn(B, N, generator=generator, dtype=torch.float64)
    return W.to(dtype), x.to(dtype)


MAPS = {
    "tanh": lambda full, W, x: torch.tanh(full @ W + x),
    "affine": lambda full, W, x: full @ W + 1e9 * x,  # the magnitude is another one after a step
    "steep": lambda full, W, x: 1e30 * (full @ W) + x,  # a mix of float32 overflows
    "coupled": lambda full, W, x: 0.9 * (full @ W).roll(1, 0) + torch.linspace(0, 1, len(x), dtype=x.dtype)[:, None],
}


def whole_map(kind, z, W, x):
    return MAPS[kind](z, W, x)


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
    """A map, each rank with some columns of z: it gathers what the others have of it."""

    def __init__(self, kind, rank, size, W, x):
        self.kind, self.parts = kind, parts_of(W.shape[0], size)
        self.mine = self.parts[rank]
        self.width = max(p.stop - p.start for p in self.parts)
        self.W, self.x = W[:, self.mine].clone(), x[:, self.mine].clone()

    def __call__(self, z, W, x):
        padded = torch.nn.functional.pad(z, (0, self.width - z.shape[1]))
        every = Gather.apply(padded)
        full = torch.cat([t[:, : p.stop - p.start] for t, p in zip(every, self.parts, strict=True)], dim=1)
        return MAPS[self.kind](full, W, x)


def told(sol):
    return {
        "z": sol.z.detach(),
        "steps": sol.steps,
        "status": sol.status,
        "residual": sol.residual,
        "evaluations": sol.evaluations,
        "events": sol.events,
        "states": None if sol.states is None else [t.detach() for t in sol.states],
        "trace": sol.trace,
    }


def solve(f, args, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sol = dq.fixed_point(f, torch.zeros_like(args[1]), args, **options)
        found = told(sol)
        if args[0].requires_grad:
            sol.z.square().sum().backward()
            found |= {"W": args[0].grad, "x": args[1].grad, "backward": sol.backward.evaluations}
    return found


def whole(case):
    W, x = problem(case["B"], case["N"], case["dtype"])
    args = (W.requires_grad_(case["grad"]), x.requires_grad_(case["grad"]))
    return solve(functools.partial(whole_map, case["kind"]), args, case["options"])


def spread(rank, size, cases):
    """Each case on these ranks."""
    found = []
    for case in cases:
        f = SpreadMap(case["kind"], rank, size, *problem(case["B"], case["N"], case["dtype"]))
        args = (f.W.requires_grad_(case["grad"]), f.x.requires_grad_(case["grad"]))
        found.append(solve(f, args, {**case["options"], "group": dist.group.WORLD}))
    return found
