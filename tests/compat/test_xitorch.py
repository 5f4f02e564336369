"""xitorch's equilibrium and rootfinder: their documented arguments and rules, closed forms, and gradients."""

import inspect
import itertools
import warnings
from typing import Any

import pytest
import torch

import deqfast as dq
from deqfast.compat import IgnoredOption, _names, xitorch

N = 6
METHODS = ["broyden1", "broyden2", "linearmixing", "anderson_acc"]


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr(_names, "_said", set())


def documented(y, A):
    """The function of xitorch's own documentation."""
    return torch.tanh(A @ y + 0.1) + y / 2.0


def test_documented_examples():
    A = torch.tensor([[1.1, 0.4], [0.3, 0.8]], dtype=torch.float64).requires_grad_()
    y0 = torch.zeros(2, 1, dtype=torch.float64)
    root = xitorch.rootfinder(documented, y0, params=(A,))
    assert torch.allclose(root, torch.tensor([[-0.0459], [-0.0663]], dtype=torch.float64), atol=5e-5)
    fixed = xitorch.equilibrium(documented, y0, params=(A,))
    assert torch.allclose(fixed, torch.tensor([[0.2313], [-0.5957]], dtype=torch.float64), atol=5e-5)
    assert root.requires_grad and fixed.requires_grad


def affine(shape=(2, 3), complex_=False):
    dtype = torch.complex128 if complex_ else torch.float64
    A = 0.6 * torch.linalg.qr(torch.randn(N, N, dtype=dtype)).Q
    b = torch.randn(N, dtype=dtype)
    solution = torch.linalg.solve(torch.eye(N, dtype=dtype) - A, b).view(shape)
    return lambda y, A, b: (A @ y.flatten() + b).view(shape), A, b, solution, torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_equilibrium_of_every_method(method, complex_):
    f, A, b, solution, y0 = affine(complex_=complex_)
    y = xitorch.equilibrium(f, y0, (A, b), method=method, f_tol=1e-9)
    assert y.shape == y0.shape and y.dtype == y0.dtype and not y.requires_grad
    assert torch.allclose(y, solution, atol=1e-8)
    assert torch.linalg.vector_norm(f(y, A, b) - y) <= 1e-9


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", METHODS[:3])
def test_rootfinder_of_every_method(method, sign):
    f, A, b, solution, y0 = affine()
    y = xitorch.rootfinder(lambda y, A, b: sign * 3 * (f(y, A, b) - y), y0, (A, b), method=method, f_tol=1e-9)
    assert torch.allclose(y, solution, atol=1e-8)


@pytest.mark.parametrize("solve", ["equilibrium", "rootfinder"])
@pytest.mark.parametrize("method", METHODS[:3])
def test_gradients_of_params_to_second_order(solve, method):
    def f(y, A, b, power):
        return torch.tanh(A @ y) ** power + b

    def g(y, A, b, power):
        return 2 * (y - f(y, A, b, power))

    A = (0.5 * torch.randn(4, 4, dtype=torch.float64) / 2).requires_grad_()
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    fcn = f if solve == "equilibrium" else g
    tight = {"f_tol": 1e-11, "x_tol": 1e-9, "method": method}

    def solution(A, b):
        return getattr(xitorch, solve)(fcn, torch.zeros(4, dtype=torch.float64), (A, b, 1), **tight)

    assert torch.autograd.gradcheck(solution, (A, b), atol=1e-5)
    if method == "broyden1":
        assert torch.autograd.gradgradcheck(solution, (A, b), atol=1e-4)


def test_gradients_of_a_module_and_of_what_is_closed_over():
    cell = torch.nn.Linear(N, N).double()
    with torch.no_grad():
        cell.weight.mul_(0.5)
    x = torch.randn(N, dtype=torch.float64, requires_grad=True)
    y = xitorch.equilibrium(lambda y: torch.tanh(cell(y) + x), torch.zeros(N, dtype=torch.float64), f_tol=1e-11)
    y.sum().backward()
    got = {name: p.grad.clone() for name, p in cell.named_parameters()} | {"x": x.grad.clone()}
    cell.zero_grad()
    x.grad = None
    z = torch.zeros(N, dtype=torch.float64)
    for _ in range(200):
        z = torch.tanh(cell(z) + x)
    z.sum().backward()
    assert torch.allclose(y, z, atol=1e-9)
    for name, expected in {**{n: p.grad for n, p in cell.named_parameters()}, "x": x.grad}.items():
        assert torch.allclose(got[name], expected, atol=1e-7), name


def test_stops_on_all_four_tolerances():
    f, A, b, _, y0 = affine()
    seen: list[Any] = []

    def watched(y, A, b):
        seen.append(y.clone())
        return f(y, A, b)

    def ended(**options):
        seen.clear()
        with torch.no_grad():
            xitorch.equilibrium(watched, y0, (A, b), **options)
        points = seen[:-1] if torch.equal(seen[-1], seen[-2]) else list(seen)
        sizes = [float((f(y, A, b) - y).norm()) for y in points]
        steps = [float((y - before).norm()) for before, y in itertools.pairwise(points)]
        return points, sizes, steps

    points, sizes, steps = ended()
    assert sizes[-1] <= 1e-6 and steps[-1] <= 1e-6 and (sizes[-2] > 1e-6 or steps[-2] > 1e-6)
    _, sizes, _ = ended(f_tol=1.0, f_rtol=1e-3, x_tol=10.0)
    assert sizes[-1] <= 1e-3 * sizes[0] < sizes[-2]
    points, _, steps = ended(f_tol=1.0, x_tol=1.0, x_rtol=1e-5)
    assert steps[-1] <= 1e-5 * points[-1].norm() and steps[-2] > 1e-5 * points[-2].norm()


def test_no_convergence_is_a_warning_and_the_last_iterate():
    f, A, b, _, y0 = affine()
    with pytest.warns(dq.ConvergenceWarning, match="equilibrium.. did not converge") as heard:
        y = xitorch.equilibrium(f, y0, (A, b), maxiter=2)
    assert heard[0].filename == __file__ and torch.isfinite(y).all()
    with pytest.warns(dq.ConvergenceWarning, match="rootfinder"):
        xitorch.rootfinder(lambda y: y**2 + 1, torch.ones(2))


def test_signatures_are_xitorchs():
    for solve in (xitorch.equilibrium, xitorch.rootfinder):
        parameters = inspect.signature(solve).parameters
        assert list(parameters) == ["fcn", "y0", "params", "bck_options", "method", "fwd_options"]


def test_options_that_change_nothing_but_the_way():
    f, A, b, solution, y0 = affine()
    A.requires_grad_()
    for options in (
        {"alpha": 0.5, "max_rank": 5},
        {"method": "broyden2", "max_rank": 4, "line_search": False},
        {"method": "linearmixing", "alpha": 0.7},
        {"method": "anderson_acc", "msize": 3, "beta": 0.9, "lmbda": 1e-6, "feat_ndims": 2},
        {"bck_options": {"method": "gmres", "rtol": 1e-8, "max_niter": 50}},
    ):
        y = xitorch.equilibrium(f, y0, [A, b], **options)
        assert torch.allclose(y, solution, atol=1e-5)
        (grad,) = torch.autograd.grad(y.sum(), A)
        (expected,) = torch.autograd.grad(torch.linalg.solve(torch.eye(N) - A, b).sum(), A)
        assert torch.allclose(grad, expected, atol=1e-5)


def test_verbose_prints(capsys):
    f, A, b, _, y0 = affine()
    xitorch.equilibrium(f, y0, (A, b), verbose=True)
    assert "|f|=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_iter": 3}, TypeError, "unknown argument 'max_iter'; did you mean 'maxiter'.*it takes alpha"),
        ({"msize": 3}, TypeError, "unknown argument 'msize'"),
        ({"method": "newton"}, ValueError, "method must be one of 'broyden1'"),
        ({"f_tol": -1.0}, ValueError, "f_tol must not be negative"),
        ({"bck_options": {"rtool": 3}}, TypeError, "'rtool'; did you mean 'rtol'"),
        ({"bck_options": {"method": "guess"}}, ValueError, "method of bck_options"),
        ({"line_search": "steep"}, ValueError, "line_search"),
    ],
)
def test_refusals(arguments, error, message):
    f, A, b, _, y0 = affine()
    with pytest.raises(error, match=message):
        xitorch.equilibrium(f, y0, (A, b), **arguments)


def test_more_refusals():
    with pytest.raises(ValueError, match="method must be"):
        xitorch.rootfinder(lambda y: y, torch.ones(2), method="anderson_acc")
    with pytest.raises(ValueError, match="must be like y0"):
        xitorch.rootfinder(lambda y: y[:1], torch.ones(2))
    with pytest.raises(TypeError, match="y0 must be"):
        xitorch.rootfinder(lambda y: y, torch.ones(2, dtype=torch.int64))


def test_what_has_no_meaning_is_said_once():
    f, A, b, _, y0 = affine()
    for name, options in {
        "uv0=": {"uv0": "svd"},
        "feat_ndims=": {"method": "anderson_acc", "feat_ndims": 1},
        "posdef=": {"bck_options": {"posdef": True}},
        "line_search=": {"line_search": "wolfe"},
    }.items():
        with pytest.warns(IgnoredOption, match=name):
            xitorch.equilibrium(f, y0, (A, b), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            xitorch.equilibrium(f, y0, (A, b), **options)
