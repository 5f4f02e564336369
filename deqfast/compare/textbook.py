"""Anderson acceleration as locuslab/deq and the tutorial write it down, and the hook that differentiates it.

Their file calls ``torch.solve``, which torch no longer has; this is the same iteration with ``torch.linalg.solve``.

Source: http://implicit-layers-tutorial.org/deep_equilibrium_models; locuslab/deq, lib/solvers.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def anderson(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    m: int = 6,
    lam: float = 1e-4,
    max_iter: int = 50,
    tol: float = 1e-3,
    beta: float = 1.0,
) -> Tensor:
    """The x of the least residual; stops at ||f(x) - x|| / (||f(x)|| + 1e-5) < tol, norms over the whole batch."""
    B = x0.shape[0]
    x = x0.reshape(B, -1)
    X, F = x.new_zeros(B, m, x.shape[1]), x.new_zeros(B, m, x.shape[1])
    H, y = x.new_zeros(B, m + 1, m + 1), x.new_zeros(B, m + 1, 1)
    H[:, 0, 1:] = H[:, 1:, 0] = 1
    y[:, 0] = 1
    best, least = x0, float("inf")
    for k in range(max_iter):
        n = min(k, m)
        if k < 2:
            new = x if k == 0 else F[:, 0]
        else:
            G = F[:, :n] - X[:, :n]
            H[:, 1 : n + 1, 1 : n + 1] = torch.bmm(G, G.mT) + lam * torch.eye(n, dtype=x.dtype, device=x.device)
            alpha = torch.linalg.solve(H[:, : n + 1, : n + 1], y[:, : n + 1])[:, 1 : n + 1, 0]
            new = beta * (alpha[:, None] @ F[:, :n])[:, 0] + (1 - beta) * (alpha[:, None] @ X[:, :n])[:, 0]
        X[:, k % m] = new
        F[:, k % m] = f(new.view_as(x0)).reshape(B, -1)
        if k < 2:
            continue
        residual = float((F[:, k % m] - X[:, k % m]).norm() / (1e-5 + F[:, k % m].norm()))
        if residual < least:
            best, least = X[:, k % m].view_as(x0).clone(), residual
        if residual < tol:
            break
    return best


def differentiated(f: Callable[[Tensor], Tensor], z: Tensor, solve: Callable[..., Tensor]) -> Tensor:
    """f(z) whose gradient is the implicit one, found by ``solve`` in a hook."""
    image = f(z)
    at = image.detach().requires_grad_()
    again = f(at)

    def hook(gradient: Tensor) -> Tensor:
        def adjoint(y: Tensor) -> Tensor:
            return torch.autograd.grad(again, at, y, retain_graph=True)[0] + gradient

        return solve(adjoint, gradient)

    image.register_hook(hook)
    return image
