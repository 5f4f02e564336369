"""What the Jacobian of f at a fixed point says: a penalty that keeps it small, and its spectral radius."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import compiled
from .ops.layout import Layout
from .ops.packing import pack, unpack
from .options import check_int


@compiled.entry()
def jacobian_penalty(
    f: Callable[..., Any],
    z: Any,
    probes: int = 1,
    *,
    args: tuple[Any, ...] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate ||df/dz||_F^2 per number of the state, as a term of a training loss.

    The mean over probes of ||v^T J||^2 / numel(z), v standard normal: unbiased, and one vjp a probe. Numel counts the
    batch too, as locuslab/deq's ``jac_loss_estimate`` does, and a complex number as two. Gradients reach what f uses,
    and z if it requires grad; pass z.detach() for a penalty on the map alone, which is what that code computes.

    Args:
        f: callable (z, *args) -> shaped like z.
        z: tensor (B, ...) or a tree of tensors, usually a solution.
        probes: random vectors to average over, default 1.
        args: handed to f after z.
        generator: source of the random numbers, for an answer that can be repeated.

    Returns:
        A scalar of z's real dtype, float32 at least.

    Raises:
        ValueError, TypeError: probes below 1; z or f(z) is not a batch of floating tensors.

    Source: Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021.
    """
    if isinstance(probes, bool) or not isinstance(probes, int):
        raise TypeError(f"probes must be an int, got {type(probes).__name__}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    layout = Layout(z, "z")
    keep_graph = torch.is_grad_enabled()
    vjp = _Vjp(f, z, args, layout, create_graph=keep_graph)
    total = torch.zeros((), dtype=layout.acc, device=layout.device)
    for _ in range(probes):
        v = torch.randn(layout.B, layout.N, dtype=layout.acc, device=layout.device, generator=generator)
        total = total + vjp(v).square().sum()
    return total / (probes * max(1, layout.B * layout.N))


@compiled.entry()
def spectral_radius(
    f: Callable[..., Any],
    z: Any,
    *,
    args: tuple[Any, ...] = (),
    vectors: int = 24,
    cycles: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the largest |eigenvalue| of df/dz for every sample; samples must be independent in f.

    Below one plain iteration converges near z; the closer to one (or the further above), the more Anderson or Broyden
    save. Restarted Arnoldi on J^T, which has J's eigenvalues: those of its projection on a small Krylov space, so that
    complex pairs and several eigenvalues of one modulus are right, where the norm ratio of a power iteration
    oscillates. Exact, up to rounding, once ``vectors`` reaches the numbers of a sample; below that usually within a few
    per cent, and too large where J is far from normal (a long Jordan block), as is its effect on the first iterations.
    Not differentiable.

    Args:
        f: callable (z, *args) -> shaped like z.
        z: tensor (B, ...) or a tree of tensors, usually a solution.
        args: handed to f after z.
        vectors: dimension of the Krylov space, default 24; memory is that many copies of z.
        cycles: how often it is built, default 2, each time from the eigenvector found before; vectors * cycles vjps.
        generator: source of the random start, for an answer that can be repeated.

    Returns:
        (B,) in float64 for float64 states, else float32; NaN for samples whose Jacobian is not finite.

    Raises:
        ValueError, TypeError: vectors or cycles below 1; z or f(z) is not a batch of floating tensors.
        RuntimeError: in inference mode.

    Source: Saad, Numerical Methods for Large Eigenvalue Problems, 2nd ed., SIAM 2011, section 6.2.
    """
    check_int("vectors", vectors)
    check_int("cycles", cycles)
    layout = Layout(z, "z")
    if layout.B == 0 or layout.N == 0:
        return torch.zeros(layout.B, dtype=layout.acc, device=layout.device)
    vjp = _Vjp(f, z, args, layout, create_graph=False)
    size = min(vectors, layout.N)
    start = torch.randn(layout.B, layout.N, dtype=layout.acc, device=layout.device, generator=generator)
    with torch.no_grad():
        for _ in range(1 if size == layout.N else cycles):
            basis, hessenberg, finite = _arnoldi(vjp, start, size)
            eigenvalues, eigenvectors = torch.linalg.eig(hessenberg)
            largest = eigenvalues.abs().argmax(dim=1)
            chosen = eigenvectors[torch.arange(layout.B, device=start.device), :, largest]
            # A real start that holds both vectors of a complex pair.
            following = torch.einsum("kbn,bk->bn", basis, chosen.real + chosen.imag)
            found = following.norm(dim=1, keepdim=True) > 0  # not where J = 0
            start = torch.where(found, following, start)
        radius = eigenvalues.abs().amax(dim=1)
        return torch.where(finite, radius, torch.nan)


def _arnoldi(vjp: _Vjp, start: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal (size, B, N), its (B, size, size) projection of J^T, and which samples stayed finite.

    A space that J^T maps into itself ends early: the vectors after it are zero, and so are their eigenvalues.
    """
    B, N = start.shape
    tiny = 10 * torch.finfo(start.dtype).eps
    basis = start.new_zeros(size, B, N)
    hessenberg = start.new_zeros(B, size, size)
    finite = torch.ones(B, dtype=torch.bool, device=start.device)
    v = start / start.norm(dim=1, keepdim=True)
    for j in range(size):
        basis[j] = v
        w = vjp(v)
        finite &= torch.isfinite(w).all(1)
        w = torch.where(finite[:, None], w, 0)
        before = w.norm(dim=1)
        for _ in range(2):  # once loses orthogonality where J is not normal
            overlap = torch.einsum("kbn,bn->bk", basis[: j + 1], w)
            w = w - torch.einsum("kbn,bk->bn", basis[: j + 1], overlap)
            hessenberg[:, : j + 1, j] += overlap
        after = w.norm(dim=1)
        ended = after <= tiny * before
        if j + 1 < size:
            hessenberg[:, j + 1, j] = torch.where(ended, 0, after)
        v = torch.where(ended[:, None], 0, w / torch.where(ended, 1, after)[:, None])
    return basis, hessenberg, finite


class _Vjp:
    """v -> J^T v on (B, N) numbers, from one evaluation of f."""

    def __init__(
        self, f: Callable[..., Any], z: Any, args: tuple[Any, ...], layout: Layout, *, create_graph: bool
    ) -> None:
        if not callable(f):
            raise TypeError(f"f must be callable, got {type(f).__name__}")
        if not isinstance(args, tuple):
            raise TypeError(f"args must be a tuple, got {type(args).__name__}; write args=(x,) for one argument")
        self.layout = layout
        self.create_graph = create_graph
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "derivatives of f need a graph, which torch.inference_mode() forbids; use torch.no_grad()"
            )
        with torch.enable_grad():
            # Views: hooks on a caller's tensor are none of this function's business.
            self.z = [
                t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_()
                for t in layout.tensors(z)
            ]
            self.fz = layout.flatten(f(layout.unflatten(self.z), *args), "f(z)")

    def __call__(self, v: Tensor) -> Tensor:
        """J^T v."""
        pairs = [(t, u.to(t.dtype)) for t, u in zip(self.fz, unpack(self.layout, v), strict=True) if t.requires_grad]
        if not pairs:
            return torch.zeros_like(v)
        outputs, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs, self.z, cotangents, retain_graph=True, create_graph=self.create_graph, allow_unused=True
        )
        return pack(self.layout, [torch.zeros_like(z) if t is None else t for t, z in zip(found, self.z, strict=True)])
