"""The nets, as arrays that torch and JAX read alike: needs neither of them.

Weights are such that plain iteration converges, slowly enough that a solver is worth its price; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RTOL = 1e-4  # of both passes, relative


@dataclass
class Net:
    """f's kind, its parameters, what drives it, and the weights of the loss sum(c z)."""

    kind: str
    params: dict[str, np.ndarray]
    x: np.ndarray
    c: np.ndarray


def mlp(n: int) -> Net:
    """F(z) = tanh(W z + b + x), 64 samples of ``n`` numbers."""
    g = np.random.default_rng(n)
    w = 0.5 * g.standard_normal((n, n)) / n**0.5
    return _net("mlp", {"w": w, "b": 0.1 * g.standard_normal(n)}, (64, n), g)


def conv() -> Net:
    """F(z) = tanh(V relu(W z + b) + x), 3 x 3 kernels, 16 samples of 16 channels of 16 x 16; channels last."""
    g = np.random.default_rng(1)
    kernels = {name: 1.1 * g.standard_normal((3, 3, 16, 16)) / 144**0.5 for name in ("v", "w")}
    return _net("conv", {**kernels, "b": 0.1 * g.standard_normal(16)}, (16, 16, 16, 16), g)


def attention() -> Net:
    """F(z) = tanh(softmax(Qz (Kz)^T / 8) Vz + Wz + x), 16 samples of 32 tokens of 64 numbers."""
    g = np.random.default_rng(2)
    scales = {"q": 1.0, "k": 1.0, "v": 0.8, "w": 0.55}
    params = {name: s * g.standard_normal((64, 64)) / 8 for name, s in scales.items()}
    return _net("attention", params, (16, 32, 64), g)


def _net(kind: str, params: dict[str, np.ndarray], shape: tuple[int, ...], g: np.random.Generator) -> Net:
    x, c = 0.5 * g.standard_normal(shape), g.standard_normal(shape)
    return Net(kind, {k: v.astype(np.float32) for k, v in params.items()}, x.astype(np.float32), c.astype(np.float32))


NETS: dict[str, Callable[[], Net]] = {
    "MLP 64 x 128": lambda: mlp(128),
    "MLP 64 x 512": lambda: mlp(512),
    "MLP 64 x 1024": lambda: mlp(1024),
    "conv 16 x 16 x 16 x 16": conv,
    "attention 16 x 32 x 64": attention,
}
