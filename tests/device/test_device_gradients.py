"""On a GPU: gradients that do not wait for the device, under autocast, and of compiled models."""

from __future__ import annotations

import pytest
import torch
from gpu import GPU, Cell, every_backend, every_solver, native_only, needs_gpu, no_sync, not_dry

import deqfast as dq

pytestmark = needs_gpu


def gradients(cell, x, device=GPU, **options):
    """Of a sum of squares with respect to x and the weights."""
    given = x.detach().clone().to(device).requires_grad_()
    cell.zero_grad()
    z = dq.fixed_point(cell, torch.zeros_like(given), (given,), **options).z
    z.float().square().sum().backward()
    return [given.grad, *(p.grad for p in cell.parameters())]


def assert_close(found, expected, error):
    for a, b in zip(found, expected, strict=True):
        assert float((a.cpu() - b.cpu()).norm()) <= error * float(b.norm())


# Triton counts the samples that failed with torch, once a backward solve, and waits for that.
@native_only
@every_solver
@pytest.mark.parametrize("mode", ["loop", "graph", "device"])
def test_forward_and_backward_do_not_wait_for_the_device(mode, solver, backend):
    cell, x = Cell(), torch.randn(5, 24, device=GPU)
    options = {"solver": solver, "backend": backend, "mode": mode, "rtol": 1e-5, "max_iter": 101}
    expected = gradients(cell, x, **options)
    cell.zero_grad()
    with no_sync():
        found = gradients(cell, x, **options)
    assert_close(found, expected, 1e-5)


@every_backend
@every_solver
@pytest.mark.parametrize("way", [dq.Implicit(), dq.Phantom(steps=3), dq.OneStep(), dq.Unroll()], ids=str)
def test_gradients_are_those_of_the_cpu(way, solver, backend):
    cell, x = Cell(), torch.randn(5, 24, device=GPU)
    found = gradients(cell, x, solver=solver, backend=backend, backward=way, rtol=1e-6, max_iter=200)
    expected = gradients(
        cell.cpu(), x, torch.device("cpu"), solver=solver, backend="reference", backward=way, rtol=1e-6, max_iter=200
    )
    assert_close(found, expected, 2e-4)


@every_backend
def test_gradients_of_gradients_are_right(backend):
    cell = Cell(5).double()
    x = torch.randn(2, 5, device=GPU, dtype=torch.float64, requires_grad=True)

    def solve(x):
        return dq.fixed_point(cell, torch.zeros_like(x), (x,), rtol=1e-12, backend=backend).z

    assert torch.autograd.gradcheck(solve, (x,))
    assert torch.autograd.gradgradcheck(solve, (x,))


@every_backend
@every_solver
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_under_autocast_are_near_those_in_full_precision(dtype, solver, backend):
    cell, x = Cell(), torch.randn(5, 24, device=GPU)
    expected = gradients(cell, x, rtol=1e-6, backend=backend)
    with torch.autocast(GPU.type, dtype=dtype):
        found = gradients(cell, x, solver=solver, backend=backend, rtol=2e-2)
    assert all(bool(torch.isfinite(t).all()) and t.dtype == torch.float32 for t in found)
    assert_close(found, expected, 0.1)


@native_only
def test_backward_that_fails_warns(backend):
    weight = 0.999 * torch.eye(4, device=GPU)
    b = torch.ones(2, 4, device=GPU, requires_grad=True)
    options = {"solver": "picard", "max_iter": 5, "rtol": 1e-9, "backend": backend}
    z = dq.fixed_point(lambda z, b: z @ weight + b, torch.zeros(2, 4, device=GPU), (b,), **options).z
    with pytest.warns(dq.GradientWarning, match="did not converge for 2 of 2"):
        z.sum().backward()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = torch.nn.Linear(24, 24), dq.DEQ(Cell()), torch.nn.Linear(24, 1)
        self.to(GPU)

    def forward(self, x):
        return self.last(self.layer(self.first(x)))


@not_dry
@pytest.mark.filterwarnings("ignore")  # what torch.compile itself warns of
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_model_gives_the_answers_and_gradients_of_the_eager_one(mode):
    model = Model()
    torch._dynamo.reset()
    compiled = torch.compile(model, mode=mode)
    for _ in range(3):
        x = torch.randn(5, 24, device=GPU)
        found = []
        for run in (model, compiled):
            model.zero_grad()
            out = run(x)
            out.square().sum().backward()
            found.append([out.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        assert_close(found[1], found[0], 1e-3)
