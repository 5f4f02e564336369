"""What locuslab's lib/jacobian.py says of f at a point: its documented arguments and results, closed forms."""

import pytest
import torch

from deqfast.compat import locuslab

B = 4


def test_jac_loss_estimate_is_that_of_the_frobenius_norm():
    W = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    z = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    loss = locuslab.jac_loss_estimate(z @ W, z, vecs=400)
    assert loss.shape == () and loss.item() == pytest.approx(W.square().sum().item() / 6, rel=0.05)
    (grad,) = torch.autograd.grad(loss, W)
    assert torch.allclose(grad, 2 * W / 6, atol=0.2)
    assert not locuslab.jac_loss_estimate(z @ W, z, create_graph=False).requires_grad


def test_power_method():
    A = torch.diag(torch.tensor([0.9, -0.5, 0.2], dtype=torch.float64))
    z = torch.randn(B, 3, dtype=torch.float64, requires_grad=True)
    vector, value = locuslab.power_method(z @ A, z)
    assert vector.shape == z.shape and value.shape == (B, 1)
    assert torch.allclose(value, torch.full_like(value, 0.9)) and torch.allclose(
        vector[:, 0].abs(), torch.ones(B).double()
    )
    turn = (
        0.8
        * torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
        @ torch.diag(torch.tensor([1.0, 1.0]).double())
    )
    skew = torch.tensor([[1.0, 3.0], [0.0, 1.0]], dtype=torch.float64)
    turn = torch.linalg.inv(skew) @ turn @ skew  # a pair of complex eigenvalues of modulus 0.8, not normal
    z = torch.randn(B, 1, 2, dtype=torch.float64, requires_grad=True)
    vector, value = locuslab.power_method(z @ turn, z, n_iters=400)
    assert vector.shape == z.shape and torch.allclose(value, torch.full_like(value, 0.8), atol=0.02)
