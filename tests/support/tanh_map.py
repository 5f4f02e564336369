"""z -> tanh(z W + x) with all that may be differentiated, and its gradients by an inverse."""

import torch
import torch.utils.checkpoint

import deqfast as dq

F64 = torch.float64
SOLVERS = [
    "anderson",
    "broyden",
    "picard",
    dq.Anderson(m=3, type=2),
    dq.Anderson(m=4, type=1, mixing=0.8, evict="oldest"),
    dq.Anderson(history_dtype=torch.int8),
    dq.Broyden(memory=4),
    dq.Picard(damping=0.7),
]


def problem(B=3, N=5, dtype=F64, scale=0.6):
    generator = torch.Generator().manual_seed(B * 100 + N)
    W = torch.randn(N, N, dtype=F64, generator=generator) * scale / N**0.5
    x = torch.randn(B, N, dtype=F64, generator=generator)
    c = torch.randn(B, N, dtype=F64, generator=generator)
    return W.to(dtype).requires_grad_(), x.to(dtype).requires_grad_(), c.to(dtype)


def tanh_map(z, x, W):
    return torch.tanh(z @ W + x)


def solve(x, W, f=tanh_map, **options):
    options = {"rtol": 1e-12, "max_iter": 300, **options}
    return dq.fixed_point(f, torch.zeros_like(x), (x, W), **options)


def by_inverse(x, W, c):
    """x and W gradients of <c, z> from (I - J)^-1, formed in float64."""
    x, W, c = x.detach().double(), W.detach().double(), c.double()
    z = solve(x, W, backward="none", rtol=1e-14).z
    d = 1 - z.square()
    gx, gW = [], torch.zeros_like(W)
    for i in range(len(x)):
        J = d[i][:, None] * W.T
        u = torch.linalg.solve((torch.eye(len(W), dtype=F64) - J).T, c[i])
        gx.append(u * d[i])
        gW += torch.outer(z[i], u * d[i])
    return torch.stack(gx), gW


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())
