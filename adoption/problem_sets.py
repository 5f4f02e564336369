"""Systems F(x) = 0 that other solvers are tested on, restated: F maps (..., N) to (..., N), in float64.

* SciPy: the six functions of its tests of nonlinear solvers.
* jaxopt: the maps of its tests of AndersonAcceleration and Broyden, as f(x) - x.
* aa (cvxgrp): gradient descent on least squares, projected gradients on a box.
* xitorch: the example of its rootfinder, and a random one of its kind.
* KINSOL: its examples of fixed points (analytic, Robertson), Ferraris and Tronconi's, and a nonlinear Laplace equation.
* MGH: the systems of J. J. More, B. S. Garbow and K. E. Hillstrom, ACM Trans. Math. Softw. 7 (1981), by their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

System = Callable[[Tensor], Tensor]
REGISTRY: dict[str, Problem] = {}


@dataclass(frozen=True)
class Problem:
    """``root``: a known one, or None where there is none in closed form."""

    suite: str
    name: str
    F: System
    start: Tensor
    root: Tensor | None


def _numbers(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def problem(suite: str, name: str, start: object, root: object = None) -> Callable[[System], System]:
    def register(F: System) -> System:
        known = None if root is None else _numbers(root)
        REGISTRY[f"{suite}/{name}"] = Problem(suite, name, F, _numbers(start), known)
        return F

    return register


def _random(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cat(*columns: Tensor) -> Tensor:
    return torch.stack(columns, -1)


# SciPy


@problem("SciPy", "cubic perturbation of a diagonal", [1.0] * 5, [0.0] * 5)
def _diagonal(x: Tensor) -> Tensor:
    return -_numbers([3, 2, 1.5, 1, 0.5]) * x - 0.01 * (x * x).sum(-1, keepdim=True) * x


@problem("SciPy", "identity", [1.0, 2, 3, 4, 5, 6], [0.0] * 6)
def _identity(x: Tensor) -> Tensor:
    return x.clone()


@problem("SciPy", "second difference", [1.0, 2, 3], [-2.5, -4.0, -3.5])
def _difference(x: Tensor) -> Tensor:
    A = torch.diag(_numbers([-2.0] * 3)) + torch.diag(_numbers([1.0] * 2), 1) + torch.diag(_numbers([1.0] * 2), -1)
    return x @ A - _numbers([1, 2, 3])


@problem("SciPy", "Powell, badly scaled", [-1.0, -2.0])
def _powell_scipy(x: Tensor) -> Tensor:
    a, b = x.unbind(-1)
    return _cat(1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - (1 + 1e-4))


@problem("SciPy", "pressures of a network", [2.0, 0, 2, 0], [1.0] * 4)
def _network(q: Tensor) -> Tensor:
    pressure = 0.5 * q * q.abs()
    return torch.cat((pressure[..., 1:] - pressure[..., :1], q.sum(-1, keepdim=True) - 4), -1)


@problem("SciPy", "preconditioned by a Jacobian", [-0.5, 1.4])
def _preconditioned(x: Tensor) -> Tensor:
    a, b = x.unbind(-1)
    v = _cat((a + 3) * (b**5 - 7) + 18, torch.sin(b * torch.exp(a) - 1))
    return -v @ torch.linalg.inv(_numbers([[-4.256, 14.7], [0.8394989, 0.59964207]])).mT


# jaxopt


@problem("jaxopt", "geometric decay", [1.0, 0.4, -0.2], [0.0] * 3)
def _decay(x: Tensor) -> Tensor:
    return (_numbers([0.9, 0.99, 0.999]) - 1) * x


@problem("jaxopt", "one number", [0.0], [1.0])
def _scalar(x: Tensor) -> Tensor:
    return 0.5 - 0.5 * x


@problem("jaxopt", "sines, cubes and a sign", [0.6, 0.0, -0.1, 0.7, 0.5, -1 / 3, 0.0, 2 / 3, -0.4 / 3], [0.0] * 9)
def _sines(x: Tensor) -> Tensor:
    s, c, n = x[..., :3], x[..., 3:5], x[..., 5:]
    return torch.cat((s.sin() * s * s, c**3, -n), -1) - x


@problem("jaxopt", "cosines", [0.3, math.pi / 4], [0.7390851332151607, math.pi / 2])
def _cosines(x: Tensor) -> Tensor:
    return torch.cos(x) + _numbers([0, math.pi / 2]) - x


_ANGLES = math.pi / _numbers([2, 3, 4, 5, 6, 1.27, 1.73])


@problem("jaxopt", "seven rotations", _random(14, seed=0), torch.arange(1, 15))
def _rotations(x: Tensor) -> Tensor:
    pairs = (x - torch.arange(1, 15)).unflatten(-1, (7, 2))
    a, b = pairs.unbind(-1)
    turned = _cat(_ANGLES.cos() * a - _ANGLES.sin() * b, _ANGLES.sin() * a + _ANGLES.cos() * b)
    return (turned - pairs).flatten(-2)


def _contraction() -> tuple[Tensor, Tensor]:
    M = 2 * _random(200, 200, seed=1) - 1
    M = M + M.mT
    return M / (2 * torch.linalg.matrix_norm(M, 2)), _random(200, seed=2)


_M, _B = _contraction()


@problem("jaxopt", "affine contraction", torch.zeros(200), torch.linalg.solve(torch.eye(200) - _M, _B))
def _affine(x: Tensor) -> Tensor:
    return x @ _M + _B - x


# aa


_A = 2 * _random(120, 60, seed=3) - 1
_RHS = 2 * _random(120, seed=4) - 1
_RATE = 1 / float(torch.linalg.matrix_norm(_A, 2)) ** 2


@problem("aa", "gradient descent, least squares", torch.zeros(60), torch.linalg.lstsq(_A, _RHS[:, None]).solution[:, 0])
def _descent(x: Tensor) -> Tensor:
    return _RATE * (_RHS - x @ _A.mT) @ _A


@problem("aa", "projected gradient, box", torch.zeros(60))
def _projected(x: Tensor) -> Tensor:
    return (x + _descent(x)).clamp(-0.05, 0.05) - x


# xitorch


@problem("xitorch", "example of its rootfinder", [0.0, 0.0])
def _rootfinder(y: Tensor) -> Tensor:
    return torch.tanh(y @ _numbers([[1.1, 0.3], [0.4, 0.8]]) + 0.1) + y / 2


_XA, _XB = (2 * _random(20, 20, seed=5) - 1) / 3, _random(20, seed=6)


@problem("xitorch", "the same, 20 random numbers", torch.zeros(20))
def _rootfinder20(y: Tensor) -> Tensor:
    return torch.tanh(y @ _XA + _XB) + y / 2


# KINSOL


@problem("KINSOL", "analytic fixed point", [0.1, 0.1, -0.1], [0.5, 1.0, -math.pi / 6])
def _analytic(v: Tensor) -> Tensor:
    x, y, z = v.unbind(-1)
    return _cat(
        torch.cos((y - 1) * z) / 3 + 1 / 6 - x,
        torch.sqrt(x * x + torch.sin(z) + 1.06) / 9 + 0.9 - y,
        -torch.exp(-x * (y - 1)) / 20 - (10 * math.pi - 3) / 60 - z,
    )


@problem("KINSOL", "Robertson, a step of backward Euler", [1.0, 0, 0])
def _robertson(y: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    made = 0.1 * 3e7 * b * b
    return _cat(1 - b - c - a, 0.1 * (0.04 * a - 1e4 * b * c) - made - b, made - c)


@problem("KINSOL", "Ferraris and Tronconi", [0.625, (1.5 + 2 * math.pi) / 2], [0.5, math.pi])
def _ferraris(x: Tensor) -> Tensor:
    a, b = x.unbind(-1)
    return _cat(
        0.5 * torch.sin(a * b) - 0.25 * b / math.pi - 0.5 * a,
        (1 - 0.25 / math.pi) * (torch.exp(2 * a) - math.e) + math.e * b / math.pi - 2 * math.e * a,
    )


@problem("KINSOL", "Laplace with a cubic, 15 x 15", torch.zeros(225))
def _laplace(x: Tensor) -> Tensor:
    u = x.unflatten(-1, (15, 15))
    p = torch.nn.functional.pad(u, (1, 1, 1, 1))
    neighbours = p[..., 2:, 1:-1] + p[..., :-2, 1:-1] + p[..., 1:-1, 2:] + p[..., 1:-1, :-2]
    return (neighbours - 4 * u - (u**3 - u - 2) / 256).flatten(-2)


# MGH


@problem("MGH", "1 Rosenbrock", [-1.2, 1.0], [1.0, 1.0])
def _rosenbrock(x: Tensor) -> Tensor:
    a, b = x.unbind(-1)
    return _cat(10 * (b - a * a), 1 - a)


@problem("MGH", "3 Powell, badly scaled", [0.0, 1.0])
def _powell(x: Tensor) -> Tensor:
    return _powell_scipy(x)


@problem("MGH", "7 helical valley", [-1.0, 0, 0], [1.0, 0, 0])
def _helical(x: Tensor) -> Tensor:
    a, b, c = x.unbind(-1)
    angle = torch.atan2(b, a) / (2 * math.pi)
    angle = torch.where((a < 0) & (angle < -0.25), angle + 1, angle)  # the branch of the paper, -1/4 to 3/4
    return _cat(10 * (c - 10 * angle), 10 * (torch.sqrt(a * a + b * b) - 1), c)


@problem("MGH", "13 Powell, singular", [3.0, -1, 0, 1], [0.0] * 4)
def _singular(x: Tensor) -> Tensor:
    a, b, c, d = x.unbind(-1)
    return _cat(a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2)


@problem("MGH", "21 extended Rosenbrock", [-1.2, 1.0] * 5, [1.0] * 10)
def _extended(x: Tensor) -> Tensor:
    return _rosenbrock(x.unflatten(-1, (5, 2))).flatten(-2)


@problem("MGH", "25 variably dimensioned", 1 - torch.arange(1, 11) / 10, [1.0] * 10)
def _variably(x: Tensor) -> Tensor:
    j = torch.arange(1, 11)
    s = (j * (x - 1)).sum(-1, keepdim=True)
    return x - 1 + j * s * (1 + 2 * s * s)


@problem("MGH", "26 trigonometric", [0.1] * 10)
def _trigonometric(x: Tensor) -> Tensor:
    i = torch.arange(1, 11)
    return 10 - torch.cos(x).sum(-1, keepdim=True) + i * (1 - torch.cos(x)) - torch.sin(x)


@problem("MGH", "27 Brown, almost linear", [0.5] * 10, [1.0] * 10)
def _brown(x: Tensor) -> Tensor:
    return torch.cat(((x + x.sum(-1, keepdim=True) - 11)[..., :-1], x.prod(-1, keepdim=True) - 1), -1)


_T = torch.arange(1, 11, dtype=torch.float64) / 11


@problem("MGH", "28 discrete boundary value", _T * (_T - 1))
def _boundary(x: Tensor) -> Tensor:
    p = torch.nn.functional.pad(x, (1, 1))
    return 2 * x - p[..., :-2] - p[..., 2:] + (x + _T + 1) ** 3 / 242


@problem("MGH", "29 discrete integral equation", _T * (_T - 1))
def _integral(x: Tensor) -> Tensor:
    cubes = (x + _T + 1) ** 3
    below = torch.cumsum(_T * cubes, -1)
    above = ((1 - _T) * cubes).sum(-1, keepdim=True) - torch.cumsum((1 - _T) * cubes, -1)
    return x + ((1 - _T) * below + _T * above) / 22


@problem("MGH", "30 Broyden, tridiagonal", [-1.0] * 10)
def _tridiagonal(x: Tensor) -> Tensor:
    p = torch.nn.functional.pad(x, (1, 1))
    return (3 - 2 * x) * x - p[..., :-2] - 2 * p[..., 2:] + 1


@problem("MGH", "31 Broyden, banded", [-1.0] * 10)
def _banded(x: Tensor) -> Tensor:
    i = torch.arange(10)
    near = ((i[:, None] - i <= 5) & (i - i[:, None] <= 1) & (i[:, None] != i)).double()
    return x * (2 + 5 * x * x) + 1 - (x * (1 + x)) @ near.mT


def _chebyquad_start(n: int) -> Tensor:
    return torch.arange(1, n + 1) / (n + 1)


@problem("MGH", "35 Chebyquad, 7", _chebyquad_start(7))
def _chebyquad(x: Tensor) -> Tensor:
    before, now = torch.ones_like(x), 2 * x - 1
    found = []
    for i in range(1, x.shape[-1] + 1):
        found.append(now.mean(-1) - (0.0 if i % 2 else -1 / (i * i - 1)))
        before, now = now, 2 * (2 * x - 1) * now - before
    return _cat(*found)
