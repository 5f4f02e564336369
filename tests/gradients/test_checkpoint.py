"""A solve inside of a checkpoint is made twice, not once more for every vjp of its backward solve."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

import deqfast as dq


def test_non_reentrant_checkpointing_computes_the_forward_once_more():
    torch.manual_seed(0)
    W = (0.5 * torch.linalg.qr(torch.randn(8, 8)).Q).double().requires_grad_()
    x = torch.randn(5, 8, dtype=torch.float64)
    calls = []

    def f(z, x):
        calls.append(1)
        return torch.tanh(z @ W + x)

    def block(x):
        return dq.fixed_point(f, torch.zeros_like(x), (x,), rtol=1e-10).z.sin()

    z = block(x)
    plain, once = torch.autograd.grad(z.sum(), W)[0], len(calls)
    calls.clear()
    z = checkpoint(block, x, use_reentrant=False)
    checked = torch.autograd.grad(z.sum(), W)[0]
    assert torch.allclose(checked, plain, rtol=1e-8)
    assert len(calls) <= 2 * once + 2


def test_other_hooks_on_saved_tensors_change_no_gradient():
    W = torch.full((4, 4), 0.1, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64)

    def gradient():
        z = dq.fixed_point(lambda z: torch.tanh(z @ W + x), torch.zeros_like(x), rtol=1e-12).z
        return torch.autograd.grad(z.square().sum(), W)[0]

    plain = gradient()
    with torch.autograd.graph.save_on_cpu():
        assert torch.allclose(gradient(), plain, rtol=1e-10)
