"""scipy.optimize's quasi-Newton solvers: beside the real ones, and against closed forms."""

import inspect
import itertools
import re
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch

from deqfast.compat import IgnoredOption, _names
from deqfast.compat import scipy as ours

N = 20
rng = np.random.default_rng(0)
A = rng.standard_normal((N, N))
SPD = A @ A.T / N + np.eye(N)
b = rng.standard_normal(N)
W = rng.standard_normal((N, N)) / np.sqrt(N)


def bratu(x):
    padded = np.concatenate([[0], x, [0]])
    return padded[2:] - 2 * padded[1:-1] + padded[:-2] + 1.5 / (N + 1) ** 2 * np.exp(x)


def broyden_tridiagonal(x):
    padded = np.concatenate([[0], x, [0]])
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def chandrasekhar(x):
    mu = (np.arange(N) + 0.5) / N
    return x - 1 / (1 - 0.45 / N * (mu[:, None] / (mu[:, None] + mu)) @ x)


PROBLEMS: dict[str, tuple[Any, Any]] = {
    "SciPy's example": (
        lambda x: [x[0] + 0.5 * (x[0] - x[1]) ** 3 - 1.0, 0.5 * (x[1] - x[0]) ** 3 + x[1]],
        [0, 0],
    ),
    "negative definite": (lambda x: b - SPD @ x, np.zeros(N)),
    "positive definite": (lambda x: SPD @ x - b, np.zeros(N)),
    "large": (lambda x: 1e3 * (b - SPD @ x), np.zeros(N)),
    "indefinite": (lambda x: np.array([-3, 2, -1, 0.5, 4]) * (x - np.arange(5)) + 0.1 * np.sin(x), np.zeros(5)),
    "tanh": (lambda x: np.tanh(0.9 * W @ x + b) - x, np.zeros(N)),
    "matrix": (lambda x: b.reshape(4, 5) - x - 0.3 * np.tanh(x) @ W[:5, :5], np.zeros((4, 5))),
    "bratu": (bratu, np.zeros(N)),
    "tridiagonal": (broyden_tridiagonal, -np.ones(N)),
    "chandrasekhar": (chandrasekhar, np.zeros(N)),
    "number": (lambda x: 2 - x - x**3, 0.5),
}


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr(_names, "_said", set())


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", ["anderson", "broyden1"])
def test_the_root_that_scipy_finds(method, problem):
    F, x0 = PROBLEMS[problem]
    x = getattr(ours, method)(F, x0, f_tol=1e-10)
    assert isinstance(x, np.ndarray) and x.shape == np.shape(x0) and x.dtype == np.float64
    assert np.abs(F(x)).max() <= 1e-10
    theirs = scipy.optimize.root(lambda v: np.ravel(F(v.reshape(np.shape(x0)))), np.ravel(x0), tol=1e-12)
    assert np.allclose(np.ravel(x), theirs.x, atol=1e-8)


@pytest.mark.parametrize("method", ["anderson", "broyden1"])
def test_fewer_evaluations_than_scipy_over_the_suite(method):
    def evaluations(root):
        return sum(root(F, x0, method=method).nfev for F, x0 in PROBLEMS.values())

    assert evaluations(ours.root) < 0.7 * evaluations(scipy.optimize.root)


def indefinite(n, seed):
    own = np.random.default_rng(seed)
    Q = np.linalg.qr(own.standard_normal((n, n))).Q
    M = Q * (own.choice([-1, 1], n) * own.uniform(0.3, 3, n)) @ Q.T
    c = own.standard_normal(n)
    return lambda x: M @ x + 0.2 * np.sin(x) - c


@pytest.mark.parametrize("method", ["anderson", "broyden1"])
def test_indefinite_systems_are_solved_as_often_as_by_scipy(method):
    systems = [indefinite(n, n) for n in range(3, 23, 2)]

    def solved(root):
        found = [root(F, np.zeros(3 + 2 * i), method=method, options={"maxiter": 300}) for i, F in enumerate(systems)]
        return sum(bool(sol.success) for sol in found), sum(sol.nfev for sol in found)

    ours_solved, ours_evaluations = solved(ours.root)
    theirs_solved, theirs_evaluations = solved(scipy.optimize.root)
    assert ours_solved >= theirs_solved and ours_evaluations < theirs_evaluations


@pytest.mark.parametrize("method", ["anderson", "broyden1"])
def test_signatures_are_scipys(method):
    def names(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    theirs = names(getattr(scipy.optimize, method))
    assert names(getattr(ours, method)) == theirs
    ours_root = [name for name, _ in names(ours.root)]
    assert ours_root == [name for name, _ in names(scipy.optimize.root)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tensor_for_a_tensor(dtype):
    M, c = torch.tensor(SPD, dtype=dtype), torch.tensor(b, dtype=dtype)
    seen = []

    def F(x):
        seen.append(x)
        return c - M @ x

    x = ours.anderson(F, torch.zeros(N, dtype=dtype), f_tol=1e-4)
    assert isinstance(x, torch.Tensor) and x.dtype == dtype and not x.requires_grad
    assert torch.allclose(x, torch.linalg.solve(M, c), atol=1e-3)
    assert len({t.data_ptr() for t in seen}) == len(seen)  # F may keep what it was given
    assert all(float((c - M @ t).abs().max()) > 1e-4 for t in seen[:-1])


def test_what_f_keeps_and_uses_again_does_not_matter():
    plain, buffer = [], np.empty(N)

    def F(x):
        plain.append(x)
        return np.tanh(0.9 * W @ x + b) - x

    def again(x):
        np.subtract(np.tanh(0.9 * W @ x + b), x, out=buffer)
        return buffer

    first = ours.root(F, np.zeros(N))
    assert np.array_equal(first.x, ours.root(again, np.zeros(N)).x)
    assert np.array_equal(plain[-1], first.x) and not np.array_equal(plain[-2], plain[-3])


def test_complex_systems():
    M, c = SPD + 1j * W / 4, b + 1j * b[::-1]
    x = ours.anderson(lambda x: c - M @ x, np.zeros(N, dtype=complex), f_tol=1e-10)
    assert np.allclose(x, np.linalg.solve(M, c), atol=1e-8)
    assert np.allclose(ours.anderson(lambda x: x + 1j, b), -1j)  # x takes the type of F(x)
    assert ours.anderson(lambda x: b - SPD @ x, np.zeros(N, dtype=np.float32)).dtype == np.float64


def test_f_of_other_types_is_converted():
    assert np.allclose(ours.anderson(lambda x: (2 - x).astype(np.float32), np.zeros(3)), 2)
    assert ours.anderson(lambda x: np.zeros(3, dtype=int), np.ones(3)).tolist() == [1, 1, 1]
    readonly = np.broadcast_to(np.float64(1.0), (3,))
    assert np.allclose(ours.anderson(lambda x: readonly - x.sum(), np.zeros(3)), 1 / 3)
    calls: list[Any] = []
    with pytest.raises(TypeError, match="dtype of x"):
        ours.anderson(lambda x: calls.append(x) or (x + 1 if len(calls) < 3 else x + 1j), np.ones(3))


def test_tolerances_are_scipys():
    F, x0 = PROBLEMS["tanh"]
    F0 = np.abs(F(x0)).max()
    default = ours.root(F, x0)
    assert np.abs(default.fun).max() <= np.finfo(float).eps ** (1 / 3) < 6.1e-6
    loose = ours.root(F, x0, options={"fatol": np.inf, "ftol": 1e-2})
    assert np.abs(loose.fun).max() <= 1e-2 * F0 and loose.nfev < default.nfev
    norm = ours.root(F, x0, options={"fatol": 1e-8, "tol_norm": np.linalg.norm})
    assert np.linalg.norm(norm.fun) <= 1e-8
    path: list[Any] = []
    ours.root(F, x0, tol=1e-9, callback=lambda x, f: path.append(x))
    steps = [np.abs(path[-k] - path[-k - 1]).max() / np.abs(path[-k]).max() for k in (1, 2)]
    assert steps[0] <= 1e-9 < steps[1]
    path.clear()
    ours.anderson(F, x0, x_tol=1e-7, f_tol=np.inf, callback=lambda x, f: path.append(x))
    assert np.abs(path[-1] - path[-2]).max() <= 1e-7 < np.abs(path[-2] - path[-3]).max()
    at_root = ours.root(F, default.x, tol=None)
    assert at_root.success and at_root.nit == 0 and at_root.nfev == 1


def test_result_of_root():
    _, x0 = PROBLEMS["tanh"]
    calls, seen = [], []

    def counted(x, scale, shift):
        calls.append(x)
        return scale * (np.tanh(0.9 * W @ x + b) - x) + shift

    sol = ours.root(counted, x0, args=(2.0, 0.0), callback=lambda x, f: seen.append((x, f)))
    theirs = scipy.optimize.root(counted, x0, args=(2.0, 0.0), method="anderson")
    assert sol.success is True and sol.status == theirs.status == 1 and sol["method"] == "anderson"
    assert set(theirs) <= set(sol) and sol.nfev < theirs.nfev
    assert np.array_equal(sol.fun, counted(sol.x, 2.0, 0.0)) and sol.nfev == len(calls) - 1 - theirs.nfev
    assert len(seen) == sol.nit and np.array_equal(seen[-1][0], sol.x) and np.array_equal(seen[-1][1], sol.fun)
    assert all(np.array_equal(counted(x, 2.0, 0.0), f) for x, f in seen)
    with pytest.raises(AttributeError):
        _ = sol.nothing
    sol.own = 3  # type: ignore[attr-defined]
    assert sol["own"] == 3 and "own" in dir(sol)
    assert ours.root(lambda x, a: a - x, 0.0, args=2.0).x == pytest.approx(2)


def test_no_convergence_carries_the_last_iterate():
    F, x0 = PROBLEMS["bratu"]
    seen = []
    with pytest.raises(ours.NoConvergence) as caught:
        ours.anderson(F, x0, maxiter=4, f_tol=1e-13, callback=lambda x, f: seen.append(x))
    assert len(seen) == 4 and np.array_equal(caught.value.args[0], seen[-1])
    failed = ours.root(F, x0, options={"maxiter": 4, "fatol": 1e-13})
    assert not failed.success and failed.status == 2 and "after the iterations" in failed.message
    with pytest.raises(ours.NoConvergence):
        ours.broyden1(lambda x: x**2 + 1, np.ones(3), maxiter=300)
    with pytest.raises(ours.NoConvergence), np.errstate(all="ignore"):
        ours.anderson(lambda x: np.full_like(x, np.nan), np.ones(3))


def test_what_cannot_get_better_is_given_up():
    for F, x0 in (
        (lambda x: np.sign(x) + 2, np.zeros(50)),
        (lambda x: x - x + 1.0, np.full(50, 1e20)),  # no step changes x
        (lambda x: np.where(np.arange(50) < 2, 1e-3 + x**2, -x), np.ones(50)),
    ):
        sol = ours.root(F, x0, options={"fatol": 1e-6})
        assert not sol.success and sol.nfev < 2500
        sol = ours.root(lambda x, F=F: np.stack([F(row) for row in x]), np.stack([x0, x0]), batched=True)
        assert not sol.success and sol.nfev < 2500


def test_iter_makes_so_many_iterations():
    F, x0 = PROBLEMS["tanh"]
    seen = []
    x = ours.anderson(F, x0, iter=3, callback=lambda x, f: seen.append(x))
    assert len(seen) == 3 and np.array_equal(x, seen[-1])


def test_alpha_is_the_first_step():
    F, x0 = PROBLEMS["tanh"]
    seen = []
    for method in (ours.anderson, ours.broyden1):
        method(F, x0 + 1, alpha=0.25, callback=lambda x, f: seen.append(x))
        assert np.allclose(seen[0], x0 + 1 + 0.25 * F(x0 + 1))
        seen.clear()
    damped: list[Any] = []
    ours.anderson(F, x0, alpha=0.5, M=0, callback=lambda x, f: damped.append(x))
    for before, after in itertools.pairwise(damped[:6]):
        assert np.allclose(after, before + 0.5 * F(before))


def test_a_step_into_nowhere_is_shortened():
    def F(x):
        with np.errstate(all="ignore"):
            return 1 - np.log(x)

    assert np.allclose(ours.anderson(F, np.full(4, 0.05)), np.e, atol=1e-4)
    assert np.allclose(ours.broyden1(F, np.full(4, 0.05)), np.e, atol=1e-4)


def test_verbose_prints_every_iteration(capsys):
    F, x0 = PROBLEMS["tanh"]
    nit = ours.root(F, x0, options={"disp": True}).nit
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == nit and all(re.match(r"\d+:  \|F\(x\)\| = [\d.e-]+", line) for line in lines)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ours.anderson(bratu, b, tol=1),
            TypeError,
            "unknown argument 'tol'; did you mean 'f_tol'.*it takes iter",
        ),
        (lambda: ours.anderson(bratu, b, max_rank=1), TypeError, "unknown argument 'max_rank'"),
        (lambda: ours.broyden1(bratu, b, M=1), TypeError, "unknown argument 'M'"),
        (lambda: ours.root(bratu, b, options={"maxitr": 1}), TypeError, "'maxitr'; did you mean 'maxiter'"),
        (lambda: ours.root(bratu, b, options={"jac_options": {"m": 1}}), TypeError, "'m'; did you mean 'M'"),
        (lambda: ours.root(bratu, b, method="hybr"), ValueError, "method must be 'anderson' or 'broyden1'"),
        (lambda: ours.anderson(bratu, b, f_tol=-1.0), ValueError, "f_tol must not be negative"),
        (lambda: ours.anderson(bratu, b, line_search="newton"), ValueError, "line_search must be"),
        (lambda: ours.anderson(bratu, b, alpha=0), ValueError, "alpha must be finite and not 0"),
        (lambda: ours.anderson(lambda x: x[:2], b), ValueError, "F.x. must have the shape of x"),
        (lambda: ours.anderson(lambda x: torch.zeros(N), b), TypeError, "an array for an array"),
        (lambda: ours.anderson(lambda x: x.numpy(), torch.zeros(2)), TypeError, "a tensor for a tensor"),
        (lambda: ours.anderson(lambda x: x, 1.0, batched=True), ValueError, "single number"),
        (lambda: ours.anderson(bratu, b, M=-1), ValueError, "M must be at least 0"),
        (lambda: ours.anderson(lambda x: x, np.zeros((2, 0))), ValueError, "x must hold numbers"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_has_no_meaning_is_said_once():
    F, x0 = PROBLEMS["tanh"]
    calls = {
        "line_search=": lambda: ours.anderson(F, x0, line_search="wolfe"),
        "reduction_method=": lambda: ours.broyden1(F, x0, reduction_method=("svd", 3), max_rank=8),
        "jac=": lambda: ours.root(F, x0, jac=lambda x: x),
    }
    for name, call in calls.items():
        with pytest.warns(IgnoredOption, match=name):
            call()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
