"""PyTorch Geometric: an implicit graph network, against torchdeq's solvers.

torchdeq counts samples by dim 0, which the nodes of a graph are not: its best is to be given everything as one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import deqfast as dq
from adoption.rows import Passes, Record, Row, in_turns

HIDDEN = 32
TOLERANCE = 1e-5
LIMIT = 300
STEPS = 600  # unrolled
Solve = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


class Network(torch.nn.Module):
    """GCN's convolution as an equilibrium, and a readout of the nodes."""

    def __init__(self, data: Any, gain: float, dtype: torch.dtype) -> None:
        from torch_geometric.nn import GCNConv

        super().__init__()
        torch.manual_seed(0)
        self.x, self.edges = data.x.to(dtype), data.edge_index
        self.encode = torch.nn.Linear(self.x.shape[1], HIDDEN).to(dtype)
        self.conv = GCNConv(HIDDEN, HIDDEN, bias=False).to(dtype)
        self.read = torch.nn.Linear(HIDDEN, 4).to(dtype)
        with torch.no_grad():
            turned = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)).Q
            self.conv.lin.weight.copy_(gain * turned)  # the neighbours' mean has norm 1
        self.evaluations = 0

    def forward(self, solve: Solve) -> Tensor:
        features = self.encode(self.x)

        def f(z: Tensor) -> Tensor:
            self.evaluations += 1
            found: Tensor = Passes.apply(torch.tanh(self.conv(z, self.edges) + features))
            return found

        found: Tensor = self.read(solve(f, torch.zeros_like(features)))
        return found

    def gradient(self, solve: Solve) -> tuple[Tensor, int]:
        """Of the mean square of what is read, by all parameters; evaluations and vjps."""
        self.zero_grad()
        self.evaluations = Passes.count = 0
        self(solve).square().mean().backward()
        flat = torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None])
        return flat, self.evaluations + Passes.count


def torchdeqs(name: str) -> Solve:
    """Everything as one sample, stopped on the relative residual."""
    import torchdeq

    deq = torchdeq.get_deq(
        **{"f_solver": name, "b_solver": name, "ift": True, "f_stop_mode": "rel", "b_stop_mode": "rel"},
        **{"f_max_iter": LIMIT, "b_max_iter": LIMIT, "f_tol": TOLERANCE, "b_tol": TOLERANCE},
    )
    return lambda f, z0: deq(lambda z: f(z[0])[None], z0[None])[0][-1][0]


def deqfasts(**options: Any) -> Solve:
    return lambda f, z0: dq.fixed_point(f, z0, rtol=TOLERANCE, max_iter=LIMIT, **options).z


def unrolled(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    for _ in range(STEPS):
        z = f(z)
    return z


def graphs(name: str) -> Any:
    """A data set that ships with PyTorch Geometric or is made up by it."""
    from torch_geometric.data import Batch
    from torch_geometric.datasets import FakeDataset, KarateClub
    from torch_geometric.seed import seed_everything

    if name == "karate club, one graph":
        return KarateClub()[0]
    seed_everything(0)
    made = FakeDataset(num_graphs=32, avg_num_nodes=40, avg_degree=4, num_channels=16)
    return Batch.from_data_list(list(made))


@pytest.mark.parametrize("own", ["broyden", "anderson"])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("karate club, one graph", "batch_dims=0"),
        ("karate club, one graph", "batch_dims=0, Broyden"),
        ("32 graphs made up", "batch_dims=0"),
        ("32 graphs made up", "segments=batch"),
    ],
)
def test_training_step(name: str, how: str, own: str, record: Record) -> None:
    pytest.importorskip("torch_geometric")
    pytest.importorskip("torchdeq")
    data = graphs(name)
    network = Network(data, 0.97, torch.float32)
    exact, _ = Network(data, 0.97, torch.float64).gradient(unrolled)
    options: dict[str, Any] = {"segments": data.batch} if how == "segments=batch" else {"batch_dims": 0}
    if how.endswith("Broyden"):
        options["solver"] = "broyden"
    theirs, mine = torchdeqs(own), deqfasts(**options)
    (g, evaluations), (h, fewer) = network.gradient(theirs), network.gradient(mine)
    far, near = (float((found.double() - exact).norm() / exact.norm()) for found in (g, h))
    record.add(
        Row(
            package="torch_geometric",
            problem=f"implicit graph network, {name} ({how}), training step, 1e-5",
            own=f"torchdeq's {own.title()}, one sample",
            evaluations=(evaluations, fewer),
            ratio=in_turns(lambda: network.gradient(theirs), lambda: network.gradient(mine), budget=3.0),
            difference=near,
            within=1e-3,
            solved=(far <= 1e-3, near <= 1e-3),
            note=f"evaluations and vjps together; from {STEPS} unrolled steps: {far:.1e} own, {near:.1e} deqfast's",
        )
    )
    assert near <= 1e-3
