"""Evaluations of training with and without warm starts from the last epoch, by the ids of the samples.

    python -m bench.warm --out bench/results/warm.json     # a minute; counts, which no load can change

The dense network of the suite learns the digits by implicit gradients: from scratch, and fine-tuned at a lower rate;
with images as they are, and with noise drawn anew at every step. *warm z*: the forward solve starts at the sample's
solution of the epoch before. *warm z and u*: the backward solve too, at the sample's adjoint of then. Counts are
evaluations and vjps a batch, whose slowest sample decides, over all epochs but the first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import deqfast as dq
from bench import meta
from bench.families import models
from bench.families.digits import digits

EPOCHS, BATCH, RTOL = 4, 64, 1e-4
STARTS = {
    "cold": (False, False),
    "warm z": (True, False),
    "warm z and u": (True, True),
}


def train(rate: float, noise: float, warm_z: bool, warm_u: bool) -> dict[str, float]:
    torch.manual_seed(0)
    cell = models.Dense()
    x, labels = digits()
    x = x.float()
    z_of, u_of = (torch.zeros(len(x), 128) for _ in range(2))
    optimiser = torch.optim.Adam(cell.parameters(), lr=3e-3)
    forward = backward = steps = 0
    for epoch in range(EPOCHS + 1):
        if epoch == 1:
            for group in optimiser.param_groups:
                group["lr"] = rate
        for ids in torch.randperm(len(x)).split(BATCH):
            seen = x[ids] + noise * torch.randn(len(ids), 64)
            start = z_of[ids] if warm_z and epoch else cell.start(seen)
            u0: Any = (lambda g, ids=ids: u_of[ids]) if warm_u and epoch else None
            shift = torch.zeros_like(start).requires_grad_()
            gradient = dq.Implicit(u0=u0)
            sol = dq.fixed_point(
                lambda z, seen, shift: cell(z, seen) + shift, start, (seen, shift), rtol=RTOL,
                backward=gradient,
            )  # fmt: skip
            optimiser.zero_grad()
            loss = F.cross_entropy(cell.head(sol.z), labels[ids], reduction="sum") / BATCH
            loss.backward()
            z_of[ids], u_of[ids] = sol.z.detach(), _known(shift.grad)
            optimiser.step()
            cell.constrain()
            report = sol.backward
            if epoch and report is not None:
                forward, backward, steps = forward + sol.nfe, backward + report.evaluations, steps + 1
    return {"forward": forward / steps, "vjps": backward / steps}


def _known(grad: Tensor | None) -> Tensor:
    if grad is None:
        raise RuntimeError("the shift of f has no gradient")
    return grad


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.warm", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/warm.json"))
    options = parser.parse_args(arguments)
    bystanders = meta.Bystanders()
    rows = []
    for rate in (3e-3, 3e-4, 3e-5):
        for noise in (0.0, 0.1):
            for name, how in STARTS.items():
                rows.append({"rate": rate, "noise": noise, "start": name, **train(rate, noise, *how)})
                print(rows[-1], flush=True)
    record: dict[str, Any] = {"kind": "warm", "rows": rows, "epochs": EPOCHS, "batch": BATCH, "rtol": RTOL}
    record["meta"] = meta.describe("python -m bench.warm", bystanders)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
