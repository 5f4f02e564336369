"""What the ranks of tests/distributed/test_rank_checkpoints.py do: save a solve, end it, and take up that of others."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from spread_maps import parts_of, problem
from torch.utils import _pytree as pytree

import deqfast as dq


def cuts(sizes, size):
    """Uneven shares of so many numbers: of three ranks the middle one has none."""
    return [parts_of(n, size) for n in sizes]


class Flat:
    """A sample is N numbers."""

    def __init__(self, N):
        self.N = N

    def whole(self, flat):
        return flat

    def flat(self, tree):
        return tree

    def part(self, tree, rank, size):
        return tree[:, parts_of(self.N, size)[rank]].clone()

    def join(self, parts):
        return torch.cat(parts, dim=1)


class Image(Flat):
    """A sample is an image of 8 columns, which are spread."""

    def whole(self, flat):
        return flat.reshape(len(flat), -1, 8)

    def flat(self, tree):
        return tree.reshape(len(tree), -1)

    def part(self, tree, rank, size):
        return tree[..., parts_of(8, size)[rank]].clone()

    def join(self, parts):
        return torch.cat(parts, dim=2)


class ChannelsLast(Flat):
    """Images of 2 channels and 4 columns in that memory order; rows are spread."""

    def whole(self, flat):
        image = flat.reshape(len(flat), 2, -1, 4)
        return image.to(memory_format=torch.channels_last)

    def flat(self, tree):
        return tree.reshape(len(tree), -1)

    def part(self, tree, rank, size):
        rows = tree[:, :, parts_of(tree.shape[2], size)[rank]]
        return rows.contiguous(memory_format=torch.channels_last)

    def join(self, parts):
        return torch.cat(parts, dim=2)


class Tree(Flat):
    """Two tensors, of a third and the rest of the numbers."""

    def whole(self, flat):
        return {"a": flat[:, : self.N // 3], "b": (flat[:, self.N // 3 :],)}

    def flat(self, tree):
        return torch.cat(pytree.tree_leaves(tree), dim=1)

    def part(self, tree, rank, size):
        return pytree.tree_map(lambda t: t[:, parts_of(t.shape[1], size)[rank]].clone(), tree)

    def join(self, parts):
        leaves = [torch.cat(ts, dim=1) for ts in zip(*map(pytree.tree_leaves, parts), strict=True)]
        return pytree.tree_unflatten(leaves, pytree.tree_structure(parts[0]))


class Complex(Flat):
    """N / 2 complex numbers."""

    def whole(self, flat):
        return torch.view_as_complex(flat.reshape(len(flat), -1, 2))

    def flat(self, tree):
        return torch.view_as_real(tree).reshape(len(tree), -1)

    def part(self, tree, rank, size):
        return tree[:, parts_of(self.N // 2, size)[rank]].clone()

    def join(self, parts):
        return torch.cat(parts, dim=1)


class OneSample(Flat):
    """The whole state is one sample."""

    def whole(self, flat):
        return flat[0]

    def flat(self, tree):
        return tree[None]

    def part(self, tree, rank, size):
        return tree[parts_of(self.N, size)[rank]].clone()

    def join(self, parts):
        return torch.cat(parts)


class Rows(Flat):
    """Samples are dealt out, unevenly."""

    def part(self, tree, rank, size):
        cuts = {1: [0, 5], 2: [0, 1, 5], 3: [0, 1, 5, 5]}[size]
        return tree[list(itertools.starmap(slice, itertools.pairwise(cuts)))[rank]].clone()

    def join(self, parts):
        return torch.cat(parts, dim=0)


FORMS = {f.__name__: f for f in (Flat, Image, ChannelsLast, Tree, Complex, OneSample, Rows)}


class Solve:
    """A case on one of several ranks: a fresh state, and f of its part."""

    def __init__(self, case, rank, size):
        self.case, self.rank, self.size = case, rank, size
        self.form = FORMS[case["form"]](case["N"])
        W, x = problem(case["B"], case["N"], case["dtype"])
        # Some samples stop earlier than others, a few before the checkpoint.
        self.x = x * torch.logspace(-4 if case["B"] > 1 else 0, 0, case["B"], dtype=x.dtype)[:, None]
        self.W = W

    def begin(self, **more):
        z0 = self.form.part(self.form.whole(torch.zeros_like(self.x)), self.rank, self.size)
        options = {**self.case["options"], **more}
        alone = self.size == 1
        if options.get("stop") == "consensus" and alone:
            options["stop"] = "all"
        elif not alone and not (self.case["form"] == "Rows" and "stop" not in options):
            options["group"] = dist.group.WORLD
        return self.case["solver"].init(z0, **options)

    def stateful(self, state):
        return dq.BatchShard(state) if self.size > 1 and state.shared is None else state

    def f(self, z):
        if self.form.__class__ is Rows:  # every rank for itself
            x = self.form.part(self.x, self.rank, self.size)
            return torch.tanh(z @ self.W + x)
        parts = [z]
        if self.size > 1:
            parts = [None] * self.size
            dist.all_gather_object(parts, z)
        new = torch.tanh(self.form.flat(self.form.join(parts)) @ self.W + self.x)
        return self.form.part(self.form.whole(new), self.rank, self.size)

    def run(self, state, until=math.inf):
        while not state.done and state.nfe < until:
            state.step(self.f(state.z))
        return state

    def told(self, state):
        sol = state.solution()
        return {
            "z": sol.z,
            "evaluations": sol.evaluations,
            "steps": sol.steps,
            "status": sol.status,
            "residual": sol.residual,
            "events": sol.events,
        }


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save(rank, size, cases, folder):
    """Each case is saved underway, goes on to its end, and tells what that is; one is saved in the background."""
    found = []
    behind = dist.new_group(backend="gloo")
    for name, case in cases.items():
        solve = Solve(case, rank, size)
        state = solve.run(solve.begin(), case["at"])
        with quiet():
            whole = {"solve": solve.stateful(state)}
            where = f"{folder}/{name}-{size}"
            if case.get("background"):
                pending = dcp.async_save(whole, checkpoint_id=where, process_group=behind)
                solve.run(state, case["at"] + 2)  # which the checkpoint does not see
                pending.result()
            else:
                dcp.save(whole, checkpoint_id=where)
        if case.get("more"):
            state.extend(case["more"])
        found.append(solve.told(solve.run(state)))
    return found


def load(rank, size, cases, folder, sources):
    """Each case is taken up from where each number of ranks has left it, and goes on to its end."""
    found = {}
    for name, case in cases.items():
        for source in sources:
            solve = Solve(case, rank, size)
            state = solve.run(solve.begin(), 2)  # what it was before does not matter
            with quiet():
                if source == size:
                    dcp.load({"solve": solve.stateful(state)}, checkpoint_id=f"{folder}/{name}-{source}")
                else:
                    dq.restore(solve.stateful(state), f"{folder}/{name}-{source}")
            at = state.nfe
            if case.get("more"):
                state.extend(case["more"])
            found[name, source] = {**solve.told(solve.run(state)), "at": at}
    return found


def refused(rank, size, cases, folder, attempts):
    """What each rank is told of each attempt: (kind of error, words), and whether its state is as before."""
    found = []
    for source, how, changes in attempts:
        case = {**cases[source.partition("-")[0]], **changes}
        solve = Solve(case, rank, size)
        state = solve.run(solve.begin(), 3)
        before = [t.clone() for t in pytree.tree_leaves(state.z)]
        try:
            with quiet():
                if how == "restore":
                    dq.restore(solve.stateful(state), f"{folder}/{source}", **case.get("restore", {}))
                else:
                    dcp.load({"solve": solve.stateful(state)}, checkpoint_id=f"{folder}/{source}")
            told = ("nothing", "")
        except BaseException as error:
            told = (type(error).__name__, str(error))
        same = all(map(torch.equal, before, pytree.tree_leaves(state.z)))
        found.append((*told, same and state.nfe == 3))
    return found


def one_file_is_wrong(rank, size, case):
    """A state of its own file, on the last rank one of other options: what each is told."""
    solve = Solve(case, rank, size)
    state = solve.run(solve.begin(), 3)
    saved = state.state_dict()
    if rank == size - 1:
        saved["options"] = "Anderson(m=77)"
    try:
        state.load_state_dict(saved)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""
