"""Joint problems whose solutions have a closed form: linear f, quadratic loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import deqfast as dq

F64, F32 = torch.float64, torch.float32


class LinearQuadratic:
    """f = W z + U x, loss = |C z - y|^2 / 2 + ridge |x|^2 / 2; the optimal x in closed form, L its curvature."""

    def __init__(self, B: int = 4, nz: int = 64, nx: int = 8, norm: float = 0.9, ridge: float = 1e-2, seed: int = 0):
        g = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=F64)

        W = random(nz, nz)
        self.W = W * norm / torch.linalg.matrix_norm(W, 2)
        self.U, self.C, self.y = random(nz, nx) / nx**0.5, random(nz, nz) / nz**0.5, random(B, nz)
        self.ridge, self.B, self.nz, self.nx = ridge, B, nz, nx

    def tensors(self, dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
        return tuple(t.to(dtype) for t in (self.W, self.U, self.C, self.y))

    def solution(self, W: Tensor, U: Tensor, C: Tensor, y: Tensor) -> tuple[Tensor, float]:
        M = C @ torch.linalg.solve(torch.eye(self.nz, dtype=W.dtype) - W, U)
        H = M.T @ M + self.ridge * torch.eye(self.nx, dtype=W.dtype)
        return torch.linalg.solve(H, (y @ M).T).T, float(torch.linalg.eigvalsh(H.detach()).max())

    @staticmethod
    def f(z: Any, x: Any, W: Tensor, U: Tensor, C: Tensor, y: Tensor) -> Any:
        return z @ W.T + x @ U.T

    def loss(self, z: Any, x: Any, W: Tensor, U: Tensor, C: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (z @ C.T - y).square().sum(1) + 0.5 * self.ridge * x.square().sum(1)

    def solve(self, dtype: torch.dtype = F64, args: tuple[Tensor, ...] | None = None, **options: Any) -> Any:
        args = self.tensors(dtype) if args is None else args
        z0, x0 = torch.zeros(self.B, self.nz, dtype=dtype), torch.zeros(self.B, self.nx, dtype=dtype)
        _, curvature = self.solution(*(t.detach().double() for t in args))
        settings = {"step_size": 1 / curvature, "rtol": 0.0, "backward": "none", **options}
        return dq.joint_solve(self.f, self.loss, z0, x0, args, **settings)

    def error(self, solution: Any) -> float:
        exact, _ = self.solution(*self.tensors())
        return float((solution.x.double() - exact).norm() / exact.norm())


def quadratic(B=3, N=6, n=4, seed=0):
    """Linear f, quadratic loss: loss(z*(x), x) has the Hessian 2 s_b (G^T G + I) of sample b."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(N, N, generator=g, dtype=torch.float64)
    A *= 0.8 / torch.linalg.matrix_norm(A, 2)
    U = torch.randn(n, N, generator=g, dtype=torch.float64)
    y = torch.randn(B, N, generator=g, dtype=torch.float64)
    s = torch.arange(1, B + 1, dtype=torch.float64)

    def f(z, x):
        return z @ A + x @ U

    def loss(z, x):
        return s[: len(z)] * ((z - y[: len(z)]).square().sum(1) + x.square().sum(1))

    gain = U @ torch.linalg.inv(torch.eye(N, dtype=torch.float64) - A)
    hessian = 2 * (gain @ gain.T + torch.eye(n, dtype=torch.float64))
    return f, loss, torch.zeros(B, N, dtype=torch.float64), torch.zeros(B, n, dtype=torch.float64), s, hessian
