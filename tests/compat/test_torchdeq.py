"""torchdeq's solvers by name: against torchdeq where it is right, and the right value where it is not."""

import warnings

import pytest
import torch

from deqfast.compat import IgnoredOption, _names
from deqfast.compat import torchdeq as ours
from deqfast.compat.torchdeq import _faithful as faithful
from deqfast.compat.torchdeq import _loop

theirs = pytest.importorskip("torchdeq")
from torchdeq.solver import get_solver  # noqa: E402

NAMES = ("anderson", "broyden", "fixed_point_iter")
SOLVERS = {
    "anderson": ours.anderson_solver,
    "broyden": ours.broyden_solver,
    "fixed_point_iter": ours.fixed_point_iter,
    "simple_fixed_point_iter": ours.simple_fixed_point_iter,
}
FAITHFUL = {name: getattr(faithful, SOLVERS[name].__name__) for name in NAMES}
KEYS = {"abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep", "sradius"}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(_names, "_said", set())


def problem(B=6, N=16, rho=0.8, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    W = rho * torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64)).Q.to(dtype)
    x = torch.randn(B, N, generator=generator, dtype=torch.float64).to(dtype)

    def f(z, tau=1.0):
        return tau * scale * torch.tanh(z / scale @ W + x) + (1 - tau) * z

    return f, torch.zeros(B, N, dtype=dtype)


class Counted:
    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, *z, **kwargs):
        self.calls += 1
        return self.f(*z, **kwargs)


def same_kind(a, b):
    assert set(a) == set(b) == KEYS
    for key in KEYS:
        assert a[key].shape == b[key].shape, key
        assert a[key].dtype == b[key].dtype, key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", ["abs", "rel"])
@pytest.mark.parametrize("name", NAMES)
def test_result_has_the_shapes_and_values_of_torchdeq(name, mode, dtype):
    f, z0 = problem(dtype=dtype)
    tol = 1e-5
    z, states, info = SOLVERS[name](f, z0, max_iter=60, tol=tol, stop_mode=mode)
    expected, none, info_expected = get_solver(name)(f, z0, max_iter=60, tol=tol, stop_mode=mode, lam=1e-8)
    same_kind(info, info_expected)
    assert states == none == []
    assert (z - expected).abs().max() < 30 * tol
    assert info[f"{mode}_lowest"].max() < tol
    assert (info["nstep"] <= info_expected["nstep"] + 2).all()
    for way in ("abs", "rel"):
        trace = info[f"{way}_trace"]
        assert (trace[:, 0] == 1e8).all()
        assert torch.equal(trace[:, -1], info[f"{way}_lowest"])  # filled up after the stop


@pytest.mark.parametrize("name", ["broyden", "fixed_point_iter"])
def test_where_the_method_is_the_same_every_number_is(name):
    f, z0 = problem()
    for options in ({"max_iter": 15, "tol": 0.0}, {"tol": 1e-4}, {"tol": 1e-4, "stop_mode": "rel", "max_iter": 7}):
        z, _, info = SOLVERS[name](f, z0, **options)
        expected, _, info_expected = get_solver(name)(f, z0, **options)
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)
        for key in KEYS:
            torch.testing.assert_close(info[key], info_expected[key], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"m": 3, "lam": 1e-2}, {"tau": 0.7}, {"tau": 1.3, "stop_mode": "rel"}])
def test_faithful_anderson_keeps_the_recurrence(options):
    f, z0 = problem(rho=0.95)
    z, states, info = faithful.anderson_solver(f, z0, max_iter=22, tol=0.0, indexing=[5, 9, 20], **options)
    expected, s, info_expected = get_solver("anderson")(f, z0, max_iter=22, tol=0.0, indexing=[5, 9, 20], **options)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-9)
    for a, b in zip(states, s, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    for key in KEYS:
        torch.testing.assert_close(info[key], info_expected[key], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("thres", [None, 6])
def test_faithful_broyden_and_plain_iteration_keep_the_recurrence(thres):
    f, z0 = problem(rho=0.95)
    for name, options in (("broyden", {"LBFGS_thres": thres}), ("fixed_point_iter", {"tau": 0.6})):
        z, _, info = FAITHFUL[name](f, z0, max_iter=20, tol=0.0, **options)
        expected, _, info_expected = get_solver(name)(f, z0, max_iter=20, tol=0.0, **options)
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
        if name == "broyden":
            torch.testing.assert_close(info["abs_trace"], info_expected["abs_trace"], rtol=1e-5, atol=1e-8)


def test_simple_iteration_is_theirs_to_the_bit():
    f, z0 = problem()
    z, states, info = SOLVERS["simple_fixed_point_iter"](f, z0, max_iter=9, tau=0.5, indexing=[2, 9])
    expected, s, info_expected = get_solver("simple_fixed_point_iter")(f, z0, max_iter=9, tau=0.5, indexing=[2, 9])
    torch.testing.assert_close(z, expected, rtol=1e-14, atol=1e-15)
    assert [(a - b).abs().max() < 1e-14 for a, b in zip(states, s, strict=True)] == [True, True]
    same_kind(info, info_expected)
    torch.testing.assert_close(info["abs_trace"], info_expected["abs_trace"])


@pytest.mark.parametrize("solvers", [SOLVERS, FAITHFUL], ids=["fast", "faithful"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_returned_and_how_it_is_counted(name, solvers):
    f, z0 = problem(rho=0.9)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(z):
        seen.append((z.clone(), f(z)))
        return seen[-1][1]

    z, _, info = solvers[name](record, z0, max_iter=8, tol=1e-12)
    assert len(seen) == 8 + (name == "broyden")
    moved = torch.stack([(b - a).norm(dim=1) for a, b in seen])
    best = moved.argmin(0)
    kept = torch.stack([pair[name != "broyden"] for pair in seen])
    torch.testing.assert_close(z, kept[best, torch.arange(6)], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(info["abs_lowest"], moved.min(0).values)
    assert torch.equal(info["nstep"], (best + (name != "broyden")).float())
    z, _, info = solvers[name](f, z0, max_iter=8, tol=1e9, return_final=True)
    torch.testing.assert_close(z, kept[-1], rtol=1e-12, atol=1e-13)
    assert (info["nstep"] == 8).all()
    torch.testing.assert_close(info["abs_lowest"], moved[-1])


@pytest.mark.parametrize("solvers", [SOLVERS, FAITHFUL], ids=["fast", "faithful"])
@pytest.mark.parametrize("name", NAMES)
def test_states_at_indices_are_the_best_so_far_and_all_there(name, solvers):
    f, z0 = problem()
    indices = [3, 7, 30, 100]
    z, states, _ = solvers[name](f, z0, max_iter=60, tol=1e-5, indexing=indices, stop_mode="rel")
    assert len(states) == 4
    for index, state in zip(indices, states, strict=True):
        short, _, _ = solvers[name](f, z0, max_iter=min(60, index - (name == "broyden")), tol=1e-5, stop_mode="rel")
        torch.testing.assert_close(state, short, rtol=0, atol=1e-12)
    assert torch.equal(states[-1], z)
    assert states[-1] is not z and states[-1].data_ptr() != states[-2].data_ptr()
    # torchdeq's where it has one
    _, s, _ = get_solver("fixed_point_iter")(f, z0, max_iter=60, tol=1e-5, indexing=[3, 7], stop_mode="rel")
    if name == "fixed_point_iter":
        torch.testing.assert_close(states[:2], s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_no_evaluation_and_few(name):
    f, z0 = problem()
    counted = Counted(f)
    z, states, info = SOLVERS[name](counted, z0, max_iter=0, indexing=[4])
    assert counted.calls == 0 and torch.equal(z, z0) and len(states) == 1
    if "simple" not in name:
        assert info["abs_trace"].shape == (6, 1) and (info["abs_trace"] == 1e8).all() and (info["nstep"] == 0).all()
    for limit in (1, 2, 3, 4.0):
        counted = Counted(f)
        z, _, info = SOLVERS[name](counted, z0, max_iter=limit, tol=0.0)
        assert counted.calls == limit + (name == "broyden")
        assert info["nstep"].dtype == torch.float32
        assert (z - f(z)).norm() < (z0 - f(z0)).norm()
        if "simple" not in name:
            length = {"anderson": max(1, limit - 1)}.get(name, limit + 1)
            assert info["rel_trace"].shape == (6, length)


@pytest.mark.parametrize("solvers", [SOLVERS, FAITHFUL], ids=["fast", "faithful"])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_vectors_and_lists(name, solvers):
    z, _, info = solvers[name](torch.cos, torch.tensor(0.0), tol=1e-5)
    assert z.shape == () and abs(float(z) - 0.739085) < 1e-4 and info["abs_lowest"].shape == (1,)
    z, _, info = solvers[name](torch.cos, torch.tensor([0.0, 1.0, 2.0]), tol=1e-5)
    assert z.shape == (3,) and (z - 0.739085).abs().max() < 1e-4 and info["nstep"].shape == (3,)

    def f(z):
        a, b = z
        return torch.cos(b).mean(-1)[:, None, None].expand_as(a) * 0.5, 0.1 * torch.sin(a).sum((1, 2))[
            :, None
        ] + 0.1 * b

    start = [torch.zeros(4, 2, 3), torch.ones(4, 5)]
    z, states, info = solvers[name](lambda z: tuple(f(z)), start, tol=1e-5, max_iter=80, indexing=[2])
    assert isinstance(z, list) and isinstance(states[0], list)
    assert max((a - b).abs().max() for a, b in zip(z, f(z), strict=True)) < 1e-4
    assert info["abs_trace"].shape[0] == 4


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples(name):
    solver = SOLVERS[name]
    z, _, _ = solver(lambda z: 0.5 * (z + 2 / z), torch.tensor(1.0))
    assert abs(float(z) - 2**0.5) < 1e-3
    z, _, _ = solver(torch.cos, torch.tensor(0.0))
    assert float((z - torch.cos(z)).norm(p=1)) < 1e-3
    z, _, _ = ours.simple_fixed_point_iter(torch.cos, torch.tensor(0.0))  # torchdeq's own cannot: cos takes no tau
    assert float((z - torch.cos(z)).norm(p=1)) < 1e-3


def test_all_stop_with_the_worst_sample():
    rates = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)[:, None]
    counted = Counted(lambda z: rates * z + 1)
    _, _, info = ours.fixed_point_iter(counted, torch.zeros(3, 4, dtype=torch.float64), max_iter=500, tol=1e-6)
    _, _, expected = get_solver("fixed_point_iter")(counted.f, torch.zeros(3, 4, dtype=torch.float64), 500, 1e-6)
    assert counted.calls == info["nstep"].max() == expected["nstep"].max()
    assert info["abs_lowest"][0] < 1e-12


def test_scale_does_not_matter():  # torchdeq: 18, 40 and more than 400 evaluations
    found = []
    for scale in (1e3, 1.0, 1e-3):
        f, z0 = problem(rho=0.97, dtype=torch.float32, scale=scale)
        found.append(ours.anderson_solver(f, z0, max_iter=400, tol=1e-4, stop_mode="rel")[2]["nstep"].max())
    assert max(found) - min(found) <= 3 and max(found) < 60


@pytest.mark.parametrize(
    ("solvers", "host"),
    [(SOLVERS, True), (FAITHFUL, True), (SOLVERS, False)],
    ids=["fast", "faithful", "loop of other devices"],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_that_is_not_a_number_keeps_its_best_and_holds_up_nobody(monkeypatch, name, solvers, host):
    monkeypatch.setattr(_loop, "on_host", lambda layout: host)
    f, z0 = problem()
    calls = []

    def broken(z):
        calls.append(1)
        fz = f(z)
        if len(calls) > 4:
            fz[2] = float("nan")
        return fz

    z, _, info = solvers[name](broken, z0, max_iter=200, tol=1e-6)
    expected, _, _ = solvers[name](f, z0, max_iter=200, tol=1e-6)
    assert torch.isfinite(z).all() and torch.isfinite(info["abs_lowest"]).all()
    assert len(calls) < 100
    keep = [0, 1, 3, 4, 5]
    assert (z - expected)[keep].abs().max() < 1e-5
    assert info["abs_lowest"][2] == info["abs_trace"][2].nan_to_num(1e9).min() or info["nstep"][2] <= 4


def test_limited_memory_broyden_converges():  # torchdeq's ends in NaN
    f, z0 = problem(N=48, rho=0.95)
    W = f(torch.zeros(1, 48, dtype=torch.float64))  # of the linear map below
    Q = 0.95 * torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    _, _, info = ours.broyden_solver(lambda z: z @ Q + W[:1], z0, max_iter=400, tol=1e-6, LBFGS_thres=6)
    assert info["abs_lowest"].max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_solved(dtype):
    f, z0 = problem(dtype=dtype)
    for name in NAMES:
        z, _, info = SOLVERS[name](f, z0, tol=5e-2, stop_mode="rel")
        assert z.dtype == dtype and info["rel_lowest"].max() < 5e-2 and info["rel_lowest"].dtype == torch.float32


def test_damped_residual_is_that_of_f():
    f, z0 = problem()
    for solvers in (SOLVERS, FAITHFUL):
        seen: list[torch.Tensor] = []

        def record(z, seen=seen):
            seen.append(z.clone())
            return f(z)

        _, _, info = solvers["fixed_point_iter"](record, z0, max_iter=5, tau=0.3)
        torch.testing.assert_close(info["abs_trace"][:, 1], (f(seen[0]) - seen[0]).norm(dim=1))
        torch.testing.assert_close(seen[1], seen[0] + 0.3 * (f(seen[0]) - seen[0]))


@pytest.mark.parametrize("name", NAMES)
def test_f_that_uses_its_output_again(name):
    f, z0 = problem(rho=0.95)
    clean, _, info_clean = SOLVERS[name](f, z0, max_iter=20, tol=1e-12)
    for late in (0, 6):
        buffer = torch.empty_like(z0)
        calls: list[int] = []

        def again(z, late=late, buffer=buffer, calls=calls):
            calls.append(1)
            return buffer.copy_(f(z)) if len(calls) > late else f(z)

        z, _, info = SOLVERS[name](again, z0, max_iter=20, tol=1e-12)
        assert (z - clean).abs().max() < 1e-3
        assert (f(z) - z).norm() < 3 * (f(clean) - clean).norm() + 1e-9
        assert info["abs_lowest"].max() < 3 * info_clean["abs_lowest"].max()


def test_best_image_where_some_samples_get_worse():
    factor = torch.tensor([0.5, -1.5, 0.9, 2.0], dtype=torch.float64)[:, None]
    z, _, info = ours.fixed_point_iter(lambda z: factor * z + 1, torch.zeros(4, 3, dtype=torch.float64), max_iter=9)
    expected, _, info_expected = get_solver("fixed_point_iter")(
        lambda z: factor * z + 1, torch.zeros(4, 3, dtype=torch.float64), max_iter=9
    )
    torch.testing.assert_close(z, expected)
    for key in KEYS:
        torch.testing.assert_close(info[key], info_expected[key])


def test_a_start_at_the_solution_and_no_samples():
    f, z0 = problem()
    z, _, _ = ours.broyden_solver(f, z0, max_iter=100, tol=1e-13)
    for name in NAMES:
        counted = Counted(f)
        SOLVERS[name](counted, z, tol=1e-6)
        assert counted.calls == 1
        again, _, info = SOLVERS[name](f, z0[:0], tol=1e-6)
        assert again.shape == (0, 16) and info["nstep"].shape == (0,)
        with torch.inference_mode():
            again, _, _ = SOLVERS[name](f, z0, tol=1e-6)
        torch.testing.assert_close(again, z, rtol=0, atol=1e-5)


def test_options_of_others_are_said_once_and_unknown_ones_refused():
    f, z0 = problem()
    with pytest.warns(IgnoredOption, match=r"broyden_solver\(\) does not use ls="):
        ours.broyden_solver(f, z0, ls=True)
    with pytest.warns(IgnoredOption, match=r"fixed_point_iter\(\) does not use m=: it keeps no columns"):
        ours.fixed_point_iter(f, z0, m=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.broyden_solver(f, z0, ls=True)
        ours.fixed_point_iter(f, z0, m=3)
    with pytest.warns(IgnoredOption, match="relative to the diagonal"):
        ours.anderson_solver(f, z0, lam=2.0)


@pytest.mark.parametrize(
    ("solver", "options", "error", "message"),
    [
        ("anderson", {"lamda": 1}, TypeError, "unknown argument 'lamda'; did you mean 'lam'.*takes func, x0, max_iter"),
        ("broyden", {"threshold": 9}, TypeError, "did you mean 'max_iter'"),
        ("simple_fixed_point_iter", {"beta": 1.0}, TypeError, "did you mean 'tau'"),
        ("anderson", {"stop_mode": "relative"}, ValueError, "stop_mode must be 'abs' or 'rel'"),
        ("anderson", {"max_iter": -1}, ValueError, "max_iter must be from 0 up"),
        ("anderson", {"max_iter": "9"}, TypeError, "max_iter must be a number"),
        ("anderson", {"tol": -1.0}, ValueError, "tol must be finite and not negative"),
        ("anderson", {"m": 0}, ValueError, "m must be at least 1"),
        ("anderson", {"tau": 0.0}, ValueError, "tau must be finite and not 0"),
        ("anderson", {"lam": -1.0}, ValueError, "lam must be finite and not negative"),
        ("broyden", {"LBFGS_thres": -2}, ValueError, "LBFGS_thres must be from 0 up"),
        ("broyden", {"indexing": [0]}, ValueError, "indexing must hold evaluations, counted from 1, got 0"),
        ("broyden", {"return_final": 1}, TypeError, "return_final must be a bool"),
    ],
)
def test_refusals(solver, options, error, message):
    f, z0 = problem()
    with pytest.raises(error, match=message):
        SOLVERS[solver](f, z0, **options)
    with pytest.raises(TypeError, match="func must be callable"):
        SOLVERS[solver](None, z0)
    with pytest.raises(ValueError, match="expected"):
        SOLVERS[solver](lambda z: z[:, :3], z0)


def test_module_options_reach_the_solver():
    f, z0 = problem()
    _, _, a = ours.anderson_solver(f, z0, tol=1e-2, f_tol=1e-8, f_stop_mode="rel")
    _, _, b = ours.anderson_solver(f, z0, tol=1e-8, stop_mode="rel")
    assert torch.equal(a["rel_trace"], b["rel_trace"])


@pytest.mark.parametrize("solvers", [SOLVERS, FAITHFUL], ids=["fast", "faithful"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"stop_mode": "rel", "tol": 1e-4},
        {"tol": 1e-5, "indexing": [3, 9, 60]},
        {"max_iter": 9, "tol": 1e-12},
        {"max_iter": 9, "return_final": True},
    ],
    ids=str,
)
def test_the_loop_of_other_devices_gives_the_same(monkeypatch, name, solvers, options):
    f, z0 = problem(rho=0.9)
    here = solvers[name](f, z0, **{"max_iter": 100, **options})
    monkeypatch.setattr(_loop, "on_host", lambda layout: False)
    there = solvers[name](f, z0, **{"max_iter": 100, **options})
    torch.testing.assert_close(there[0], here[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(there[1], here[1], rtol=0, atol=1e-13)
    same_kind(there[2], here[2])
    for key in KEYS:
        torch.testing.assert_close(there[2][key], here[2][key], rtol=1e-10, atol=1e-13)
