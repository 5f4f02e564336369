"""A solve that outlives its processes: spread over ranks, saved every few evaluations, taken up after a crash.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/elastic_solve.py --folder out/elastic

When a process dies, torchrun's agent ends the others and starts all anew; they find the last complete checkpoint and go
on from there, with what the solver had learned of f. So does a later call with another number of processes. To see
it, let one die: ``--kill-at 70``. (Without the variable, processes that were started anew may find the addresses of the
old ones in the agent's store, and wait for those: https://github.com/pytorch/pytorch/issues/135712.)

The map is a Jacobi sweep for the Bratu problem, -div grad u = lam exp(u) on the unit square with u = 0 around it, on
n x n points. Each rank has some rows of the grid, and asks its neighbours for the row next to its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import deqfast as dq

KEPT = 2  # checkpoints: the newest may be half written when its processes die


class Bratu:
    """One Jacobi sweep on the rows that are here, (1, rows, n)."""

    def __init__(self, n: int, lam: float, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.rows = len(range(rank, n, size))
        self.source = lam / (n + 1) ** 2
        self.n = n

    def __call__(self, u: Tensor) -> Tensor:
        above, below = self._neighbours(u)
        tall = torch.cat([above, u, below], dim=1)
        wide = torch.nn.functional.pad(u, (1, 1))
        around = tall[:, :-2] + tall[:, 2:] + wide[..., :-2] + wide[..., 2:]
        return (around + self.source * torch.exp(u)) / 4

    def _neighbours(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The last row of the rank above and the first of the one below; 0 at the edges of the square."""
        above, below = torch.zeros_like(u[:, :1]), torch.zeros_like(u[:, :1])
        calls = []
        for other, mine, theirs in ((self.rank - 1, u[:, :1], above), (self.rank + 1, u[:, -1:], below)):
            if 0 <= other < self.size:
                calls += [dist.P2POp(dist.isend, mine.contiguous(), other), dist.P2POp(dist.irecv, theirs, other)]
        for work in dist.batch_isend_irecv(calls) if calls else []:
            work.wait()
        return above, below


def newest(folder: Path) -> Path | None:
    """The last checkpoint whose metadata, which are written last, are there; the same on every rank."""
    complete = sorted(p for p in folder.glob("step-*") if (p / ".metadata").exists())
    told = [complete[-1] if complete else None]  # of rank 0: a file system may show others later
    dist.broadcast_object_list(told)
    return told[0]


def save(state: dq.SolverState, folder: Path) -> None:
    """Write a checkpoint, then let old ones go."""
    dcp.save({"solve": state}, checkpoint_id=folder / f"step-{state.nfe:08d}")
    if dist.get_rank() == 0:
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)


def solve(args: argparse.Namespace) -> dict[str, Any]:
    """Start or go on, to the end; what there is to tell."""
    rank, size = dist.get_rank(), dist.get_world_size()
    f = Bratu(args.n, args.lam, rank, size)
    z0 = torch.zeros(1, f.rows, args.n, dtype=torch.float64)
    solver = dq.Broyden() if args.solver == "broyden" else dq.Anderson(m=args.m)
    state = solver.init(z0, rtol=args.rtol, max_iter=args.max_iter, group=dist.group.WORLD, resumable=True)
    found = newest(args.folder)
    if found is not None:
        dq.restore(state, found)
    began = state.nfe
    while not state.done:
        state.step(f(state.z))
        if state.nfe % args.every == 0:
            save(state, args.folder)
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if state.nfe == args.kill_at and first_life and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    solution = state.solution()
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, solution.z)
    whole = torch.cat(parts, dim=1)
    if rank == 0:
        torch.save(whole, args.folder / "answer.pt")
    return {
        "processes": size,
        "began at evaluation": began,
        "evaluations": solution.evaluations,
        "converged": bool(solution.converged.all()),
        "residual": float(solution.residual.max()),
        "u at the middle": float(whole[0, args.n // 2, args.n // 2]),
    }


def main() -> None:
    """One of torchrun's processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("out/elastic"), help="where checkpoints and answer.pt go")
    parser.add_argument("--every", type=int, default=20, help="evaluations from one checkpoint to the next")
    parser.add_argument("--solver", choices=("anderson", "broyden"), default="anderson")
    parser.add_argument("--m", type=int, default=10, help="Anderson's columns")
    parser.add_argument("--n", type=int, default=48, help="points along a side")
    parser.add_argument("--lam", type=float, default=5.0, help="below 6.8, where there is a solution")
    parser.add_argument("--rtol", type=float, default=1e-10)
    parser.add_argument("--max-iter", type=int, default=2000)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds after which a silent rank counts as dead")
    parser.add_argument("--kill-at", type=int, default=0, help="let the last rank die at this evaluation, once")
    args = parser.parse_args()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        parser.error("set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or a restart may wait for the dead")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=args.timeout))
    args.folder.mkdir(parents=True, exist_ok=True)
    told = solve(args)
    if dist.get_rank() == 0:
        print(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
