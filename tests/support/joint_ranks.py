"""What ranks of tests/distributed/test_joint_*.py do: joint solves of the whole problem, and of each rank's part."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from spread_maps import Mean, rows_of

import deqfast as dq
from deqfast.ops import shared
from deqfast.ops.ranks import Ranks
from deqfast.project import L2Ball


def half(x):
    """A projection of one's own, number by number."""
    return x.clamp(-0.5, 0.5)


def seventh(k, state):
    """A callback that ends the solve."""
    return k == 7


def schedule(k):
    return 0.3 / (1 + 0.1 * k)


def parts_of(n, size):
    """Where each rank's numbers begin and end: uneven, and of three ranks the middle one has none."""
    cuts = [0, n] if size == 1 else [0, n // 3, n] if size == 2 else [0, n // 3, n // 3, n]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def numbers(case):
    """The whole problem's tensors: W, U, b, C, y."""
    g = torch.Generator().manual_seed(case.get("seed", 0))
    B, N, n = case["B"], case["N"], case["n"]

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    W = random(N, N)
    W = W * 0.5 / torch.linalg.matrix_norm(W, 2)
    found = W, random(n, N) / max(n, 1) ** 0.5, random(B, N), torch.eye(N) + 0.2 * random(N, N) / N**0.5, random(B, N)
    return [t.to(case["dtype"]) for t in found]


class Gather(torch.autograd.Function):
    """The tensors of all ranks; the gradient is the sum of what each rank says of this one's. Differentiable twice."""

    @staticmethod
    def forward(ctx, t):
        every = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(every, t.contiguous())
        return torch.stack(every)

    @staticmethod
    def backward(ctx, g):
        return SumOfMine.apply(g)


class SumOfMine(torch.autograd.Function):
    """Of what all ranks have, (ranks, ...) each, the sum of this rank's."""

    @staticmethod
    def forward(ctx, g):
        g = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(g)
        return g[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx, h):
        return Gather.apply(h)


class Part:
    """The map and the loss of a rank that has columns ``z`` of the state and ``x`` of the input; sums over ranks.

    ``gather``: the whole tensor from this rank's part of it.
    """

    def __init__(self, case, z, x, gather_z, gather_x):
        W, U, b, C, y = numbers(case)
        self.case, self.gather_z, self.gather_x = case, gather_z, gather_x
        self.W, self.U, self.b = (t[:, z].clone().requires_grad_(case["grad"]) for t in (W, U, b))
        self.C, self.y = C[:, z].clone(), y[:, z].clone()
        self.z0 = torch.zeros_like(self.b).detach()
        x0 = torch.zeros(case["B"], case["n"], dtype=case["dtype"])
        self.x0: Any = x0[:, x].clone() if case["n"] else ()
        self.options = dict(case["options"])
        center = self.options.pop("center", None)
        project = self.options.get("project")
        if center is not None:
            self.options["project"] = L2Ball(project, center * torch.ones_like(self.x0))
        if self.options.get("step_size") == "tensors":
            self.options["step_size"] = torch.linspace(0.1, 0.3, case["n"], dtype=case["dtype"])[x].clone()

    def f(self, z, x, W, U, b):
        y = self.gather_z(z) @ W + b
        if self.case["n"]:
            y = y + self.gather_x(x) @ U
        if self.case.get("coupled"):
            y = y + 0.2 * z.roll(1, 0)
        return torch.tanh(y)

    def loss(self, z, x, W, U, b):
        missed = self.gather_z(z) @ self.C - self.y
        dims = (1,) if self.options.get("batch_dims", 1) == 1 else (0, 1)
        cost = 0.5 * missed.square().sum(dims)
        if self.case["n"]:
            cost = cost + 0.5 * x.square().sum(dims)
        return cost

    def solve(self, **more):
        args = self.W, self.U, self.b
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dq.CouplingWarning)
            sol = dq.joint_solve(self.f, self.loss, self.z0, self.x0, args, **self.options, **more)
        found = {name: getattr(sol, name) for name in ("cost", "residual", "steps", "status", "nfe", "trace")}
        if self.case["grad"]:
            out = sol.z.square().sum()
            if self.options.get("backward") == "implicit":
                out = out + sol.mu.square().sum() + sol.x.square().sum()
            out.backward()
            found |= {name: getattr(self, name).grad for name in ("W", "U", "b") if self.case["n"] or name != "U"}
        found |= {
            "z": sol.z.detach(),
            "mu": sol.mu.detach(),
            "x": sol.x.detach() if self.case["n"] else sol.z[:, :0].detach(),
        }
        return found


def whole(case):
    every = slice(None)
    return Part(case, every, every, lambda t: t, lambda t: t).solve()


def gatherer(parts):
    width = max(p.stop - p.start for p in parts)

    def gather(t):
        every = Gather.apply(torch.nn.functional.pad(t, (0, width - t.shape[1])))
        return torch.cat([t[:, : p.stop - p.start] for t, p in zip(every, parts, strict=True)], dim=1)

    return gather


def spread(rank, size, cases):
    """Each case on these ranks."""
    found = []
    for case in cases:
        z, x = parts_of(case["N"], size), parts_of(case["n"], size)
        part = Part(case, z[rank], x[rank], gatherer(z), gatherer(x))
        found.append(part.solve(group=dist.group.WORLD))
    return found


def rows(case, mine, mean, **more):
    """Samples of one's own, in a map and a loss that hold a mean over the samples of all ranks."""
    W, U, b, C, y = numbers(case)
    b, y = b[mine] * torch.linspace(0.1, 2, case["B"], dtype=b.dtype)[mine, None], y[mine]  # some are harder
    args = W.requires_grad_(), U.requires_grad_()
    calls = 0

    def f(z, x, W, U):
        nonlocal calls
        calls += 1
        t = torch.tanh(z @ W + x @ U + b)
        return t - 0.05 * mean(t)

    def loss(z, x, W, U):
        return 0.5 * (z @ C - y).square().sum(1) + 0.5 * x.square().sum(1)

    x0 = torch.zeros(len(b), case["n"], dtype=b.dtype)
    sol = dq.joint_solve(f, loss, torch.zeros_like(b), x0, args, **case["options"], **more)
    found = {name: getattr(sol, name) for name in ("cost", "steps", "status", "nfe", "mu", "x")}
    made = calls
    sol.z.square().sum().backward()
    return found | {"z": sol.z.detach(), "W": W.grad, "U": U.grad, "made": made, "calls": calls}


def consensus(rank, size, cases):
    found = []
    for case in cases:
        result = rows(case, rows_of(case["B"], rank, size), Mean.apply, stop="consensus")
        for name in ("W", "U"):
            dist.all_reduce(result[name])
        found.append(result)
    return found


def consensus_alone(case):
    return rows(case, slice(None), lambda t: t.mean(0), stop="all")


def wrong(rank, size, cases):
    """What each rank is told where they were not given what fits together: (kind of error, words) a case."""
    found = []
    for given in cases:
        mine = dict(given[rank % len(given)])
        shape, kind = mine.pop("shape", (2, 3)), mine.pop("kind", "")
        z0, x0 = torch.zeros(shape), torch.full((2, 3), mine.pop("at", 0.0))

        def f(z, x, kind=kind):
            return (z if kind == "no x" else 0.5 * z + x)[:, : 1 if kind == "shape" else None]

        def loss(z, x, kind=kind):
            if kind == "constant":
                return torch.zeros(2)
            return (z - 1).square().sum(1) if kind != "mean" else (z - 1).square().mean()

        group = None if mine.get("stop") == "consensus" else dist.group.WORLD
        try:
            dq.joint_solve(f, loss, z0, x0, **{"group": group, "step_size": 0.1, **mine})
            found.append(("nothing", ""))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return found


def nan_on_one(rank, size):
    """Of two samples the cost of the second is NaN on the last rank alone, and of a third f is."""
    last = rank == size - 1
    bad = torch.tensor([0.0, torch.nan if last else 0.0, 0.0])
    worse = torch.tensor([[0.0], [0.0], [torch.nan if last else 0.0]])
    sol = dq.joint_solve(
        lambda z, x: 0.5 * z + x + worse,
        lambda z, x: (z - 1).square().sum(1) + x.square().sum(1) + bad,
        torch.zeros(3, 3),
        torch.zeros(3, 3),
        step_size=0.05,
        max_iter=200,
        group=dist.group.WORLD,
    )
    return sol.status, sol.cost


def nan_on_all_of_one(rank, size):
    """With samples of their own: those of the last rank are NaN from the first evaluation on."""
    calls = 0

    def f(z, x):
        nonlocal calls
        calls += 1
        ranks = torch.ones(1)
        dist.all_reduce(ranks)  # each has to be there
        return 0.5 * z + x + (torch.nan if rank == size - 1 else 0.0)

    sol = dq.joint_solve(
        f,
        lambda z, x: (z - 1).square().sum(1) + x.square().sum(1),
        torch.zeros(2, 3),
        torch.zeros(2, 3),
        step_size=0.05,
        max_iter=200,
        stop="consensus",
        backward="none",
    )
    return sol.status, calls


class Counting(Ranks):
    """Ranks that count their sums."""

    made = 0

    def add(self, t: torch.Tensor) -> None:
        Counting.made += 1
        super().add(t)


def sums(rank, size, cases):
    """Of each case how many sums are made from one evaluation to the next."""
    vars(shared)["Ranks"] = Counting
    found = []
    for options in cases:
        after: list[int] = []

        def look(k, state, after=after):
            after.append(Counting.made)

        dq.joint_solve(
            lambda z, x: 0.5 * z + x,
            lambda z, x: (z - 1).square().sum(1) + x.square().sum(1),
            torch.zeros(1, 3),
            torch.zeros(1, 3),
            step_size=0.05,
            rtol=0.0,
            max_iter=6,
            callback=look,
            group=dist.group.WORLD,
            **options,
        )
        found.append([b - a for a, b in itertools.pairwise(after)])
    return found
