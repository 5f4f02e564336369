"""The solvers of locuslab's repositories: their arguments and results, as documented there, restated here."""

import inspect
import itertools
import warnings
from typing import Any

import pytest
import torch

import deqfast as dq
from deqfast.compat import IgnoredOption, _names, locuslab

B, D, L = 4, 3, 5


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr(_names, "_said", set())


def affine(*shape, radius=0.7, dtype=torch.float64):
    """f, its fixed point in closed form, and zeros to start from; f works on any shape with rows of that size."""
    n = torch.Size(shape[1:]).numel()
    W = radius * torch.linalg.qr(torch.randn(n, n, dtype=dtype)).Q
    x = torch.randn(shape[0], n, dtype=dtype)
    solution = torch.linalg.solve(torch.eye(n, dtype=dtype) - W.T, x.T).T.reshape(shape)
    return lambda z: (z.flatten(1) @ W + x).view(shape), solution, torch.zeros(shape, dtype=dtype)


def with_log(f):
    return lambda z: (f(z), {"norm": float(z.norm())})


DICT = ["result", "lowest", "nstep", "prot_break", "abs_trace", "rel_trace", "eps", "threshold"]
ROOT_DICT = [
    *("result", "nstep", "tnstep", "lowest_step", "diff", "diff_detail", "prot_break", "trace", "new_trace"),
    *("eps", "threshold"),
]
ROWS = torch.tensor([True, False, True, True])
BUFFERS = {"X": torch.zeros(1), "F": torch.zeros(1), "H": torch.zeros(1), "y": torch.zeros(1)}
# One call a line, as public code makes it: the solver, the shape of x0, what f is, arguments, what is said once.
CALLS: dict[str, tuple[Any, ...]] = {
    "deq": (locuslab.anderson, (B, D, L), None, {"m": 6, "lam": 1e-4, "threshold": 50, "eps": 1e-8}, ()),
    "deq abs, named": (
        *(locuslab.anderson, (B, D, L), None),
        *({"threshold": 60, "eps": 1e-8, "stop_mode": "abs", "name": "forward"}, ()),
    ),
    "deq broyden": (
        *(locuslab.broyden, (B, D, L), None),
        *({"threshold": 60, "eps": 1e-8, "stop_mode": "rel", "name": "forward"}, ()),
    ),
    "deq broyden, line search": (
        *(locuslab.broyden, (B, D, L), None, {"threshold": 60, "eps": 1e-8, "stop_mode": "abs", "ls": True}, ("ls",)),
    ),
    "mdeq": (locuslab.mdeq_broyden, (B, D, L), "root", {"threshold": 60, "eps": 1e-8}, ()),
    "tutorial": (
        locuslab.tutorial_anderson,
        (B, D, L, 2),
        None,
        {"m": 5, "lam": 1e-4, "max_iter": 50, "tol": 1e-8},
        (),
    ),
    "tutorial, 3 dims": (locuslab.tutorial_anderson, (B, D, L), None, {"tol": 1e-8}, ()),
    "tutorial, 2 dims": (locuslab.tutorial_anderson, (B, D), None, {"m": 3, "tol": 1e-8, "beta": 0.9}, ()),
    "extrapolated": (locuslab.tutorial_anderson, (B, D * L), None, {"tol": 1e-8, "beta": 1.3, "max_iter": 80}, ()),
    "mask": (locuslab.anderson, (B, D, L), None, {"mask": ROWS, "eps": 1e-8}, ()),
    "mask, tutorial": (locuslab.tutorial_anderson, (B, D, L), None, {"mask": ROWS, "tol": 1e-8}, ()),
    "buffers, log": (locuslab.tutorial_anderson, (B, D, L), "log", {"tol": 1e-8, "lam": 1e-3, **BUFFERS}, "XFHy"),
    "sampling": (
        locuslab.tutorial_anderson,
        (B, D),
        None,
        {"tol": 1e-8, "sampling": [3], "logger": print},
        ("sampling",),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_public_signature_finds_the_fixed_point(call):
    solver, shape, form, arguments, said = CALLS[call]
    f, solution, x0 = affine(*shape)
    given = {"root": lambda z: f(z) - z, "log": with_log(f), None: f}[form]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        out = solver(given, x0, **arguments)
        solver(given, x0, **arguments)  # what has been said is not said again
    assert all(w.category is IgnoredOption and w.filename == __file__ for w in heard)
    for name in said:
        assert sum(f"{name}=" in str(w.message) for w in heard) == 1
    assert bool(heard) == bool(said)
    z = out[0] if isinstance(out, tuple) else out["result"]
    rows = arguments.get("mask", torch.ones(B, dtype=torch.bool))
    assert torch.allclose(z[rows], solution[rows], atol=1e-6)
    assert torch.equal(z[~rows], x0[~rows])
    assert z.shape == x0.shape and not z.requires_grad
    if isinstance(out, dict):
        assert list(out) == (ROOT_DICT if form == "root" else DICT)


def test_arguments_are_those_of_the_peers():
    assert str(inspect.signature(locuslab.anderson)).startswith(
        "(f: 'Callable[..., Any]', x0: 'Tensor', m: 'int' = 6, lam"
    )
    names = {
        locuslab.anderson: ["f", "x0", "m", "lam", "threshold", "eps", "stop_mode", "beta"],
        locuslab.broyden: ["f", "x0", "threshold", "eps", "stop_mode", "ls", "name"],
        locuslab.mdeq_broyden: ["g", "x0", "threshold", "eps", "ls", "name"],
        locuslab.tutorial_anderson: ["f", "x0", "m", "lam", "max_iter", "tol", "beta"],
        locuslab.jac_loss_estimate: ["f0", "z0", "vecs", "create_graph"],
        locuslab.power_method: ["f0", "z0", "n_iters"],
    }
    for function, expected in names.items():
        assert [name for name in inspect.signature(function).parameters if name != "kwargs"] == expected


@pytest.mark.parametrize("mode", ["abs", "rel"])
def test_anderson_dict(mode):
    f, _, x0 = affine(B, D, L)
    evaluated = []

    def counted(z):
        evaluated.append(z.clone())
        return f(z)

    out = locuslab.anderson(counted, x0, eps=1e-6, stop_mode=mode, threshold=40)
    for key, kind in {"lowest": float, "nstep": int, "prot_break": bool, "abs_trace": list, "rel_trace": list}.items():
        assert type(out[key]) is kind
    trace, made = out[f"{mode}_trace"], len(evaluated)
    assert len(out["abs_trace"]) == len(out["rel_trace"]) == 38
    assert out["nstep"] == made - 1 and out["eps"] == 1e-6 and out["threshold"] == 40
    for z, found in zip(evaluated[2:], out["abs_trace"], strict=False):
        assert found == pytest.approx(float((f(z) - z).norm()), rel=1e-6)
    for z, found in zip(evaluated[2:], out["rel_trace"], strict=False):
        assert found == pytest.approx(float((f(z) - z).norm() / (f(z).norm() + 1e-5)), rel=1e-6)
    assert trace[made - 3] < 1e-6 <= min(trace[: made - 3]) and set(trace[made - 3 :]) == {out["lowest"]}
    assert torch.equal(out["result"], evaluated[-1])


def test_broyden_dict():
    f, _, x0 = affine(B, D, L)
    evaluated = []

    def counted(z):
        evaluated.append(z.clone())
        return f(z)

    out = locuslab.broyden(counted, x0, 60, 1e-6)
    assert len(out["abs_trace"]) == len(out["rel_trace"]) == 61
    assert out["nstep"] == len(evaluated) - 1
    for z, found in zip(evaluated[1:], out["abs_trace"], strict=False):
        assert found == pytest.approx(float((f(z) - z).norm()), rel=1e-6)
    assert torch.equal(out["result"], evaluated[-1]) and out["lowest"] < 1e-6


def test_mdeq_dict():
    f, _, x0 = affine(B, D, L)
    evaluated = []

    def g(z):
        evaluated.append(z.clone())
        return f(z) - z

    out = locuslab.mdeq_broyden(g, x0 + 1, 60, 1e-6, ls=False, name="forward")
    assert out["nstep"] == out["tnstep"] == out["lowest_step"] == len(evaluated) - 1
    assert out["trace"] == [pytest.approx(float((f(z) - z).norm()), rel=1e-6) for z in evaluated]
    steps = [float((b - a).norm() / a.norm()) for a, b in itertools.pairwise(evaluated)]
    assert out["new_trace"] == [-1, *(pytest.approx(s, rel=1e-6) for s in steps)]
    z = out["result"]
    assert torch.allclose(out["diff_detail"], (f(z) - z).norm(dim=1), atol=1e-9)
    assert out["diff"] == pytest.approx(float((f(z) - z).norm()), rel=1e-6)


def test_tutorial_returns_the_iterate_evaluated_last_and_all_its_residuals():
    f, _, x0 = affine(B, D, L, 2)
    evaluated = []

    def counted(z):
        evaluated.append(z.clone())
        return f(z)

    z, res = locuslab.tutorial_anderson(counted, x0, tol=1e-6)
    assert torch.equal(z, evaluated[-1]) and len(res) == len(evaluated) - 2
    assert res[-1] < 1e-6 <= min(res[:-1])


def test_the_lowest_is_returned_though_later_ones_are_worse():
    f, _, x0 = affine(B, D, L)
    calls = []

    def worse(z):
        calls.append(z.clone())
        return f(z) if len(calls) < 8 else f(z) + len(calls)

    with pytest.warns(dq.ConvergenceWarning):
        out = locuslab.anderson(worse, x0, threshold=12, eps=1e-12)
    assert out["nstep"] == 6 and torch.equal(out["result"], calls[6])
    assert out["lowest"] == min(out["rel_trace"])


@pytest.mark.parametrize("solver", [locuslab.anderson, locuslab.broyden])
def test_samples_stop_together_at_the_norm_of_all(solver):
    f, solution, x0 = affine(B, D, L)
    x0[0] = solution[0]  # at its solution from the start
    out = solver(f, x0, threshold=50, eps=1e-9, stop_mode="abs")
    assert (f(out["result"]) - out["result"]).norm() < 1e-9


def test_not_finite_samples_leave_the_norms():
    f, solution, x0 = affine(B, D, L)

    def broken(z):
        out = f(z).clone()
        out[1] = float("nan")
        return out

    out = locuslab.anderson(broken, x0, eps=1e-8)
    rest = [0, 2, 3]
    assert torch.allclose(out["result"][rest], solution[rest], atol=1e-6)
    assert torch.isfinite(out["result"]).all()


def test_running_away_is_a_protective_break():
    x0, calls = torch.ones(2, 3, 1), []

    def grows(z):
        calls.append(z)
        return z + 100.0 ** len(calls)

    with pytest.warns(dq.ConvergenceWarning, match="ran away"):
        out = locuslab.broyden(grows, x0, 50, 1e-6, stop_mode="abs")
    assert out["prot_break"] and torch.isfinite(out["result"]).all()


def test_what_did_not_converge_says_so():
    f, _, x0 = affine(B, D, L, radius=0.99)
    for solver, arguments in (
        (locuslab.anderson, {"threshold": 4, "eps": 1e-9}),
        (locuslab.broyden, {"threshold": 4, "eps": 1e-9}),
        (locuslab.mdeq_broyden, {"threshold": 4, "eps": 1e-9}),
        (locuslab.tutorial_anderson, {"max_iter": 4, "tol": 1e-9}),
    ):
        with pytest.warns(dq.ConvergenceWarning, match=f"{solver.__name__}.* did not converge"):
            solver(f, x0, **arguments)
    locuslab.tutorial_anderson(f, x0, max_iter=4, tol=0)  # as many evaluations as asked for


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_iter": 3}, TypeError, "unknown argument 'max_iter'; did you mean 'threshold'"),
        ({"tol": 3}, TypeError, "did you mean 'eps'"),
        ({"betta": 3}, TypeError, "did you mean 'beta'"),
        ({"nonsense": 3}, TypeError, "it takes f, x0, m, lam, threshold"),
        ({"stop_mode": "worst"}, ValueError, "stop_mode must be"),
        ({"beta": 0.0}, ValueError, "beta must be positive"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"threshold": 0}, ValueError, "threshold"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask must be bool"),
    ],
)
def test_refusals(arguments, error, message):
    f, _, x0 = affine(B, D, L)
    with pytest.raises(error, match=message):
        locuslab.anderson(f, x0, **arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_halves_do_not_overflow(dtype):
    x = torch.full((B, 4, 2000), 300.0, dtype=dtype)
    out = locuslab.anderson(lambda z: 0.5 * z + x, torch.zeros_like(x), eps=0.02)
    assert out["lowest"] < 0.02 and torch.allclose(out["result"].float(), 2 * x.float(), rtol=0.05)


def test_memory_format_autocast_and_inference_mode():
    x0 = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(3, 3, 3, padding=1)
    with torch.no_grad():
        conv.weight.mul_(0.3)
    z, _ = locuslab.tutorial_anderson(lambda z: torch.tanh(conv(z)) + 1, x0, tol=1e-4)
    assert z.is_contiguous(memory_format=torch.channels_last) and not z.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = locuslab.tutorial_anderson(lambda z: torch.tanh(conv(z)) + 1, x0, tol=2e-2)
    assert half.dtype == torch.float32 and torch.allclose(half, z, atol=0.1)
    with torch.inference_mode():
        assert torch.allclose(
            locuslab.anderson(lambda z: torch.tanh(conv(z)) + 1, x0, eps=1e-4)["result"], z, atol=1e-3
        )


def test_f_that_writes_into_what_it_is_given_or_uses_its_output_again():
    f, solution, x0 = affine(B, D, L)
    buffer = torch.empty_like(x0)

    def again(z):
        return buffer.copy_(f(z))

    def writes(z):
        return z.copy_(f(z))

    expected = locuslab.anderson(f, x0, eps=1e-9)
    assert torch.equal(locuslab.anderson(again, x0, eps=1e-9)["result"], expected["result"])
    out = locuslab.anderson(lambda z: writes(z.clone()), x0, eps=1e-9)
    assert torch.allclose(out["result"], solution, atol=1e-6)


@pytest.mark.parametrize("solver", [locuslab.broyden, locuslab.mdeq_broyden])
def test_masked_rows_of_broyden_stay_and_count_in_no_norm(solver):
    f, solution, x0 = affine(B, D, L)
    x0[1] = 1e3  # far from its solution, if it counted
    given = f if solver is locuslab.broyden else lambda z: f(z) - z
    out = solver(given, x0, 50, 1e-8, mask=ROWS)
    assert torch.equal(out["result"][1], x0[1])
    assert torch.allclose(out["result"][ROWS], solution[ROWS], atol=1e-6)
    if "diff_detail" in out:
        assert out["diff"] < 1e-8 and torch.equal(out["diff_detail"][1], torch.zeros(L, dtype=x0.dtype))


def test_no_row_to_solve_for():
    f, _, x0 = affine(B, D, L)
    out = locuslab.anderson(f, x0 + 2, mask=torch.zeros(B, dtype=torch.bool))
    assert torch.equal(out["result"], x0 + 2) and out["lowest"] == 0


def test_what_f_must_return():
    with pytest.raises(ValueError, match="must have the shape of x0"):
        locuslab.anderson(lambda z: z[:1], torch.zeros(2, 3))
    with pytest.raises(TypeError, match="x0 must be a tensor"):
        locuslab.tutorial_anderson(lambda z: z, [1.0])
