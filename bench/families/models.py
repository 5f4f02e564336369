"""Small equilibrium networks trained on the digits, at several spectral scales, and the adjoint systems of each.

Three cells (dense, convolutional, attention) are trained once a process by the one-step-phantom recipe that most
DEQ code uses: a few plain iterations without gradient, then a few with.  The scaled variants multiply the recurrent
weights of the trained cell, which is what further training without a penalty does to them.
"""

from __future__ import annotations

import copy
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.families.base import Map, register
from bench.families.digits import digits
from bench.families.equilibrium import equilibrium

B = 8
PENALTY = 0.5


class Cell(nn.Module):
    """z -> f(z, x) with a start, a linear head, and the constraint that training keeps."""

    head: nn.Linear

    def start(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def constrain(self) -> None:
        """Nothing by default: normalisation layers and the penalty suffice."""

    def rescale(self, factor: float) -> None:
        raise NotImplementedError


class Dense(Cell):
    """z = tanh(W z + U x + b), N = 128, ||W||_2 <= .9 while training."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(128, 128) / 16)
        self.u = nn.Linear(64, 128)
        self.head = nn.Linear(128, 10)

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 128)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.addmm(self.u(x), z, self.w.T))

    def constrain(self) -> None:
        self.w.data /= (torch.linalg.matrix_norm(self.w.data, 2) / 0.9).clamp_min(1.0)

    def rescale(self, factor: float) -> None:
        self.w.data *= factor


class Convolutional(Cell):
    """Residual block of the deep-equilibrium tutorial: three group norms, two convolutions; z of 16 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.conv1, self.conv2 = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(4, 16) for _ in range(3))
        nn.init.normal_(self.conv1.weight, std=0.01)
        nn.init.normal_(self.conv2.weight, std=0.01)
        self.head = nn.Linear(16 * 64, 10)

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 16, 8, 8)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y = self.norm1(F.relu(self.conv1(z)))
        return self.norm3(F.relu(z + self.norm2(self.stem(x.view(-1, 1, 8, 8)) + self.conv2(y))))

    def rescale(self, factor: float) -> None:
        self.conv2.weight.data *= factor


class Attention(Cell):
    """Post-norm transformer block over the eight rows of an image, width 32, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(0.5 * torch.randn(8, 32))
        self.qkv = nn.Linear(32, 96, bias=False)
        self.out = nn.Linear(32, 32, bias=False)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.head = nn.Linear(8 * 32, 10)

    def start(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 8, 32)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        context = self.embed(x.view(-1, 8, 8)) + self.place
        q, k, v = self.qkv(z + context).view(-1, 8, 3, 2, 16).permute(2, 0, 3, 1, 4)
        weight = torch.softmax(q @ k.transpose(-1, -2) / 4, dim=-1)
        h = self.norm1(context + self.out((weight @ v).transpose(1, 2).reshape(-1, 8, 32)))
        return self.norm2(h + self.down(F.relu(self.up(h))))

    def rescale(self, factor: float) -> None:
        self.out.weight.data *= factor
        self.qkv.weight.data[64:] *= factor


CELLS: dict[str, type[Cell]] = {"mlp": Dense, "conv": Convolutional, "attention": Attention}


def _jacobian_penalty(fz: Tensor, z: Tensor) -> Tensor:
    """Hutchinson estimate of ||df/dz||_F^2 / N, what keeps equilibrium networks convergent in practice."""
    probe = torch.randn_like(fz)
    return torch.autograd.grad(fz, z, probe, create_graph=True)[0].square().mean()


@cache
def trained(kind: str, steps: int = 120, penalty: float = PENALTY) -> Cell:
    """The cell after a short training on the digits, float32, deterministic."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        cell = CELLS[kind]()
        x, labels = digits()
        x = x.float()
        optimiser = torch.optim.Adam(cell.parameters(), lr=3e-3)
        for _ in range(steps):
            pick = torch.randint(len(x), (96,))
            z = cell.start(x[pick])
            with torch.no_grad():
                for _ in range(8):
                    z = cell(z, x[pick])
            for _ in range(2):
                z = cell(z, x[pick])
            state = z.detach().requires_grad_()
            optimiser.zero_grad()
            loss = F.cross_entropy(cell.head(cell(z, x[pick]).flatten(1)), labels[pick])
            (loss + penalty * _jacobian_penalty(cell(state, x[pick]), state)).backward()
            optimiser.step()
            cell.constrain()
    return cell.requires_grad_(False).eval()


def scaled(kind: str, factor: float, dtype: torch.dtype) -> tuple[Cell, Tensor, Tensor]:
    """The trained cell with recurrent weights times `factor`, and B images with labels."""
    cell = copy.deepcopy(trained(kind))
    cell.rescale(factor)
    x, labels = digits()
    return cell.to(dtype), x[:B].to(dtype), labels[:B]


def forward_map(kind: str, factor: float, dtype: torch.dtype) -> tuple[Map, Tensor]:
    cell, x, _ = scaled(kind, factor, dtype)

    def f(z: Tensor) -> Tensor:
        with torch.no_grad():
            return cell(z, x)

    return f, cell.start(x)


def adjoint_map(kind: str, factor: float, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """u -> J^T u + g at the equilibrium, g the gradient of the cross-entropy; sample gradients differ in size."""
    cell64, x64, labels = scaled(kind, factor, torch.float64)
    with torch.no_grad():
        z64 = equilibrium(lambda z: cell64(z, x64), cell64.start(x64))
    with torch.enable_grad():
        state = z64.clone().requires_grad_()
        loss = F.cross_entropy(cell64.head(state.flatten(1)), labels, reduction="sum")
        gradient = torch.autograd.grad(loss, state)[0].to(dtype)
        cell, x, _ = scaled(kind, factor, dtype)
        z = z64.to(dtype).requires_grad_()
        fz = cell(z, x)

    def f(u: Tensor) -> Tensor:
        return torch.autograd.grad(fz, z, u, retain_graph=True)[0] + gradient

    return f, torch.zeros_like(gradient)


SCALES = {"mlp": (1.0, 2.0, 4.0), "conv": (1.0, 1.5, 1.75), "attention": (1.0, 1.5, 2.0)}
_LABELS = {"mlp": "dense, N = 128", "conv": "convolutional, N = 1024", "attention": "attention, N = 256"}
for _kind, _scales in SCALES.items():
    for _factor in _scales:
        _note = f"{_LABELS[_kind]}, trained on digits, recurrent weights x {_factor:g}"
        register(f"{_kind}/{_factor:g}", _note)(partial(forward_map, _kind, _factor))
    for _factor in _scales[:2]:
        _note = f"adjoint of {_kind}/{_factor:g}"
        register(f"{_kind}-adjoint/{_factor:g}", _note)(partial(adjoint_map, _kind, _factor))
