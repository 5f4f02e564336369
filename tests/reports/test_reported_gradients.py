"""What users have reported of gradients through an equilibrium, each against a closed form or an unrolled iteration."""

from __future__ import annotations

import math

import pytest
import torch
from problems import ONE_OF_EACH
from torch import nn

import deqfast as dq

F64 = torch.float64
TIGHT = {"rtol": 1e-12, "max_iter": 500}


def close(a, b, tolerance=1e-8):
    return float((a - b).detach().norm()) <= tolerance * float(b.detach().norm())


def matrix(N=5, norm=0.7):
    A = torch.randn(N, N, dtype=F64)
    return (norm * A / torch.linalg.matrix_norm(A, 2)).requires_grad_()


def affine(z, W, x):
    return z @ W + x


def solved(W, x):
    """The fixed point of ``affine``."""
    return x @ torch.linalg.inv(torch.eye(len(W), dtype=W.dtype) - W)


class Cell(nn.Module):
    """``affine`` with a parameter."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(matrix().detach())

    def forward(self, z, x):
        return affine(z, self.W, x)


# ---- first derivatives ----


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_adjoint_has_the_sign_and_the_transpose_of_the_implicit_function_theorem(solver):
    """The backward equation lacks a term or has another sign (locuslab/mdeq#8)."""
    W, x = matrix(), torch.randn(3, 5, dtype=F64, requires_grad=True)
    z = dq.fixed_point(affine, torch.zeros(3, 5, dtype=F64), (W, x), solver=solver, **TIGHT).z
    c = torch.randn(3, 5, dtype=F64)
    for got, right in zip(
        torch.autograd.grad((c * z).sum(), (W, x)), torch.autograd.grad((c * solved(W, x)).sum(), (W, x)), strict=True
    ):
        assert close(got, right)


def test_gradcheck_of_a_nonlinear_layer_passes_twice():
    """torch.autograd.gradcheck of a layer fails (locuslab/deq#11)."""
    W, x = matrix(3), torch.randn(2, 3, dtype=F64, requires_grad=True)

    def layer(W, x):
        return dq.fixed_point(lambda z, W, x: torch.tanh(z @ W + x), torch.zeros(2, 3, dtype=F64), (W, x), **TIGHT).z

    assert torch.autograd.gradcheck(layer, (W, x))
    assert torch.autograd.gradgradcheck(layer, (W, x))


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_scale_of_the_loss_does_not_matter(dtype, scale):
    """A small loss meets the absolute tolerance of the backward solve at once, and its gradient is 0."""
    W, x = matrix(), torch.randn(3, 5, dtype=F64)
    (right,) = torch.autograd.grad(scale * solved(W, x).square().sum(), W)
    V = W.detach().to(dtype).requires_grad_()
    sol = dq.fixed_point(affine, torch.zeros(3, 5, dtype=dtype), (V, x.to(dtype)), rtol=1e-6, max_iter=200)
    (scale * sol.z.square().sum()).backward()
    assert sol.backward.converged.all() and close(V.grad.double(), right, 1e-4)


def test_absolute_tolerance_of_the_forward_solve_is_not_that_of_the_backward_one():
    """rtol=0, atol=1e-3 forward makes a backward solve that never ends, or ends at once."""
    W, x = matrix(), torch.randn(3, 5, dtype=F64)
    z = dq.fixed_point(affine, torch.zeros(3, 5, dtype=F64), (W, x), rtol=0, atol=1e-9, max_iter=200).z
    (found,) = torch.autograd.grad(1e-6 * z.square().sum(), W)
    assert close(found, torch.autograd.grad(1e-6 * solved(W, x).square().sum(), W)[0], 1e-6)


@pytest.mark.parametrize("limit", [1, 2, 3, 6])
def test_options_of_the_backward_solve_are_used_and_running_out_is_said(limit):
    """Options for the backward solve are ignored (deepinv/deepinv#1022); it fails in silence (google/jaxopt#466).

    Plain iteration of u = a u + 1 from 1, cut at its k-th evaluation, is the sum of a^j, j < k.
    """
    x = torch.ones(1, 1, dtype=F64, requires_grad=True)
    gradient = dq.Implicit(solver="picard", max_iter=limit)
    sol = dq.fixed_point(lambda z, x: 0.9 * z + x, torch.zeros(1, 1, dtype=F64), (x,), backward=gradient)
    with pytest.warns(dq.GradientWarning, match="did not converge for 1 of 1"):
        sol.z.sum().backward()
    assert abs(float(x.grad) - sum(0.9**j for j in range(limit))) < 1e-12
    assert sol.backward.evaluations == limit and not sol.backward.converged.any()


def test_layer_whose_forward_solve_ran_out_says_so_and_has_the_gradient_at_what_it_returned():
    """A forward solve that hit max_iter gives gradients of something, without a word."""
    gradient = dq.Implicit(solver="anderson", max_iter=500)
    layer = dq.DEQ(lambda z, x: 0.99 * torch.sin(z) + x, solver="picard", max_iter=5, backward=gradient)
    x = torch.full((2, 1), 1e-2, dtype=F64, requires_grad=True)
    with pytest.warns(dq.ConvergenceWarning, match="no sample of a batch converged"):
        z = layer(x)
    (g,) = torch.autograd.grad(z.sum(), x)
    assert close(g, 1 / (1 - 0.99 * torch.cos(z.detach())), 1e-6)


def test_same_layer_called_twice_before_backward():
    """The second call replaces the hook of the first one, whose gradient is then that of one application."""
    layer, x, y = dq.DEQ(Cell(), **TIGHT), torch.randn(3, 5, dtype=F64), torch.randn(2, 5, dtype=F64)
    (layer(x).square().sum() + layer(y).cos().sum() + layer(layer(x)).sum()).backward()
    W = layer.cell.W.detach().requires_grad_()
    right = solved(W, x).square().sum() + solved(W, y).cos().sum() + solved(W, solved(W, x)).sum()
    assert close(layer.cell.W.grad, torch.autograd.grad(right, W)[0])
    before = layer.cell.W.grad.clone()
    layer(x).sum().backward()  # accumulates
    assert close(layer.cell.W.grad - before, torch.autograd.grad(solved(W, x).sum(), W)[0])


def test_backward_twice_through_one_solve():
    """retain_graph=True and a second backward: the backward solve has freed what it needs, or has kept its state."""
    W, x = matrix(), torch.randn(3, 5, dtype=F64)
    z = dq.fixed_point(affine, torch.zeros(3, 5, dtype=F64), (W, x), **TIGHT).z
    first, other, again = (
        torch.autograd.grad(loss, W, retain_graph=True)[0] for loss in (z.sum(), z.cos().sum(), z.sum())
    )
    assert torch.equal(first, again)
    assert close(other, torch.autograd.grad(solved(W, x).cos().sum(), W)[0])


GRADIENTS = {"Implicit": dq.Implicit(), "Phantom": dq.Phantom(steps=300), "Unroll": dq.Unroll()}


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_are_the_same_in_evaluation_mode(gradient):
    """In evaluation mode there is no gradient: a parameter or an input of a trained model cannot be tuned."""
    layer, x = dq.DEQ(Cell(), backward=gradient, **TIGHT), torch.randn(3, 5, dtype=F64, requires_grad=True)
    W = layer.cell.W
    right = torch.autograd.grad(solved(W, x).square().sum(), (W, x))
    for module in (layer.train(), layer.eval()):
        found = torch.autograd.grad(module(x).square().sum(), (W, x))
        assert all(close(a, b, 1e-7) for a, b in zip(found, right, strict=True))


def test_no_graph_where_no_gradient_is_wanted():
    """A solve under no_grad, or of an f without parameters, returns a z that requires grad and holds a graph."""
    W, x = matrix(), torch.randn(3, 5, dtype=F64)
    with torch.no_grad():
        z = dq.fixed_point(affine, torch.zeros(3, 5, dtype=F64), (W, x), **TIGHT).z
    assert not z.requires_grad and close(z, solved(W, x).detach())
    z = dq.fixed_point(affine, torch.zeros(3, 5, dtype=F64), (W.detach(), x), **TIGHT).z
    assert not z.requires_grad and close(z, solved(W, x).detach())


def test_parameters_that_f_does_not_use_and_the_start_get_no_gradient():
    """DistributedDataParallel waits for parameters that the graph of the equilibrium does not hold."""

    class WithMore(Cell):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(3))
            self.frozen = nn.Parameter(torch.full((5,), 0.1, dtype=F64), requires_grad=False)

        def forward(self, z, x):
            return affine(z, self.W, x + self.frozen)

    layer, x = dq.DEQ(WithMore(), **TIGHT), torch.randn(3, 5, dtype=F64)
    z0 = torch.randn(3, 5, dtype=F64, requires_grad=True)
    layer(x, z0=z0).square().sum().backward()
    W = layer.cell.W.detach().requires_grad_()
    (right,) = torch.autograd.grad(solved(W, x + 0.1).square().sum(), W)
    assert close(layer.cell.W.grad, right)
    assert layer.cell.unused.grad is None and layer.cell.frozen.grad is None and z0.grad is None


def test_gradients_reach_keyword_arguments_and_aux_is_of_the_last_evaluation():
    """Auxiliary output is not supported (google/jaxopt#456) or has no gradient (patrick-kidger/optimistix#154)."""
    W, x = matrix(), torch.randn(3, 5, dtype=F64, requires_grad=True)
    evaluations = []

    def f(z, W, *, bias, factor):
        evaluations.append(z.detach().clone())
        return z @ W + factor * bias, {"norm": z.detach().norm(), "evaluation": len(evaluations)}

    z0 = torch.zeros(3, 5, dtype=F64)
    sol = dq.fixed_point(f, z0, (W,), kwargs={"bias": x, "factor": 2.0}, has_aux=True, **TIGHT)
    right = solved(W, 2 * x)
    assert close(sol.z, right)
    assert sol.aux["evaluation"] == sol.nfe
    assert float(sol.aux["norm"]) == float(evaluations[sol.nfe - 1].norm())
    for a, b in zip(
        torch.autograd.grad(sol.z.cos().sum(), (W, x)), torch.autograd.grad(right.cos().sum(), (W, x)), strict=True
    ):
        assert close(a, b)


# ---- second derivatives ----


def kepler(x, **options):
    return dq.fixed_point(lambda z, x: x + 0.5 * torch.sin(z), torch.zeros_like(x).detach(), (x,), **TIGHT, **options).z


def test_second_derivative_of_an_equilibrium_is_not_zero():
    """The Hessian through a root is broken (patrick-kidger/optimistix#151), or that of one application of f.

    z = x + sin(z) / 2: z' = 1 / (1 - cos(z) / 2), z'' = -sin(z) / 2 z'^3.
    """
    x = torch.linspace(-2, 2, 5, dtype=F64)[:, None].requires_grad_()
    z = kepler(x)
    (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    slope = 1 / (1 - 0.5 * torch.cos(z))
    assert close(first, slope) and close(second, -0.5 * torch.sin(z) * slope**3)


def test_hessian_of_a_loss_is_that_of_the_closed_form():
    """A Hessian by torch.autograd.functional of a loss on the equilibrium."""
    W, x = matrix(3), torch.randn(2, 3, dtype=F64)

    def loss(W, z):
        return (z**3).sum() + z.cos().sum()

    got = torch.autograd.functional.hessian(
        lambda W: loss(W, dq.fixed_point(affine, torch.zeros(2, 3, dtype=F64), (W, x), **TIGHT).z), W.detach()
    )
    right = torch.autograd.functional.hessian(lambda W: loss(W, solved(W, x)), W.detach())
    assert close(got.view(9, 9), right.view(9, 9), 1e-7)


def test_gradient_of_a_density_that_holds_a_gradient():
    """Gradients through value_and_grad of an inverse function are wrong (google/jaxopt#141).

    The inverse of (a x^2 + b x) / (a + b), its derivative by y, and the gradient of both by a and b.
    """
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.7, 0.4))
    y = torch.tensor([[0.2], [0.5], [0.9]], dtype=F64, requires_grad=True)

    def closed(a, b, y):
        return (-b + torch.sqrt(b * b + 4 * a * (a + b) * y)) / (2 * a)

    def found(a, b, y):
        g = lambda x, a, b, y: y - (a * x * x + b * x) / (a + b)  # noqa: E731
        return dq.root(g, torch.full_like(y, 0.5).detach(), (a, b, y), **TIGHT).z

    results = []
    for inverse in (found, closed):
        x = inverse(a, b, y)
        (density,) = torch.autograd.grad(x.sum(), y, create_graph=True)
        results.append([x, density, *torch.autograd.grad((x * density.log()).sum(), (a, b, y))])
    for got, right in zip(*results, strict=True):
        assert close(got, right, 1e-7)


# ---- the Jacobian itself ----


def test_spectral_radius_is_that_of_the_eigenvalues_pairs_included():
    """A power iteration oscillates at a complex pair, and reports anything between."""
    rate = torch.tensor([0.3, 0.9, 1.4], dtype=F64)
    turn = torch.tensor([[math.cos(1.1), -math.sin(1.1)], [math.sin(1.1), math.cos(1.1)]], dtype=F64)
    z = torch.randn(3, 2, dtype=F64)
    found = dq.spectral_radius(lambda z: rate[:, None] * z @ turn.T, z)
    assert close(found, rate)
    W, x = matrix(7), torch.randn(4, 7, dtype=F64)
    z = dq.fixed_point(lambda z: torch.tanh(z @ W + x), torch.zeros(4, 7, dtype=F64), **TIGHT).z.detach()
    with torch.no_grad():
        J = (1 - z**2)[:, :, None] * W.T
    assert close(dq.spectral_radius(lambda z: torch.tanh(z @ W + x), z), torch.linalg.eigvals(J).abs().amax(1))


def test_jacobian_penalty_is_the_mean_square_of_the_jacobian_and_its_descent_shrinks_it():
    """The penalty is counted once a sample here and once a number there; with it the radius should fall."""
    W, z = matrix(6, 1.5), torch.randn(4, 6, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    penalty = dq.jacobian_penalty(lambda z: z @ W, z, probes=3000, generator=generator)
    assert close(penalty, W.square().sum() / 6, 0.02)
    (g,) = torch.autograd.grad(penalty, W)
    assert close(g, 2 * W.detach() / 6, 0.05)
    before = dq.spectral_radius(lambda z: z @ W, z)
    after = dq.spectral_radius(lambda z: z @ (W - 0.5 * g), z)
    assert bool((after < before).all())
