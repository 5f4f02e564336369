"""What the ranks of tests/distributed/ do; each is given its rank and how many there are."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

import deqfast as dq


def parts_of(N, size):
    """Where each rank's numbers begin and end: uneven, and of three ranks the middle one has none."""
    cuts = [0, N] if size == 1 else [0, N // 3, N] if size == 2 else [0, N // 3, N // 3, N]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


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


def synced_map(z, W, x, mean):
    """Centred over the samples of all ranks, as a normalisation that is kept in step would be."""
    y = torch.tanh(z @ W + x)
    return y - 0.2 * mean(y)


class Mean(torch.autograd.Function):
    """Of all samples on all ranks."""

    @staticmethod
    def forward(ctx, y):
        total = torch.cat([y.sum(0), y.new_tensor([float(len(y))])])
        dist.all_reduce(total)
        ctx.count, ctx.rows = total[-1], len(y)
        return total[:-1] / total[-1]

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous()
        dist.all_reduce(g)
        return (g / ctx.count).expand(ctx.rows, -1)


def rows_of(B, rank, size):
    """Unequal shares: the last rank of three has no sample."""
    cuts = [0, 1, B] if size == 2 else [0, 1, B, B]
    return slice(cuts[rank], cuts[rank + 1])


def consensus(rank, size, cases):
    found = []
    for case in cases:
        W, x = problem(case["B"], case["N"], case["dtype"])
        x = x * torch.linspace(0.1, 2, case["B"], dtype=x.dtype)[:, None]  # some are harder
        mine = x[rows_of(case["B"], rank, size)].clone()
        args = (W.requires_grad_(case["grad"]), mine.requires_grad_(case["grad"]))
        calls = 0

        def f(z, W, x):
            nonlocal calls
            calls += 1
            return synced_map(z, W, x, Mean.apply)

        result = solve(f, args, {**case["options"], "stop": "consensus"})
        if case["grad"]:
            dist.all_reduce(result["W"])
        found.append({**result, "calls": calls})
    return found


def consensus_alone(case):
    W, x = problem(case["B"], case["N"], case["dtype"])
    x = x * torch.linspace(0.1, 2, case["B"], dtype=x.dtype)[:, None]
    args = (W.requires_grad_(case["grad"]), x.requires_grad_(case["grad"]))
    return solve(lambda z, W, x: synced_map(z, W, x, lambda y: y.mean(0)), args, {**case["options"], "stop": "all"})


def wrong(rank, size, cases):
    """What each rank is told where they were not given what fits together: (kind of error, words) a case."""
    found = []
    for given in cases:
        mine = given[rank % len(given)]
        try:
            z0 = torch.zeros(mine.pop("shape", (2, 3)), dtype=mine.pop("dtype", torch.float32))
            group = None if mine.get("stop") == "consensus" else dist.group.WORLD
            dq.fixed_point(lambda z: 0.5 * z + 1, z0, **{"group": group, **mine})
            found.append(("nothing", ""))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return found


def nan_on_one(rank, size):
    """Of two samples the second is NaN on the last rank alone."""
    bad = torch.tensor([[0.0], [torch.nan if rank == size - 1 else 0.0]])
    sol = dq.fixed_point(lambda z: 0.5 * z + 1 + bad, torch.zeros(2, 3), group=dist.group.WORLD)
    return told(sol)


def own_loop(rank, size, folder):
    """A loop by hand that is stopped, saved, and taken up by another state; the iterates of both ways."""
    found = {}
    for solver in (dq.Anderson(m=4), dq.Broyden()):
        f = SpreadMap("tanh", rank, size, *problem(3, 40, torch.float64))

        def begin(solver=solver, f=f):
            return solver.init(torch.zeros_like(f.x), rtol=1e-9, max_iter=60, group=dist.group.WORLD)

        through = begin()
        while not through.done:
            through.step(f(through.z, f.W, f.x))
        first = begin()
        for _ in range(6):
            first.step(f(first.z, f.W, f.x))
        torch.save(first.state_dict(), f"{folder}/state{rank}")
        second = begin()
        second.load_state_dict(torch.load(f"{folder}/state{rank}", weights_only=True))
        while not second.done:
            second.step(f(second.z, f.W, f.x))
        refused = []
        steered = dq.Anderson(type=2).init(torch.zeros_like(f.x), group=dist.group.WORLD)
        calls = (
            lambda s=second: copy.deepcopy(s),
            lambda s=second: s.keep([0]),
            lambda s=steered: s.step(s.z, residual=s.z + 1),
        )
        for call in calls:
            try:
                call()
            except ValueError as error:
                refused.append(str(error))
        found[type(solver).__name__] = (torch.equal(through.z, second.z), through.nfe, second.nfe, refused)
    return found


def meshed(rank, size):
    """DTensor states with each placement: the whole solution, and gradients; then what cannot be."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    found = {}
    for name, placement in (("batch", Shard(0)), ("numbers", Shard(1)), ("replicated", Replicate())):
        W, x = problem(5, 13, torch.float64)
        W = distribute_tensor(W, mesh, [Shard(1) if name == "numbers" else Replicate()]).requires_grad_()
        x = distribute_tensor(x, mesh, [placement]).requires_grad_()
        z0 = distribute_tensor(torch.zeros(5, 13, dtype=torch.float64), mesh, [placement])

        def f(z, W, x, gathers=name == "numbers"):
            full = z.redistribute(z.device_mesh, [Replicate()]) if gathers else z
            return torch.tanh(full @ W + x)

        sol = dq.fixed_point(f, z0, (W, x), rtol=1e-10)
        (sol.z**2).sum().backward()
        found[name] = {
            "is": isinstance(sol.z, DTensor) and tuple(sol.z.placements) == (placement,),
            "z": sol.z.full_tensor().detach(),
            "evaluations": sol.evaluations,
            "W": W.grad.full_tensor(),
            "x": x.grad.full_tensor(),
        }
    told = []
    two = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "model"))
    plain = torch.zeros(5, 3)
    cases: tuple[Any, ...] = (
        (DTensor.from_local(plain, mesh, [Partial()]), {}),
        ((distribute_tensor(plain, mesh, [Shard(0)]), plain), {}),
        ((distribute_tensor(plain, mesh, [Shard(0)]), distribute_tensor(plain, two, [Shard(0), Replicate()])), {}),
        (distribute_tensor(plain, mesh, [Shard(1)]), {"group": dist.group.WORLD}),
        (distribute_tensor(plain, mesh, [Shard(1)]), {"stop": "consensus"}),
    )
    for z0, options in cases:
        try:
            dq.fixed_point(lambda z: z, z0, **options)
            told.append("nothing")
        except (TypeError, ValueError) as error:
            told.append(str(error))
    return found, told


def one_dies(rank, size):
    """The last rank is killed at its third evaluation."""
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        if calls == 3 and rank == size - 1:
            os._exit(9)
        return 0.9 * z + 1

    return told(dq.fixed_point(f, torch.zeros(2, 3), rtol=1e-6, group=dist.group.WORLD))
