"""jaxopt's fixed-point iterations in torch: their documented arguments, states and rule, closed forms, gradients."""

import copy
import inspect
import math
import warnings
from typing import Any

import pytest
import torch

import deqfast as dq
from deqfast.compat import IgnoredOption, _names, jaxopt

N = 6
BOTH = [jaxopt.FixedPointIteration, jaxopt.AndersonAcceleration]


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr(_names, "_said", set())


def affine():
    A = 0.6 * torch.linalg.qr(torch.randn(N, N, dtype=torch.float64)).Q
    b = torch.randn(N, dtype=torch.float64)
    return lambda x, A, b: A @ x + b, A, b, torch.linalg.solve(torch.eye(N, dtype=torch.float64) - A, b)


@pytest.mark.parametrize("Solver", BOTH)
def test_run(Solver):
    f, A, b, solution = affine()
    seen: list[Any] = []

    def counted(x, A, b):
        seen.append(x.clone())
        return f(x, A, b)

    x0 = torch.zeros(N, dtype=torch.float64)
    with torch.no_grad():  # with gradients on, f is evaluated once more, to be differentiated
        params, state = Solver(counted, tol=1e-9).run(x0, A, b)
    assert torch.allclose(params, solution, atol=1e-8) and not params.requires_grad
    assert state.iter_num == state.num_fun_eval == len(seen) and state.aux is None
    errors = [float((f(x, A, b) - x).norm()) for x in seen]
    assert state.error == pytest.approx(errors[-1], rel=1e-5) and errors[-1] <= 1e-9 < min(errors[:-1])
    assert torch.equal(params, f(seen[-1], A, b))


@pytest.mark.parametrize("Solver", BOTH)
def test_pytrees_are_one_system(Solver):
    W = 0.4 * torch.randn(3, 3, dtype=torch.float64)

    def f(x, c):
        return {"a": torch.tanh(x["b"][0] @ W) + c, "b": (0.5 * x["a"] + 1, 0.3 * x["b"][1] + x["a"].mean() / 4)}

    x0 = {"a": torch.zeros(2, 3).double(), "b": (torch.zeros(2, 3).double(), torch.zeros(()).double())}
    solver = Solver(f, tol=1e-9)
    params, _ = solver.run(x0, 0.2)
    assert float(solver.l2_optimality_error(params, 0.2)) < 1e-8
    assert [t.shape for t in torch.utils._pytree.tree_leaves(params)] == [(2, 3), (2, 3), ()]


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("Solver", BOTH)
def test_gradients(Solver, implicit):
    f, A, b, _ = affine()
    A.requires_grad_()
    b.requires_grad_()
    solver = Solver(f, tol=1e-11, maxiter=200, implicit_diff=implicit)
    params, _ = solver.run(torch.zeros(N, dtype=torch.float64), A, b)
    got = torch.autograd.grad(params.square().sum(), (A, b))
    exact = torch.linalg.solve(torch.eye(N, dtype=torch.float64) - A, b)
    for g, e in zip(got, torch.autograd.grad(exact.square().sum(), (A, b)), strict=True):
        assert torch.allclose(g, e, atol=1e-6)


def test_aux_and_kwargs():
    f, A, b, solution = affine()

    def with_aux(x, A, *, shift):
        return f(x, A, shift), {"norm": x.norm()}

    x0 = torch.zeros(N, dtype=torch.float64)
    for Solver in BOTH:
        solver = Solver(with_aux, tol=1e-9, has_aux=True)
        params, state = solver.run(x0, A, shift=b)
        assert torch.allclose(params, solution, atol=1e-8)
        assert float(state.aux["norm"]) == pytest.approx(float(solution.norm()), rel=1e-6)
        _, state = solver.update(x0, solver.init_state(x0, A, shift=b), A, shift=b)
        assert float(state.aux["norm"]) == 0


@pytest.mark.parametrize("Solver", BOTH)
def test_updates_are_the_run(Solver):
    f, A, b, _ = affine()
    solver = Solver(f, tol=1e-9)
    params = x0 = torch.zeros(N, dtype=torch.float64)
    state = solver.init_state(x0, A, b)
    assert state.iter_num == 0 and state.error == math.inf
    while state.error > solver.tol:
        params, state = solver.update(params, state, A, b)
    whole, of_run = solver.run(x0, A, b)
    assert state.iter_num == state.num_fun_eval == of_run.iter_num
    assert torch.equal(params, whole) and state.error == pytest.approx(of_run.error, rel=1e-5)


def test_an_update_of_an_iteration_keeps_its_graph():
    f, A, b, _ = affine()
    b.requires_grad_()
    solver = jaxopt.FixedPointIteration(f)
    params: Any = torch.zeros(N, dtype=torch.float64)
    state = solver.init_state(params)
    for _ in range(3):
        params, state = solver.update(params, state, A, b)
    (grad,) = torch.autograd.grad(params.sum(), b)
    one = torch.ones(N, dtype=torch.float64)
    assert torch.allclose(grad, one + A.T @ one + A.T @ A.T @ one)


def test_params_of_ones_own_begin_a_new_history():
    f, A, b, _ = affine()
    solver = jaxopt.AndersonAcceleration(f)
    x0 = torch.zeros(N, dtype=torch.float64)
    params, state = solver.update(x0, solver.init_state(x0), A, b)
    for _ in range(3):
        params, state = solver.update(params, state, A, b)
    other = torch.ones(N, dtype=torch.float64)
    params, state = solver.update(other, state, A, b)
    assert torch.equal(params, f(other, A, b)) and state.iter_num == 5
    params, state = solver.update(params, state, A, b)
    assert state.iter_num == 6


def test_a_state_is_used_up_unless_it_is_copied():
    f, A, b, _ = affine()
    solver = jaxopt.AndersonAcceleration(f)
    x0 = torch.zeros(N, dtype=torch.float64)
    step = solver.update(x0, solver.init_state(x0), A, b)
    kept = copy.deepcopy((step.params, step.state))
    after = solver.update(*step, A, b)
    with pytest.raises(ValueError, match="uses its state up"):
        solver.update(*step, A, b)
    assert torch.equal(solver.update(*kept, A, b).params, after.params)


def test_mixing_frequency_history_and_beta_are_those_of_the_solver():
    f, A, b, solution = affine()
    x0 = torch.zeros(N, dtype=torch.float64)
    solver = jaxopt.AndersonAcceleration(f, history_size=6, mixing_frequency=2, beta=0.8, ridge=1e-7, tol=1e-9)
    params, state = solver.run(x0, A, b)
    same = dq.fixed_point(
        *(f, x0, (A, b)),
        solver=dq.Anderson(m=6, mix_every=2, mixing=0.8, ridge=1e-7),
        **{"rtol": 0.0, "atol": 1e-9, "batch_dims": 0},
    )
    assert state.iter_num == same.nfe and torch.allclose(params, solution, atol=1e-8)


@pytest.mark.parametrize("Solver", BOTH)
def test_a_run_that_does_not_converge_says_so(Solver):
    f, A, b, _ = affine()
    with pytest.warns(dq.ConvergenceWarning, match=f"{Solver.__name__}.run.. did not converge") as heard:
        _, state = Solver(f, maxiter=3, tol=1e-12).run(torch.zeros(N, dtype=torch.float64), A, b)
    assert heard[0].filename == __file__ and state.iter_num == 3 and state.error > 1e-12


def test_verbose_prints(capsys):
    f, A, b, _ = affine()
    x0 = torch.zeros(N, dtype=torch.float64)
    for Solver in BOTH:
        solver = Solver(f, verbose=True)
        _, state = solver.run(x0, A, b)
        assert len(capsys.readouterr().out.splitlines()) == state.iter_num
        solver.update(x0, solver.init_state(x0), A, b)
        assert "iteration 1, error" in capsys.readouterr().out


def test_signatures_are_jaxopts():
    def names(Solver):
        return [name for name in inspect.signature(Solver).parameters if name != "unknown"]

    common = ["has_aux", "verbose", "implicit_diff", "implicit_diff_solve", "jit", "unroll"]
    assert names(BOTH[0]) == ["fixed_point_fun", "maxiter", "tol", *common]
    own = ["fixed_point_fun", "history_size", "mixing_frequency", "beta", "maxiter", "tol", "ridge"]
    assert names(BOTH[1]) == [*own, *common]


@pytest.mark.parametrize(
    ("Solver", "arguments", "error", "message"),
    [
        (BOTH[0], {"max_iter": 3}, TypeError, "'max_iter'; did you mean 'maxiter'.*it takes fixed_point_fun"),
        (BOTH[0], {"history_size": 3}, TypeError, "unknown argument 'history_size'"),
        (BOTH[1], {"m": 3}, TypeError, "did you mean 'history_size'"),
        (BOTH[1], {"history_size": 1}, ValueError, "FixedPointIteration has no history"),
        (BOTH[1], {"tol": -1.0}, ValueError, "tol"),
        (BOTH[1], {"maxiter": 0}, ValueError, "maxiter"),
        (BOTH[0], {"has_aux": 1}, TypeError, "has_aux"),
    ],
)
def test_refusals(Solver, arguments, error, message):
    with pytest.raises(error, match=message):
        Solver(lambda x: x, **arguments)


def test_what_has_no_meaning_is_said_once():
    for Solver in BOTH:
        with pytest.warns(IgnoredOption, match=r"implicit_diff_solve=, jit=, unroll="):
            Solver(lambda x: x, implicit_diff_solve=print, jit=False, unroll=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Solver(lambda x: x, implicit_diff_solve=print, jit=False, unroll=False)
            Solver(lambda x: x, jit="auto", unroll=True)
