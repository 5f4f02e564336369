"""The differentiable twin of the solvers takes their very steps, and its gradients are those of what it computed."""

import pytest
import torch

import deqfast as dq

F64 = torch.float64
SOLVERS = [
    "anderson",
    "broyden",
    "picard",
    dq.Picard(damping=0.6),
    *(dq.Anderson(m=m, type=t) for m in (1, 3, 6) for t in ("mixed", 1, 2)),
    dq.Anderson(m=5, mixing=0.7),
    dq.Anderson(m=5, evict="oldest"),
    dq.Anderson(m=4, type=2, ridge=1e-3, mixing=0.9),
    dq.Broyden(memory=3),
    dq.Broyden(scale="first_step"),
]


def stiff(B=5, N=12, dtype=F64):
    """A map that takes dozens of evaluations, another number for every sample."""
    A = torch.randn(N, N, dtype=F64) / N**0.5
    x = torch.randn(B, N, dtype=F64) * torch.logspace(-2, 1, B, dtype=F64)[:, None]
    return lambda z: torch.tanh(z @ A.to(dtype) * 1.3 + x.to(dtype)), torch.zeros(B, N, dtype=dtype)


@pytest.mark.parametrize("returns", ["best", "last"])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_takes_the_steps_of_the_reference(solver, returns):
    f, z0 = stiff()
    options = {"solver": solver, "rtol": 1e-9, "max_iter": 30, "returns": returns, "trace": True}
    expected = dq.fixed_point(f, z0, backend="reference", **options)
    got = dq.fixed_point(f, z0, backward=dq.Unroll(), **options)
    assert got.nfe == expected.nfe
    assert torch.equal(got.steps, expected.steps)
    assert torch.equal(got.status, expected.status)
    assert torch.allclose(got.z, expected.z, rtol=1e-6, atol=1e-7)
    assert torch.equal(got.trace.isnan(), expected.trace.isnan())
    early = slice(0, 12)
    assert torch.allclose(got.trace[early], expected.trace[early], rtol=1e-5, equal_nan=True)
    for name, count in expected.events.items():
        assert torch.equal(got.events[name], count), name


def test_the_comparison_above_meets_evictions_and_restarts():
    f, z0 = stiff()
    for solver, event in [(dq.Anderson(m=3), "evictions"), (dq.Broyden(memory=3), "full_restarts")]:
        sol = dq.fixed_point(f, z0, solver=solver, rtol=1e-9, max_iter=30, backward=dq.Unroll())
        assert sol.events[event].sum() > 0
    assert sol.backend == "unrolled"


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_gradcheck_of_a_few_iterations(solver):
    W = (torch.randn(3, 3, dtype=F64) * 0.5).requires_grad_()
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    z0 = torch.zeros(2, 3, dtype=F64, requires_grad=True)

    def run(x, W, z0):
        return dq.fixed_point(
            lambda z: torch.tanh(z @ W + x), z0, solver=solver, rtol=0, max_iter=7, returns="last", backward=dq.Unroll()
        ).z

    # Far from converged: gamma's own derivative is a large part of this one.
    assert torch.autograd.gradcheck(run, (x, W, z0), atol=1e-4, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard", dq.Anderson(type=2)], ids=str)
def test_gradients_approach_the_implicit_ones(solver):
    W = (torch.randn(6, 6, dtype=F64) * 0.25).requires_grad_()
    x = torch.randn(3, 6, dtype=F64, requires_grad=True)
    c = torch.randn(3, 6, dtype=F64)
    options = {"rtol": 1e-12, "max_iter": 200, "solver": solver}
    grads = []
    for backward in (dq.Unroll(), dq.Implicit()):
        z = dq.fixed_point(lambda z: torch.tanh(z @ W + x), torch.zeros_like(x), backward=backward, **options).z
        grads.append(torch.autograd.grad((z * c).sum(), (x, W)))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_trees_complex_numbers_and_memory_formats():
    x = torch.randn(2, 3, 4, 5, dtype=F64).to(memory_format=torch.channels_last).requires_grad_()
    y = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)

    def f(z):
        return {"x": 0.5 * torch.sin(z["x"]) + x, "y": 0.3 * z["y"] * 1j + y}

    z0 = {"x": torch.zeros_like(x), "y": torch.zeros_like(y)}
    unrolled = dq.fixed_point(f, z0, rtol=1e-12, backward=dq.Unroll()).z
    implicit = dq.fixed_point(f, z0, rtol=1e-12).z
    for name in z0:
        assert torch.allclose(unrolled[name], implicit[name])
        loss = [torch.view_as_real(z[name]) if z[name].is_complex() else z[name] for z in (unrolled, implicit)]
        a, b = (torch.autograd.grad(t.sin().sum(), {"x": x, "y": y}[name], retain_graph=True)[0] for t in loss)
        assert torch.allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_states(dtype):
    f, z0 = stiff(dtype=dtype)
    x = torch.zeros_like(z0, requires_grad=True)
    sol = dq.fixed_point(lambda z: f(z + x) * 0.5, z0, backward=dq.Unroll(), solver=dq.Anderson(m=3))
    sol.z.float().sum().backward()
    assert sol.z.dtype == dtype and x.grad.isfinite().all()


def test_f_may_write_into_z_and_reuse_its_output():
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    z = dq.fixed_point(lambda z: z.mul_(0.5).add_(x), torch.zeros_like(x), backward=dq.Unroll(), rtol=1e-10).z
    assert torch.allclose(torch.autograd.grad(z.sum(), x)[0], torch.full_like(x, 2.0))


def test_nan_sample_keeps_its_best_iterate_and_spoils_no_other_gradient():
    x = torch.tensor([[0.5], [9.0]], dtype=F64, requires_grad=True)

    def f(z):
        return 0.5 * z + x * torch.where(z > 10, torch.nan, 1.0)

    for solver in ("anderson", "picard"):
        sol = dq.fixed_point(f, torch.zeros_like(x), solver=solver, backward=dq.Unroll())
        plain = dq.fixed_point(f, torch.zeros_like(x), solver=solver, backward="none", backend="reference")
        assert torch.equal(sol.status, plain.status)
        assert torch.allclose(sol.z, plain.z) and torch.allclose(sol.residual, plain.residual)
        assert torch.allclose(torch.autograd.grad(sol.z[0], x)[0][0], torch.tensor([2.0], dtype=F64), rtol=1e-6)


def test_empty_batch_and_empty_state():
    for shape in ((0, 3), (3, 0)):
        sol = dq.fixed_point(torch.cos, torch.zeros(shape), backward=dq.Unroll(), trace=True)
        assert sol.z.shape == shape and sol.nfe == 0 and sol.converged.all()


@pytest.mark.parametrize("option", [{"compact": True}, {"callback": lambda k, s: None}, {"progress": True}])
def test_options_it_cannot_honour_raise(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} does not go together with backward=dq.Unroll"):
        dq.fixed_point(torch.cos, torch.ones(2, 2), backward=dq.Unroll(), **option)


def test_throw_carries_the_solution():
    with pytest.raises(dq.ConvergenceError) as caught:
        dq.fixed_point(
            lambda z: -z + 1, torch.zeros(2, 2), solver="picard", max_iter=4, backward=dq.Unroll(), throw=True
        )
    assert caught.value.solution.nfe == 4


def test_without_gradients_the_fast_solver_runs():
    with torch.no_grad():
        assert dq.fixed_point(torch.cos, torch.ones(2, 2), backward=dq.Unroll()).backend != "unrolled"
