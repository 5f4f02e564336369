"""Forward mode and torch.func: right, or refused in words."""

import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

import deqfast as dq

F64 = torch.float64
# torch compiles its forward-mode decompositions with an API that it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
SOLVERS = ["anderson", "broyden", "picard"]


def problem():
    W = torch.randn(5, 5, dtype=F64) * 0.2
    x, c, t = (torch.randn(3, 5, dtype=F64) for _ in range(3))
    return W, x, c, t


def solve(x, W, **options):
    options = {"rtol": 1e-13, "max_iter": 200, **options}
    return dq.fixed_point(lambda z, x: torch.tanh(z @ W + x), torch.zeros(x.shape, dtype=F64), (x,), **options).z


def reference(W, x, c):
    x, W = x.clone().requires_grad_(), W.clone().requires_grad_()
    return torch.autograd.grad((solve(x, W) * c).sum(), (x, W))


@pytest.mark.parametrize("solver", SOLVERS)
def test_func_grad_through_args_and_closures(solver):
    W, x, c, _ = problem()
    got = grad(lambda x, W: (solve(x, W, solver=solver) * c).sum(), argnums=(0, 1))(x, W)
    for a, b in zip(got, reference(W, x, c), strict=True):
        assert torch.allclose(a, b, rtol=1e-8)


def test_func_grad_of_functional_call():
    linear = torch.nn.Linear(5, 5, dtype=F64)
    torch.nn.init.normal_(linear.weight, std=0.2)
    x = torch.randn(3, 5, dtype=F64)
    deq = dq.DEQ(lambda z, x, params: torch.tanh(functional_call(linear, params, (z,)) + x), rtol=1e-12)
    module = dq.DEQ(Cell(linear), rtol=1e-12)

    def loss(params):
        return deq(x, params).square().sum()

    params = dict(linear.named_parameters())
    got, value = grad_and_value(loss)(params)
    whole = grad(lambda p: functional_call(module, p, (x,)).square().sum())(dict(module.named_parameters()))
    module(x).square().sum().backward()
    for name, p in params.items():
        assert torch.allclose(got[name], p.grad, rtol=1e-8)
        assert torch.allclose(whole[f"cell.linear.{name}"], p.grad, rtol=1e-8)
    assert torch.allclose(value, module(x).square().sum())


class Cell(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def test_func_vjp_may_be_called_after_its_level_has_gone():
    W, x, c, _ = problem()
    _, pullback = vjp(lambda x, W: solve(x, W), x, W)  # type: ignore[misc]
    for got, expected in zip(pullback(c), reference(W, x, c), strict=True):
        assert torch.allclose(got, expected, rtol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS)
def test_func_jvp(solver):
    W, x, c, t = problem()
    z, tangent = jvp(lambda x: solve(x, W, solver=solver), (x,), (t,))  # type: ignore[misc]
    assert torch.allclose((tangent * c).sum(), (t * reference(W, x, c)[0]).sum(), rtol=1e-8)
    assert torch.equal(z, solve(x, W, solver=solver))
    S = torch.randn_like(W)
    tangent = jvp(lambda W: solve(x, W, solver=solver), (W,), (S,))[1]
    assert torch.allclose((tangent * c).sum(), (S * reference(W, x, c)[1]).sum(), rtol=1e-8)


def test_forward_mode_and_reverse_mode_at_once():
    W, x, c, t = problem()
    expected = reference(W, x, c)
    W.requires_grad_()
    x.requires_grad_()
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(solve(forward_ad.make_dual(x, t), W))
        assert torch.allclose((tangent * c).sum(), (t * expected[0]).sum(), rtol=1e-8)
        assert forward_ad.unpack_dual(solve(x, W)).tangent is None
    for got, e in zip(torch.autograd.grad((primal * c).sum(), (x, W)), expected, strict=True):
        assert torch.allclose(got, e, rtol=1e-8)


def test_gradcheck_in_forward_mode():
    W, x, _, _ = problem()
    inputs = (x.requires_grad_(), W.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, W: solve(x, W), inputs, check_forward_ad=True, check_backward_ad=False)


def test_forward_mode_under_no_grad():
    W, x, c, t = problem()
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(solve(forward_ad.make_dual(x, t), W)).tangent
    assert torch.allclose((tangent * c).sum(), (t * reference(W, x, c)[0]).sum(), rtol=1e-8)


def test_dual_start_has_no_influence():
    W, x, _, t = problem()
    with forward_ad.dual_level():
        z0 = forward_ad.make_dual(torch.zeros_like(x), t)
        z = dq.fixed_point(lambda z: torch.tanh(z @ W + x), z0, rtol=1e-10).z
        assert forward_ad.unpack_dual(z).tangent is None


def test_trees_in_transforms():
    x, t = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)

    def run(x):
        def f(z):
            return {"a": 0.5 * z["a"].sin() + 0.2 * z["b"] + x, "b": 0.5 * z["b"]}

        return dq.fixed_point(f, {"a": torch.zeros_like(x), "b": torch.ones_like(x)}, rtol=1e-12).z["a"]

    expected = 1 / (1 - 0.5 * run(x).cos())
    assert torch.allclose(grad(lambda x: run(x).sum())(x), expected, rtol=1e-8)
    assert torch.allclose(jvp(run, (x,), (t,))[1], t * expected, rtol=1e-8)


@pytest.mark.parametrize("compact", [True, [True]])
def test_options_keep_working_inside(compact):
    W, x, c, _ = problem()
    seen = []

    def run(x):
        options = {"trace": True, "callback": lambda k, state: seen.append(k), "compact": compact}
        sol = dq.fixed_point(
            lambda z, x: torch.tanh(z @ W + x), torch.zeros(3, 5, dtype=F64), (x,), rtol=1e-10, **options
        )
        assert sol.trace.shape == (sol.nfe, 3) and seen[-1] == sol.nfe
        return (sol.z * c).sum()

    assert torch.allclose(grad(run)(x), reference(W, x, c)[0], rtol=1e-6)


@pytest.mark.parametrize("backward", [dq.Phantom(3), dq.OneStep(), dq.Unroll()], ids=str)
def test_other_gradients_inside_transforms(backward):
    W, x, c, t = problem()
    x.requires_grad_()
    expected = torch.autograd.grad((solve(x, W, backward=backward) * c).sum(), x)[0]
    x = x.detach()
    assert torch.allclose(grad(lambda x: (solve(x, W, backward=backward) * c).sum())(x), expected)
    tangent = jvp(lambda x: solve(x, W, backward=backward), (x,), (t,))[1]
    assert torch.allclose((tangent * c).sum(), (t * expected).sum())


def test_second_derivatives_by_func_work_unrolled():
    W, x, c, _ = problem()
    x = x[:1]

    def first(x, **options):
        return grad(lambda x: (solve(x, W, **options) * c[:1]).sum())(x)

    got = grad(lambda x: first(x, solver="picard", backward=dq.Unroll()).sin().sum())(x)
    x = x.clone().requires_grad_()
    g = torch.autograd.grad((solve(x, W) * c[:1]).sum(), x, create_graph=True)[0]
    assert torch.allclose(got, torch.autograd.grad(g.sin().sum(), x)[0], rtol=1e-6)


def test_no_gradient_asked_for_none_made():
    W, x, _, t = problem()
    assert not jvp(lambda x: solve(x, W, backward="none"), (x,), (t,))[1].any()


@pytest.mark.parametrize("backward", [dq.Implicit(), dq.Phantom(), dq.Unroll()], ids=str)
def test_vmap_raises(backward):
    W, x, _, _ = problem()
    mapped = torch.stack([x, x])
    with pytest.raises(NotImplementedError, match="put the mapped dimension into dim 0 of z0"):
        vmap(lambda x: solve(x, W, backward=backward))(mapped)
    with pytest.raises(NotImplementedError, match="vmap"):
        vmap(lambda z0: dq.fixed_point(torch.cos, z0, backward=backward).z)(mapped)


@pytest.mark.parametrize(
    "transform",
    [
        lambda run, x: jacrev(run)(x),
        lambda run, x: jacfwd(run)(x),
        lambda run, x: hessian(lambda x: run(x).sum())(x),
        lambda run, x: grad(lambda x: grad(lambda x: run(x).sum())(x).sum())(x),
        lambda run, x: jvp(grad(lambda x: run(x).sum()), (x,), (x,)),  # type: ignore[misc]
        lambda run, x: vmap(grad(lambda x: run(x).sum()))(x[None]),
        lambda run, x: torch.autograd.grad(
            run(x.requires_grad_()), x, torch.eye(15, dtype=F64).view(15, 3, 5), is_grads_batched=True
        ),
    ],
    ids=["jacrev", "jacfwd", "hessian", "grad of grad", "jvp of grad", "vmap of grad", "is_grads_batched"],
)
def test_what_needs_two_transforms_raises(transform):
    W, x, _, _ = problem()
    with pytest.raises(NotImplementedError, match=r"(through|over) a fixed point"):
        transform(lambda x: solve(x, W), x)


def test_differentiating_what_a_transform_returned_raises():
    W, x, _, t = problem()
    W.requires_grad_()
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        grad(lambda x: solve(x, W).sum())(x).sum().backward()
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        jvp(lambda x: solve(x, W), (x,), (t,))[1].sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        for differentiate in (
            lambda: torch.autograd.grad(solve(dual, W).sum(), W),
            lambda: torch.autograd.grad((solve(x, W) * dual).sum(), W),
            lambda: grad(lambda W: solve(dual, W).sum())(W),
        ):
            with pytest.raises(NotImplementedError, match="forward mode over reverse mode"):
                differentiate()
        assert torch.autograd.grad(solve(x, W).sum(), W)[0].any()


def test_tangent_that_does_not_converge_warns():
    W, x, _, t = problem()
    with pytest.warns(dq.GradientWarning, match="3 of 3 samples"):
        jvp(lambda x: solve(x, W, backward=dq.Implicit(solver="picard", max_iter=2)), (x,), (t,))
    with pytest.warns(dq.GradientWarning, match="3 of 3 samples"):
        grad(lambda x: solve(x, W, backward=dq.Implicit(solver="picard", max_iter=2)).sum())(x)


def test_transforms_and_plain_gradients_in_threads_do_not_meet():
    W, x, c, t = problem()
    expected = reference(W, x, c)[0]
    failures = []

    def work(i):
        for _ in range(5):
            if i % 3 == 0:
                ok = torch.allclose(grad(lambda x: (solve(x, W) * c).sum())(x), expected)
            elif i % 3 == 1:
                ok = torch.allclose((jvp(lambda x: solve(x, W), (x,), (t,))[1] * c).sum(), (t * expected).sum())
            else:
                ok = torch.allclose(reference(W, x, c)[0], expected)
            if not ok:
                failures.append(i)

    # torch allows one forward-mode level at a time in the whole process, so one thread only uses it.
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
