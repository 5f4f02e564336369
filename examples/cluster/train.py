"""Train an equilibrium network on several processes, and go on where a job ended.

    torchrun --standalone --nproc-per-node 2 examples/cluster/train.py --epochs 6 --checkpoint out/cluster

Plain torch.distributed: NCCL where there are GPUs, else gloo; DistributedDataParallel; a checkpoint an epoch by
torch.distributed.checkpoint, taken up by whatever number of processes the next job has. `dq.Metrics` of the first rank
go to TensorBoard where that is installed, and to the screen.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import deqfast as dq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from frame import digits

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None  # type: ignore[assignment, misc]


class Cell(nn.Module):
    """Z = tanh(W z + U x + b), with ||W|| at most 0.95: one solution, and found in few evaluations."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.recurrent, self.given = nn.Linear(hidden, hidden, bias=False), nn.Linear(inputs, hidden)
        with torch.no_grad():
            nn.init.orthogonal_(self.recurrent.weight, gain=0.7)

    @torch.no_grad()
    def project(self) -> None:
        """After a step of the optimiser; alike on all ranks."""
        w = self.recurrent.weight
        w.mul_((0.95 / torch.linalg.matrix_norm(w, 2)).clamp(max=1.0))

    def init(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.recurrent.out_features)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + self.given(x))


class Classifier(nn.Module):
    def __init__(self, metrics: dq.Metrics, hidden: int = 64) -> None:
        super().__init__()
        self.layer = dq.DEQ(Cell(64, hidden), metrics=metrics)
        self.read_out = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Any:
        return self.read_out(self.layer(x))


class Job(dcp.stateful.Stateful):
    """What a checkpoint holds: weights, the optimiser's state, and how many epochs were made."""

    def __init__(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.model, self.optimiser, self.epoch = model, optimiser, 0

    def state_dict(self) -> dict[str, Any]:
        model, optimiser = get_state_dict(self.model, self.optimiser)
        return {"model": model, "optimiser": optimiser, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
        self.epoch = state["epoch"]


def newest(folder: Path) -> Path | None:
    """The last checkpoint that was finished: the file .metadata is written last of all."""
    found = sorted(path.parent for path in folder.glob("epoch-*/.metadata"))
    return found[-1] if found else None


def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = float((model(pixels).argmax(1) == labels).double().mean())
    model.train()
    return right


def train(options: argparse.Namespace, device: torch.device) -> None:
    rank, first = dist.get_rank(), dist.get_rank() == 0
    torch.manual_seed(0)
    pixels, labels, test_pixels, test_labels = digits(0, str(device))
    metrics = dq.Metrics()
    model = DistributedDataParallel(Classifier(metrics).to(device))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    job = Job(model, optimiser)
    done = newest(options.checkpoint)
    if done is not None:
        dcp.load({"job": job}, checkpoint_id=done)
        if first:
            print(f"going on after epoch {job.epoch}, from {done}", flush=True)
    sampler: DistributedSampler[Any] = DistributedSampler(TensorDataset(pixels, labels), seed=0)
    batches = DataLoader(TensorDataset(pixels, labels), batch_size=64, sampler=sampler)
    writer = SummaryWriter(str(options.checkpoint / "tensorboard")) if first and SummaryWriter is not None else None
    while job.epoch < options.epochs:
        sampler.set_epoch(job.epoch)
        for x, y in batches:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
            model.module.layer.cell.project()
        job.epoch += 1
        found = metrics.compute()
        if writer is not None:
            metrics.write(writer, job.epoch)
        metrics.reset()
        dcp.save({"job": job}, checkpoint_id=options.checkpoint / f"epoch-{job.epoch:04d}")
        if rank == options.die_on and job.epoch == options.die_after:
            os._exit(1)  # as a node does that goes down
        if first:
            right = accuracy(model.module, test_pixels, test_labels)
            print(
                f"epoch {job.epoch}: {100 * right:.1f} % right, {found['evaluations']:.1f} evaluations a solve, "
                f"{found['backward_evaluations']:.1f} products, largest residual {found['residual_max']:.1e}",
                flush=True,
            )
            metrics.reset()  # of the test
    if writer is not None:
        writer.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--checkpoint", type=Path, default=Path("out/cluster"), help="a folder that all nodes see")
    parser.add_argument("--die-on", type=int, default=-1, help="a rank that ends by force, to see a job go on")
    parser.add_argument("--die-after", type=int, default=0, help="the epoch after which it does, if not there yet")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    options.checkpoint.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        train(options, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
