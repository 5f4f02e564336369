"""The layers that hold these solvers in public code: a solve without gradients, one evaluation, a solve in a hook."""

import pytest
import torch

from deqfast.compat import locuslab

B, D, L = 3, 4, 2
SOLVERS = {
    "anderson": lambda f, x0: locuslab.anderson(f, x0, threshold=60, eps=1e-10, name="backward")["result"],
    "broyden": lambda f, x0: locuslab.broyden(f, x0, 60, 1e-10, stop_mode="abs")["result"],
    "mdeq_broyden": lambda f, x0: locuslab.mdeq_broyden(lambda z: f(z) - z, x0, 60, 1e-10)["result"],
    "tutorial_anderson": lambda f, x0: locuslab.tutorial_anderson(f, x0, tol=1e-10, max_iter=80)[0],
}


class Layer(torch.nn.Module):
    """As the tutorial and locuslab/deq write it."""

    def __init__(self, cell, solver):
        super().__init__()
        self.cell, self.solver = cell, solver

    def forward(self, x):
        with torch.no_grad():
            z = self.solver(lambda z: self.cell(z, x), torch.zeros_like(x))
        z = self.cell(z, x)
        z0 = z.clone().detach().requires_grad_()
        f0 = self.cell(z0, x)

        def hook(grad):
            def vjp(y):
                return torch.autograd.grad(f0, z0, y, retain_graph=True)[0] + grad

            return self.solver(vjp, torch.zeros_like(grad))

        z.register_hook(hook)
        return z


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(L, L).double()
        self.mix = torch.nn.Parameter(0.3 * torch.randn(D, D, dtype=torch.float64))

    def forward(self, z, x):
        return torch.tanh(self.mix @ (0.5 * self.linear(z)) + x)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_of_a_layer_are_those_of_the_fixed_point(solver):
    cell, x = Cell(), torch.randn(B, D, L, dtype=torch.float64, requires_grad=True)
    leaves = [x, *cell.parameters()]
    got = torch.autograd.grad(Layer(cell, SOLVERS[solver])(x).square().sum(), leaves)
    z = torch.zeros_like(x)
    for _ in range(150):
        z = cell(z, x)
    for g, expected in zip(got, torch.autograd.grad(z.square().sum(), leaves), strict=True):
        assert torch.allclose(g, expected, atol=1e-7)


def test_nothing_comes_with_a_graph_though_gradients_are_on():
    cell, x = Cell(), torch.randn(B, D, L, dtype=torch.float64, requires_grad=True)
    for solve in SOLVERS.values():
        assert not solve(lambda z: cell(z, x), torch.zeros_like(x)).requires_grad
