"""First-order optimisation maps, operator splittings, joint fixed-point/gradient maps and decision processes.

All are published uses of acceleration: ISTA and ADMM (cvxgrp's solvers), EM (SQUAREM), value iteration, entropic
transport, and the simultaneous solve of an equilibrium, its adjoint and its input.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.families.base import Map, affine, generator, normal, orthogonal, register
from bench.families.digits import digits


@register("optimisation/lasso", "ISTA, 64 x 192 dictionary shared, one observation a sample", cheap=True)
def lasso(dtype: torch.dtype) -> tuple[Map, Tensor]:
    g = generator("lasso")
    rows, n, batch = 64, 192, 8
    a = F.normalize(normal(g, rows, n), dim=0)
    truth = normal(g, batch, n) * (torch.rand(batch, n, generator=g) < 0.05)
    y = truth @ a.T + 0.01 * normal(g, batch, rows)
    step = 1 / torch.linalg.matrix_norm(a, 2) ** 2
    weight = 0.1 * (y @ a).abs().amax(dim=1, keepdim=True)
    gram = (torch.eye(n, dtype=torch.float64) - step * a.T @ a).to(dtype)
    push, threshold = (step * y @ a).to(dtype), (step * weight).to(dtype)

    def f(z: Tensor) -> Tensor:
        v = torch.addmm(push, z, gram)
        return v - torch.clamp(v, -threshold, threshold)

    return f, torch.zeros(batch, n, dtype=dtype)


@register("optimisation/ridge", "gradient steps on ridge regression, condition number 1e3", cheap=True)
def ridge(dtype: torch.dtype) -> tuple[Map, Tensor]:
    g = generator("ridge")
    n, batch = 64, 8
    curvature = torch.logspace(-3, 0, n, dtype=torch.float64)
    q = orthogonal(g, n)
    hessian = (q * curvature) @ q.T
    return affine(torch.eye(n, dtype=torch.float64) - hessian, normal(g, batch, n) @ hessian, dtype)


@register("optimisation/logistic", "gradient steps on one-against-all logistic regression of the digits", cheap=True)
def logistic(dtype: torch.dtype) -> tuple[Map, Tensor]:
    x, labels = digits()
    x, labels = x[:400], labels[:400]
    features = torch.cat([x - x.mean(0), torch.full((len(x), 1), 0.5, dtype=x.dtype)], dim=1)
    penalty = 1e-2
    step = 1 / (torch.linalg.matrix_norm(features, 2) ** 2 / (4 * len(x)) + penalty)
    target = F.one_hot(labels, 10).T.to(dtype)
    design, decay, rate = features.to(dtype), float(1 - step * penalty), float(step / len(x))

    def f(w: Tensor) -> Tensor:
        return decay * w - rate * (torch.sigmoid(w @ design.T) - target) @ design

    return f, torch.zeros(10, features.shape[1], dtype=dtype)


@register(
    "optimisation/ADMM", "non-negative least squares by Douglas-Rachford splitting, condition number 1e4", cheap=True
)
def admm(dtype: torch.dtype) -> tuple[Map, Tensor]:
    g = generator("admm")
    n, batch = 96, 8
    q = orthogonal(g, n)
    hessian = (q * torch.logspace(-3, 1, n, dtype=torch.float64)) @ q.T
    resolvent = torch.linalg.inv(torch.eye(n, dtype=torch.float64) + hessian)
    matrix, shift = resolvent.to(dtype), (normal(g, batch, n) @ hessian @ resolvent).to(dtype)

    def f(z: Tensor) -> Tensor:
        x = z.clamp(min=0)
        return z + torch.addmm(shift, 2 * x - z, matrix) - x

    return f, torch.zeros(batch, n, dtype=dtype)


@register("optimisation/EM", "log mixing weights of 16 overlapping Gaussians under a Dirichlet prior, 500 observations")
def em(dtype: torch.dtype) -> tuple[Map, Tensor]:
    g = generator("em")
    batch, components, seen = 8, 16, 500
    centres = torch.linspace(-4, 4, components, dtype=torch.float64)
    weights = torch.softmax(normal(g, batch, components), dim=1)
    which = torch.multinomial(weights, seen, replacement=True, generator=g)
    x = centres[which] + 0.6 * normal(g, batch, seen)
    density = (-0.5 * ((x[:, :, None] - centres) / 0.6) ** 2).to(dtype)

    def f(w: Tensor) -> Tensor:
        p = torch.softmax(density + w.unsqueeze(1), dim=2)
        return (p.sum(dim=1) + 2).log() - math.log(seen + 2 * components)

    return f, torch.full((batch, components), -math.log(components), dtype=dtype)


@register("optimisation/Sinkhorn", "entropic transport of point clouds, dual potential, regularisation .02 to .2")
def sinkhorn(dtype: torch.dtype) -> tuple[Map, Tensor]:
    g = generator("sinkhorn")
    n, batch = 64, 8
    a, b = normal(g, batch, n, 2), 0.5 * normal(g, batch, n, 2) + 0.5
    cost = torch.cdist(a, b) ** 2
    scale = torch.logspace(-1.7, -0.7, batch, dtype=torch.float64)[:, None, None] * cost.mean(dim=(1, 2), keepdim=True)
    kernel, scale = (-cost / scale).to(dtype), scale[:, :, 0].to(dtype)

    def f(z: Tensor) -> Tensor:
        other = -torch.logsumexp(kernel + (z / scale).unsqueeze(2), dim=1)
        out = -scale * torch.logsumexp(kernel + other.unsqueeze(1), dim=2)
        return out - out.mean(dim=1, keepdim=True)

    return f, torch.zeros(batch, n, dtype=dtype)


def _value_iteration(discount: float, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """V = max_a (r_a + discount P_a V): piecewise linear, the greedy action changes on the way."""
    g = generator(f"value iteration {discount}")
    states, actions, batch = 96, 4, 8
    logits = 3 * normal(g, actions * states, states)
    transition = (discount * torch.softmax(logits, dim=1)).T.contiguous().to(dtype)
    reward = normal(g, batch, actions * states).to(dtype)

    def f(v: Tensor) -> Tensor:
        return torch.addmm(reward, v, transition).view(batch, actions, states).amax(dim=1)

    return f, torch.zeros(batch, states, dtype=dtype)


for _discount in (0.9, 0.99):
    register(
        f"decision/value iteration {str(_discount)[1:]}", f"max-Bellman, discount {_discount}, 96 states", cheap=True
    )(partial(_value_iteration, _discount))


def _recurrent(g: torch.Generator, batch: int, n: int, norm: float) -> Tensor:
    w = normal(g, n, n)
    return norm * w / torch.linalg.matrix_norm(w, 2)


def joint_map(nonlinear: bool, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """min_x |z - t|^2/2 + ridge |x|^2/2 subject to z = f(z, x), as one map on (z, mu, x), a target t a sample.

    z' = z + a_z (f - z); mu' = mu + a_mu (l_z + f_z^T mu - mu); x' = x - a_x (f_x^T mu + l_x).  With a_x = 1/L the
    plain joint iteration diverges and with a smaller step it crawls, which is why the joint solve needs acceleration.
    """
    g = generator("joint")
    n_z, n_x, batch, weight = 64, 8, 8, 0.1
    w64, u64 = _recurrent(g, batch, n_z, 0.7), normal(g, n_z, n_x) / n_z**0.5
    sensitivity = torch.linalg.solve(torch.eye(n_z, dtype=torch.float64) - w64, u64)
    rate = float(1 / (torch.linalg.matrix_norm(sensitivity, 2) ** 2 + weight))
    w, u = w64.to(dtype), u64.to(dtype)
    target = (0.5 * normal(g, batch, n_z)).to(dtype)

    def f(v: Tensor) -> Tensor:
        z, mu, x = v.split((n_z, n_z, n_x), dim=1)
        fz = z @ w.T + x @ u.T
        slope_mu = mu
        if nonlinear:
            fz = torch.tanh(fz)
            slope_mu = (1 - fz * fz) * mu
        return torch.cat(
            [
                z + 0.8 * (fz - z),
                mu + 0.6 * (z - target + slope_mu @ w - mu),
                x - rate * (slope_mu @ u + weight * x),
            ],
            dim=1,
        )

    return f, torch.zeros(batch, 2 * n_z + n_x, dtype=dtype)


register("joint/linear", "equilibrium, adjoint and input as one map, a_x = 1/L", cheap=True)(partial(joint_map, False))
register("joint/tanh", "the same with a tanh equilibrium", cheap=True)(partial(joint_map, True))
