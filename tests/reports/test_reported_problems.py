"""Problems that users of fixed-point solvers have reported, each with its right value: which numbers come out.

A docstring says the kind of report, and names the thread where there is a public one.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from coupled import graph_network, page_rank, two_unknowns
from problems import ACCELERATED, ONE_OF_EACH, linear

import deqfast as dq

F64 = torch.float64


def relative(z, exact):
    """||z - exact|| / ||exact||, in float64 at least."""
    wide = torch.complex128 if torch.is_tensor(z) and z.is_complex() else F64
    z, exact = (torch.as_tensor(t).detach().to(wide) for t in (z, exact))
    return float((z - exact).norm() / exact.norm())


# ---- scales ----


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_rows_of_very_different_size_get_the_same_digits(solver):
    """A batch whose rows differ by 1e12 in magnitude: the small ones are not solved, or the large ones never stop."""
    f, exact = linear(5, 12, norm=0.8)
    scale = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6], dtype=F64)[:, None]
    sol = dq.fixed_point(lambda z: scale * f(z / scale), torch.zeros_like(exact), solver=solver, rtol=1e-10)
    assert sol.converged.all()
    for row, right in zip(sol.z, scale * exact, strict=True):
        assert relative(row, right) < 1e-9


def test_unknowns_of_very_different_size_are_right_in_the_norm_and_each_where_scaled():
    """One vector whose numbers lie between 1e-6 and 1e6 (pyscf/pyscf#1124: products of errors that range to 1e20)."""
    A = 0.3 * torch.tensor([[1, 0.5, 0.2], [0.1, 1, 0.5], [0.4, 0.3, 1]], dtype=F64)
    b, scale = torch.ones(3, dtype=F64), torch.tensor([1e-6, 1.0, 1e6], dtype=F64)
    exact = scale * torch.linalg.solve(torch.eye(3, dtype=F64) - A, b)

    def f(z):
        return scale * (A @ (z / scale) + b)

    sol = dq.fixed_point(f, torch.zeros(3, dtype=F64), batch_dims=0, rtol=1e-10)
    assert sol.converged and relative(sol.z, exact) < 1e-9
    scaled = dq.fixed_point(lambda w: f(scale * w) / scale, torch.zeros(3, dtype=F64), batch_dims=0, rtol=1e-10)
    assert scaled.converged and float((scale * scaled.z / exact - 1).abs().max()) < 1e-9


def test_leaves_of_very_different_size_are_each_right_where_scaled():
    """A state of several tensors, one of them a million times the other: it is solved as well as the norm asks."""
    exact = {"a": torch.tensor([[2e6]], dtype=F64), "b": torch.tensor([[1e-6 / 0.3]], dtype=F64)}
    zero = {name: torch.zeros(1, 1, dtype=F64) for name in exact}

    def f(z):
        return {"a": 0.5 * z["a"] + 1e6, "b": 0.7 * z["b"] + 1e-6}

    def scaled(w):
        out = f({"a": 1e6 * w["a"], "b": 1e-6 * w["b"]})
        return {"a": out["a"] / 1e6, "b": out["b"] / 1e-6}

    sol = dq.fixed_point(f, zero, rtol=1e-10)
    error = sum((sol.z[name] - exact[name]).square() for name in exact) ** 0.5
    assert sol.converged.all() and float(error) < 1e-9 * 2e6
    own = dq.fixed_point(scaled, zero, rtol=1e-10)
    assert relative(1e6 * own.z["a"], exact["a"]) < 1e-9 and relative(1e-6 * own.z["b"], exact["b"]) < 1e-9


# ---- few or degenerate columns of history ----


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_constant_map_needs_two_evaluations(solver):
    """A trivial problem, of which all differences vanish, breaks the small system (cvxgrp/scs#91)."""
    c = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    sol = dq.fixed_point(lambda z: c.clone(), torch.zeros(2, 2), solver=solver)
    assert torch.equal(sol.z, c)
    assert sol.nfe == 2 and sol.converged.all() and not sol.residual.any()


@pytest.mark.parametrize("solver", ACCELERATED)
def test_history_of_rank_one_does_not_break_the_small_system(solver):
    """A singular least-squares matrix (locuslab/deq#20: "U(7,7) is zero, singular U"; pyscf/pyscf#1000)."""
    u, v = torch.linspace(-1, 1, 20, dtype=F64), torch.linspace(0, 1, 20, dtype=F64)
    J = 0.9 * torch.outer(u, v) / float(v @ u)
    b = torch.cos(torch.arange(20, dtype=F64)).expand(3, 20)  # equal rows
    exact = np.linalg.solve(np.eye(20) - J.numpy(), b[0].numpy())
    sol = dq.fixed_point(lambda z: z @ J.T + b, torch.zeros(3, 20, dtype=F64), solver=solver, rtol=1e-11)
    assert sol.converged.all()
    assert all(relative(row, exact) < 1e-9 for row in sol.z)


@pytest.mark.parametrize("solver", ACCELERATED)
def test_going_on_at_the_floor_does_not_leave_the_solution(solver):
    """A saturated history makes noise of the weights, and the iterate drifts away from where it was."""
    f, exact = linear(3, 10, norm=0.7)
    sol = dq.fixed_point(f, torch.zeros_like(exact), solver=solver, rtol=0, max_iter=400, returns="last")
    assert relative(sol.z, exact) < 1e-12


def test_broyden_in_little_memory_is_as_right():
    """One vector an evaluation does not fit (locuslab/deq#28); a limited memory gives another answer, or none."""
    f, exact = linear(4, 60, norm=0.9)
    z0 = torch.zeros_like(exact)
    full = dq.fixed_point(f, z0, solver="broyden", rtol=1e-9, max_iter=1000)
    little = dq.fixed_point(f, z0, solver=dq.Broyden(memory=5), rtol=1e-9, max_iter=1000)
    for sol in (full, little):
        assert sol.converged.all() and relative(sol.z, exact) < 1e-7
    assert int(little.events["full_restarts"].min()) > 0 == int(full.events["full_restarts"].max())


# ---- samples ----


def test_one_slow_sample_costs_the_others_nothing():
    """One slow sample keeps the whole batch from stopping, and changes what the others return."""
    rate = torch.full((8, 1), 0.2, dtype=F64)
    rate[5] = 0.999
    sol = dq.fixed_point(lambda z: rate * z + 1, torch.zeros(8, 1, dtype=F64), solver="picard", max_iter=20000)
    assert sol.converged.all() and float((sol.z * (1 - rate) - 1).abs().max()) < 1e-4
    fast = [i for i in range(8) if i != 5]
    # f(z_k) - z_k = rate^k, f(z_k) = (1 - rate^(k+1)) / (1 - rate); the first k within tolerance is evaluation k + 1.
    steps = next(k + 1 for k in range(99) if 0.2**k <= 1e-8 * (1 - 0.2 ** (k + 1)) / 0.8)
    assert sol.steps[fast].tolist() == [steps] * 7 and int(sol.steps[5]) > 100 * steps


@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_sample_that_is_no_number_leaves_values_and_gradients_of_the_others(bad, solver):
    """One NaN in the batch makes everything NaN, or runs to the limit (patrick-kidger/optimistix#197)."""
    W = (0.3 * torch.randn(4, 4, dtype=F64)).requires_grad_()
    x = torch.randn(3, 4, dtype=F64)
    x[1, 2] = bad
    sol = dq.fixed_point(
        lambda z, x: z @ W + x, torch.zeros(3, 4, dtype=F64), (x,), solver=solver, rtol=1e-11, max_iter=500
    )
    assert sol.status.tolist() == [dq.Status.CONVERGED, dq.Status.NON_FINITE, dq.Status.CONVERGED]
    assert int(sol.steps[1]) == 1 and sol.z.isfinite().all()
    found = torch.autograd.grad(sol.z[sol.converged].square().sum(), W)[0]
    exact = x[[0, 2]] @ torch.linalg.inv(torch.eye(4, dtype=F64) - W)
    (right,) = torch.autograd.grad(exact.square().sum(), W)
    assert relative(sol.z[[0, 2]], exact) < 1e-9 and relative(found, right) < 1e-8


def test_map_that_is_no_number_from_the_start_gives_the_start_back():
    """No iterate has ever been the best, and the variable that holds it does not exist (locuslab/deq#26)."""
    z0 = torch.randn(2, 3)
    sol = dq.fixed_point(lambda z: z * torch.nan, z0)
    assert torch.equal(sol.z, z0) and sol.nfe == 1
    assert (sol.status == dq.Status.NON_FINITE).all() and not sol.converged.any()


def test_start_that_is_no_number_ends_at_once():
    """A start of infinity runs to the limit (patrick-kidger/optimistix#197)."""
    z0 = torch.tensor([[torch.inf], [1.0]], dtype=F64)
    sol = dq.fixed_point(lambda z: 0.5 * z + 1, z0)
    assert sol.status.tolist() == [dq.Status.NON_FINITE, dq.Status.CONVERGED]
    assert int(sol.steps[0]) == 1 and abs(float(sol.z[1]) - 2) < 1e-7


@pytest.mark.filterwarnings("ignore::deqfast.CouplingWarning")  # it may say that they are
@pytest.mark.parametrize("options", [{}, {"batch_dims": 0}, {"stop": "all"}], ids=str)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_coupled_rows_are_not_called_converged_one_by_one(solver, options):
    """The first unknown is at rest while the second still moves, and is frozen at 0. Right is [1.8, 2]."""
    sol = dq.fixed_point(two_unknowns, torch.zeros(2, dtype=F64), solver=solver, **options)
    assert sol.converged.all()
    assert relative(sol.z, torch.tensor([1.8, 2.0], dtype=F64)) < 1e-6


def settled(f, z):
    """The fixed point of a contraction by plain iteration, until nothing moves any more."""
    for _ in range(5000):
        z, before = f(z), z
        if float((z - before).abs().max()) < 1e-14:
            return z
    raise AssertionError


def test_nodes_of_one_graph_are_one_problem():
    """An implicit graph network of 1000 nodes: nodes are no samples, and those far from the input start at rest."""
    f, z0 = graph_network(1000, F64)
    sol = dq.fixed_point(f, z0, batch_dims=0, rtol=1e-9)
    assert sol.converged and relative(sol.z, settled(f, z0)) < 2e-8
    assert sol.converged.shape == sol.steps.shape == ()


def test_graphs_of_a_batch_are_problems_of_their_own():
    """Several graphs, one after the other as PyTorch Geometric has them: one that is done does not stop the rest."""
    (f, a), (g, b) = graph_network(40, F64), graph_network(90, F64)

    def both(z):
        return torch.cat([0.1 * f(z[:40]), g(z[40:])])

    batch = torch.tensor([0] * 40 + [1] * 90)
    sol = dq.fixed_point(both, torch.cat([a, b]), segments=batch, rtol=1e-10)
    right = settled(both, torch.cat([a, b]))
    assert sol.converged.tolist() == [True, True] and int(sol.steps[0]) < int(sol.steps[1])
    assert relative(sol.z[:40], right[:40]) < 1e-9 and relative(sol.z[40:], right[40:]) < 1e-8


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_personalised_page_rank_is_the_solution_of_its_linear_system(solver):
    """Ranks stop before they have converged, since each moves by less than the tolerance (networkx/networkx#3276)."""
    f, start, exact = page_rank(60)
    sol = dq.fixed_point(f, start, batch_dims=0, solver=solver, rtol=1e-11, max_iter=500)
    assert sol.converged and relative(sol.z, exact) < 1e-9
    assert abs(float(sol.z.sum()) - 1) < 1e-9


def test_page_rank_of_a_long_chain_does_not_stop_at_its_first_iteration():
    """A tolerance for the sum over all pages is met by anything once there are enough (networkx/networkx#8651)."""
    pages = 20000
    v = torch.zeros(pages, dtype=F64)
    v[0] = 1
    # Page i links to page i + 1, the last one to the first.
    exact = 0.15 * 0.85 ** np.arange(pages) / (1 - 0.85**pages)
    sol = dq.fixed_point(lambda r: 0.85 * r.roll(1) + 0.15 * v, v, batch_dims=0, rtol=1e-9, max_iter=1000)
    assert sol.converged and relative(sol.z, exact) < 1e-8


def test_every_token_stops_by_itself_and_padding_at_once():
    """Token states (B, T, d): padded or easy tokens wait for the hardest one, or end its iteration."""
    rate = torch.tensor([[0.1, 0.9, 0.5], [0.95, 0.2, 0.0]], dtype=F64)[..., None]
    x = torch.randn(2, 3, 5, dtype=F64)
    x[1, 2] = 0  # padding: f = 0
    sol = dq.fixed_point(
        lambda z: rate * z.roll(1, -1) + x, torch.zeros_like(x), batch_dims=2, solver="picard", rtol=1e-9, max_iter=999
    )
    roll = torch.eye(5, dtype=F64).roll(1, 0)
    exact = torch.linalg.solve(torch.eye(5, dtype=F64) - rate[..., None] * roll, x[..., None])[..., 0]
    assert sol.converged.shape == (2, 3) and sol.converged.all()
    assert float((sol.z - exact).norm(dim=-1).max()) < 1e-6
    assert int(sol.steps[1, 2]) == 1 and int(sol.steps[1, 0]) == int(sol.steps.max()) > 5 * int(sol.steps[0, 0])


# ---- roots, and the examples of others ----


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("solver", ACCELERATED)
def test_root_is_found_for_both_signs_of_its_function(solver, sign):
    """A first step of the wrong sign: z - c is solved and c - z is not, or the other way (locuslab/mdeq#5)."""
    c = torch.randn(4, 6, dtype=F64, requires_grad=True)
    sol = dq.root(lambda z, c: sign * (z - c), torch.zeros(4, 6, dtype=F64), (c,), solver=solver)
    assert sol.converged.all() and relative(sol.z, c) < 1e-7
    (g,) = torch.autograd.grad(sol.z.sum(), c)
    assert float((g - 1).abs().max()) < 1e-6


def scipy_first(x):
    return -torch.tensor([3, 2, 1.5, 1, 0.5], dtype=F64) * x - 0.01 * (x @ x) * x


def scipy_second(x):
    A = torch.tensor([[-2, 1, 0], [1, -2, 1], [0, 1, -2]], dtype=F64)
    return A @ x - torch.tensor([1, 2, 3], dtype=F64)


def scipy_third(x):
    J = torch.tensor([[-4.256, 14.7], [0.8394989, 0.59964207]], dtype=F64)
    v = torch.stack([(x[0] + 3) * (x[1] ** 5 - 7) + 18, torch.sin(x[1] * torch.exp(x[0]) - 1)])
    return -torch.linalg.solve(J, v)


def scipy_documented(x):
    d = 0.5 * (x[0] - x[1]) ** 3
    return torch.stack([x[0] + d - 1, x[1] - d])


def permuted(x):
    r0, r1, r2 = x[0] - x[1] - 1, x[2] + x[3], x[0] - x[1] - x[3]
    return torch.stack([r2, x[4] + x[5], r0, r1, x[2] + x[4], x[1]])


ROOTS = {
    "identity": (lambda x: x, [1.0, 2, 3, 4, 5, 6], [0.0] * 6),
    "F": (scipy_first, [1.0] * 5, [0.0] * 5),
    "F3": (scipy_second, [1.0, 2, 3], [-2.5, -4, -3.5]),
    "F6": (scipy_third, [-0.5, 1.4], [0.0, 1.0]),
    "documented": (scipy_documented, [0.0, 0.0], None),
    "permuted": (permuted, [0.0] * 6, [1.0, 0, -1, 1, 1, -1]),
}


@pytest.mark.parametrize("name", ROOTS)
@pytest.mark.parametrize("solver", ACCELERATED)
def test_nonlinear_examples_of_scipy_are_solved(solver, name):
    """The examples of scipy.optimize's nonlinear solvers, and xitorch/xitorch#13: equations in another order fail."""
    g, start, right = ROOTS[name]
    if right is None:
        right = scipy.optimize.root(lambda x: g(torch.tensor(x)).numpy(), start, tol=1e-13).x
    sol = dq.root(g, torch.tensor(start, dtype=F64), batch_dims=0, solver=solver, rtol=1e-10, atol=1e-10, max_iter=300)
    assert sol.converged, sol.summary()
    assert np.abs(sol.z.numpy() - np.asarray(right)).max() < 1e-7


@pytest.mark.parametrize("solver", ACCELERATED)
def test_square_roots_from_where_the_jacobian_vanishes(solver):
    """x^2 - 1 from 0, where the derivative is 0 (google/jaxopt#290), and (x - 1)^2 - 1 from 1 (scipy/scipy#7332)."""
    for shift in (0.0, 1.0):
        z0 = torch.full((5,), shift, dtype=F64)
        sol = dq.root(lambda x, s=shift: (x - s) ** 2 - 1, z0, solver=solver, rtol=1e-9)
        assert sol.converged.all()
        assert float(((sol.z - shift).abs() - 1).abs().max()) < 1e-7


@pytest.mark.parametrize("solver", [dq.Anderson(), dq.Broyden(scale="first_step")], ids=lambda s: type(s).__name__)
def test_large_root_and_its_adjoint_are_those_of_a_banded_solve(solver):
    """A large nonlinear root is found while its linear adjoint fails (JuliaNLSolvers/NLsolve.jl#273)."""
    N = 5000
    p = torch.randn(N, dtype=F64, requires_grad=True)

    def negative(x, p):
        return (
            p - 10 * x + torch.nn.functional.pad(x[1:], (0, 1)) + torch.nn.functional.pad(x[:-1], (1, 0)) - 0.1 * x**2
        )

    z0 = torch.zeros(N, dtype=F64)
    sol = dq.root(negative, z0, (p,), batch_dims=0, solver=solver, rtol=1e-10, max_iter=300)
    (g,) = torch.autograd.grad(sol.z.sum(), p)
    x, q = np.zeros(N), p.detach().numpy()
    for _ in range(20):  # Newton
        bands = np.stack([-np.ones(N), 10 + 0.2 * x, -np.ones(N)])
        value = 10 * x - np.pad(x[1:], (0, 1)) - np.pad(x[:-1], (1, 0)) + 0.1 * x**2 - q
        x = x - scipy.linalg.solve_banded((1, 1), bands, value)
    bands[1] = 10 + 0.2 * x
    assert sol.converged and sol.backward.converged
    assert relative(sol.z, x) < 1e-9 and relative(g, scipy.linalg.solve_banded((1, 1), bands, np.ones(N))) < 1e-8


@pytest.mark.parametrize(
    "solver",
    [
        dq.Anderson(),
        pytest.param(
            dq.Anderson(type=2),
            marks=pytest.mark.xfail(strict=True, reason="restarts for growth for ever; the textbook's takes 12"),
        ),
        dq.Broyden(),
    ],
    ids=["anderson", "anderson-2", "broyden"],
)
def test_well_conditioned_equations_of_an_expanding_map_are_solved(solver):
    """Anderson acceleration is unstable (cvxgrp/scs#129): the adjoint of NLsolve.jl#273, with 10 unknowns.

    Eigenvalues of the map lie between -11 and -7, and of its equations between 8 and 12: condition 1.5. As many columns
    as unknowns are there, so that least squares have the answer after 11 evaluations.
    """
    A = (
        10 * torch.eye(10, dtype=F64)
        - torch.diag(torch.ones(9, dtype=F64), 1)
        - torch.diag(torch.ones(9, dtype=F64), -1)
    )
    b = torch.arange(10, dtype=F64)
    sol = dq.fixed_point(lambda z: z - (A @ z - b), torch.zeros(10, dtype=F64), batch_dims=0, solver=solver, rtol=1e-10)
    assert sol.converged, sol.summary()
    assert relative(sol.z, np.linalg.solve(A.numpy(), b.numpy())) < 1e-9


def lasso(samples=24):
    """Proximal gradient steps for |A z - b|^2 / 2 + lam |z|_1, and a duality gap, which bounds the excess of a z."""
    A, b, lam = torch.randn(samples, 10, 20, dtype=F64), torch.randn(samples, 10, dtype=F64), 0.5
    L = torch.linalg.matrix_norm(A, 2)[:, None] ** 2

    def rest(z):
        return b - torch.einsum("bij,bj->bi", A, z)

    def pull(z):
        return torch.einsum("bij,bi->bj", A, rest(z))

    def f(z):
        z = z + pull(z) / L
        return z.sign() * (z.abs() - lam / L).clamp(min=0)

    def gap(z):
        feasible = rest(z) * (lam / pull(z).abs().amax(1)).clamp(max=1)[:, None]
        primal = 0.5 * rest(z).square().sum(1) + lam * z.abs().sum(1)
        return primal - 0.5 * (b.square().sum(1) - (b - feasible).square().sum(1))

    return f, torch.zeros(samples, 20, dtype=F64), gap


SPLITTING = [
    pytest.param("anderson", marks=pytest.mark.xfail(strict=True, reason="most stall: limits.md says so")),
    pytest.param("broyden", marks=pytest.mark.xfail(strict=True, reason="some stall: limits.md says so")),
]


@pytest.mark.parametrize("solver", [*SPLITTING, dq.Anderson(type=2)], ids=["anderson", "broyden", "anderson-2"])
def test_lasso_by_proximal_gradient_steps_is_solved(solver):
    """Anderson acceleration of a splitting method is unstable (cvxgrp/scs#129, cvxpy/cvxpy#876)."""
    f, z0, gap = lasso()
    sol = dq.fixed_point(f, z0, solver=solver, rtol=1e-8, max_iter=2000)
    assert sol.converged.all(), sol.summary()
    assert float(gap(sol.z).max()) < 1e-5


@pytest.mark.parametrize(
    "solver", ["anderson", "broyden", dq.Anderson(type=2)], ids=["anderson", "broyden", "anderson-2"]
)
def test_what_is_called_converged_of_a_lasso_is_optimal(solver):
    """A solution that acceleration has left far behind is called accurate (cvxpy/cvxpy#876)."""
    f, z0, gap = lasso()
    sol = dq.fixed_point(f, z0, solver=solver, rtol=1e-8, max_iter=2000)
    assert float(gap(sol.z)[sol.converged].max()) < 1e-5


def test_lasso_by_plain_steps_is_solved():
    """The same problems do converge plainly: f never expands a distance."""
    f, z0, gap = lasso(6)
    sol = dq.fixed_point(f, z0, solver="picard", rtol=1e-8, max_iter=20000)
    assert sol.converged.all() and float(gap(sol.z).max()) < 1e-5


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_transport_plan_of_sinkhorn_has_the_marginals(solver):
    """Sinkhorn's potentials are free up to a constant, so that the Jacobian has an eigenvalue 1 (ott-jax/ott#15)."""
    C, eps, N = torch.rand(30, 30, dtype=F64), 0.05, 30

    def other(u):
        return -eps * torch.logsumexp((u[:, None] - C) / eps, 0) - eps * np.log(N)

    def f(u):
        return -eps * torch.logsumexp((other(u)[None] - C) / eps, 1) - eps * np.log(N)

    sol = dq.fixed_point(f, torch.zeros(N, dtype=F64), batch_dims=0, solver=solver, rtol=1e-11, max_iter=500)
    plan = torch.exp((sol.z[:, None] + other(sol.z)[None] - C) / eps)
    assert sol.converged
    assert float((plan.sum(0) * N - 1).abs().max()) < 1e-8 and float((plan.sum(1) * N - 1).abs().max()) < 1e-8


@pytest.mark.parametrize("solver", ACCELERATED)
def test_value_of_a_decision_process_is_that_of_its_best_policy(solver):
    """Value iteration with a discount of .99: kinks where policies change, and thousands of plain steps."""
    P, R = torch.rand(4, 30, 30, dtype=F64) ** 8, torch.rand(4, 30, dtype=F64)
    P /= P.sum(-1, keepdim=True)

    def f(v):
        return (R + 0.99 * P @ v).max(0).values

    sol = dq.fixed_point(f, torch.zeros(30, dtype=F64), batch_dims=0, solver=solver, rtol=1e-12, max_iter=5000)
    policy, states = (R + 0.99 * P @ sol.z).argmax(0), torch.arange(30)
    chain, reward = P[policy, states], R[policy, states]
    value = torch.linalg.solve(torch.eye(30, dtype=F64) - 0.99 * chain, reward)
    assert sol.converged and relative(sol.z, value) < 1e-9
    assert relative(f(value), value) < 1e-12  # no policy is better


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_square_roots_of_all_sizes_by_babylonian_steps(solver):
    """A solution of another magnitude than the start: 1e-6 to 1e12 from 1."""
    a = torch.tensor([[1e-12], [2.0], [1e12], [1e24]], dtype=F64)
    sol = dq.fixed_point(lambda z: 0.5 * (z + a / z), torch.ones(4, 1, dtype=F64), solver=solver, rtol=1e-13)
    assert sol.converged.all() and float((sol.z / a.sqrt() - 1).abs().max()) < 1e-11


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_the_number_that_is_its_own_cosine(solver):
    """A state of one number without dims, cos z = z (patrick-kidger/optimistix#217)."""
    sol = dq.fixed_point(torch.cos, torch.tensor(1.0, dtype=F64), batch_dims=0, solver=solver, rtol=1e-12)
    assert sol.z.shape == () and sol.converged
    assert abs(float(sol.z) - 0.7390851332151607) < 1e-11


def test_self_consistent_field_by_the_commutator_of_fock_and_density():
    """DIIS on FD - DF is what SCF codes iterate, not on the change of F (pyscf/pyscf#1000, pyscf/pyscf#1524)."""
    N, electrons, U = 8, 3, 1.5
    H = torch.diag(torch.linspace(-0.5, 0.5, N, dtype=F64))
    H += -torch.diag(torch.ones(N - 1, dtype=F64), 1) - torch.diag(torch.ones(N - 1, dtype=F64), -1)

    def density(F):
        C = torch.linalg.eigh(F).eigenvectors[:, :electrons]
        return C @ C.T

    def fock(D):
        return H + U * torch.diag(D.diagonal())

    state = dq.Anderson(m=6, type=2).init(H, batch_dims=0, rtol=1e-11, max_iter=100)
    while not state.done:
        D = density(state.z)
        F = fock(D)
        state.step(F, residual=F @ D - D @ F)
    F = H.numpy()
    for _ in range(3000):  # damped plain iteration, in NumPy
        C = np.linalg.eigh(F)[1][:, :electrons]
        F = 0.8 * F + 0.2 * (H.numpy() + U * np.diag(np.diag(C @ C.T)))
    D = density(state.z)
    assert state.status == dq.Status.CONVERGED and float((fock(D) @ D - D @ fock(D)).norm()) < 1e-9
    assert float((fock(D) - torch.tensor(F)).abs().max()) < 1e-9


def test_input_and_equilibrium_are_found_in_one_joint_solve():
    """An input whose equilibrium fits data, by a solve within every step of a descent: |2 x - 3|^2 is least at 1.5."""
    z0 = torch.zeros(2, 1, dtype=F64)
    sol = dq.joint_solve(
        lambda z, x: 0.5 * z + x,
        lambda z, x: 0.5 * (z - torch.tensor([[3.0], [-1.0]], dtype=F64)).square().sum(1),
        z0, z0.clone(), step_size=0.25, rtol=1e-9, max_iter=500, backward="none",
    )  # fmt: skip
    assert sol.converged.all()
    assert relative(sol.x, torch.tensor([[1.5], [-0.5]], dtype=F64)) < 1e-7
