"""torchdeq's modules on deqfast: installed into torchdeq, and without it."""

import argparse
import copy
import importlib.metadata
import pickle
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch

import deqfast as dq
from deqfast.compat import _names
from deqfast.compat import torchdeq as ours
from deqfast.compat.torchdeq import _faithful, _install

theirs = pytest.importorskip("torchdeq")
from torchdeq.solver import get_solver, register_solver  # noqa: E402

B, N = 5, 8
NAMES = ("anderson", "broyden", "fixed_point_iter")


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.setattr(_names, "_said", set())
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.uninstall()
    assert get_solver("anderson").__module__ == "torchdeq.solver.anderson"
    assert theirs.core.backward_factory is theirs.grad.backward_factory


class Layer(torch.nn.Module):
    def __init__(self, deq, rho=0.8, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        W = torch.randn(N, N, generator=generator, dtype=torch.float64)
        self.W = torch.nn.Parameter((rho * torch.linalg.qr(W).Q).to(dtype))
        self.x = torch.randn(B, N, generator=generator, dtype=torch.float64).to(dtype)
        self.deq = deq

    def cell(self, z, x):
        return torch.tanh(z @ self.W + x)

    def forward(self, x=None, **options):
        x = self.x if x is None else x
        return self.deq(lambda z: self.cell(z, x), torch.zeros_like(self.x), **options)


def from_torchdeq(**options):
    with ours.installed():
        return theirs.get_deq(**options)


MAKERS = [from_torchdeq, ours.get_deq]
both = pytest.mark.parametrize("make", MAKERS, ids=["installed", "own"])


def gradient(layer, scale=1.0, **options):
    layer.W.grad = None
    states, info = layer(**options)
    (scale * sum((z**3).sum() for z in states)).backward()
    return [z.detach() for z in states], info, layer.W.grad / scale


def exact(**options):
    deq = theirs.get_deq(f_tol=1e-13, b_tol=1e-13, f_max_iter=300, b_max_iter=300, ift=True, b_solver="broyden")
    return gradient(Layer(deq, **options))[2]


@both
@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"ift": True},
        {"hook_ift": True},
        {"grad": 3, "tau": 0.8},
        {"grad": 4, "sup_gap": 2},
        {"grad": 4, "sup_loc": [1, 2]},
    ],
    ids=str,
)
def test_one_state_has_the_value_and_gradient_of_torchdeq(make, core, solver, options):
    options = {"core": core, "f_solver": solver, "b_solver": solver, "f_tol": 1e-9, "b_tol": 1e-9, **options}
    options |= {"f_max_iter": 100.0, "b_max_iter": 100}
    states, info, grad = gradient(Layer(make(**options)))
    old = {"f_solver": "broyden", "b_solver": "broyden", "f_max_iter": 100}
    states_expected, info_expected, grad_expected = gradient(Layer(theirs.get_deq(**options | old)))
    assert len(states) == len(states_expected)
    for a, b in zip(states, states_expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    torch.testing.assert_close(grad, grad_expected, rtol=0, atol=1e-6)
    assert set(info) == set(info_expected) and info["sradius"].tolist() == [-1]


@both
@pytest.mark.parametrize("solver", ["broyden", "fixed_point_iter", "simple_fixed_point_iter"])
def test_slices_are_those_of_torchdeq(make, solver):
    options = {
        "core": "sliced",
        "f_solver": solver,
        "f_tol": 1e-12,
        "n_states": 3,
        "grad": [1, 2, 3],
        "f_max_iter": 120,
    }
    states, _, grad = gradient(Layer(make(**options)))
    states_expected, _, grad_expected = gradient(Layer(theirs.get_deq(**options)))
    for a, b in zip(states, states_expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(grad, grad_expected, rtol=1e-5, atol=1e-5)


@both
def test_every_index_has_its_state_and_gradient(make):  # torchdeq: one state, by the first way instead of the last
    options: dict[str, Any] = {"core": "indexing", "f_solver": "broyden", "b_solver": "broyden"}
    options |= {"f_tol": 1e-9, "b_tol": 1e-9, "ift": True, "b_max_iter": 100, "indexing": [20, 30], "grad": [1, 2, 1]}
    layer = Layer(make(**options))
    states, _ = layer()
    assert len(states) == 3
    (states[-1] ** 3).sum().backward()
    torch.testing.assert_close(layer.W.grad, exact(), rtol=0, atol=1e-6)
    assert len(Layer(theirs.get_deq(**options))()[0]) == 1


@both
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5, 1e-7, 1e6])
def test_scale_of_the_loss_does_not_matter(make, scale):  # torchdeq: 1e-7, 2e-4, 1.4e-2, 0.38
    for solver in NAMES:
        deq = make(ift=True, f_solver="broyden", b_solver=solver, f_tol=1e-12, b_max_iter=200, f_max_iter=200)
        error = (gradient(Layer(deq), scale)[2] - exact()).norm() / exact().norm()
        assert error < 1e-5


@both
@pytest.mark.parametrize("mode", ["ift", "hook_ift"])
def test_autocast(make, mode):
    layer = Layer(make(f_solver="anderson", b_solver="anderson", f_tol=5e-2, f_stop_mode="rel", **{mode: True}))
    layer = layer.float()
    layer.x = layer.x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, info = layer()
    (states[-1].float() ** 3).sum().backward()
    assert states[-1].dtype == torch.float32 and info["rel_lowest"].max() < 5e-2
    expected = exact()
    assert (layer.W.grad.double() - expected).norm() < 0.1 * expected.norm()


@both
@pytest.mark.parametrize("mode", ["ift", "hook_ift"])
def test_two_calls_before_the_backward_passes(make, mode):  # torchdeq's hooks call each other for ever
    layer = Layer(make(f_tol=1e-10, b_tol=1e-10, b_max_iter=200, f_max_iter=200, **{mode: True}))
    a, b = layer()[0][-1], layer(2 * layer.x)[0][-1]
    ((a**3).sum() + (b**3).sum()).backward()
    assert torch.isfinite(layer.W.grad).all()
    a = layer()[0][-1]
    first = torch.autograd.grad((a**3).sum(), layer.W, retain_graph=True)[0]
    torch.testing.assert_close(first, torch.autograd.grad((a**3).sum(), layer.W)[0])
    torch.testing.assert_close(first, exact(), rtol=0, atol=1e-7)


@both
def test_second_derivatives_are_right_or_refused(make):  # torchdeq's are wrong without a word
    layer = Layer(make(f_tol=1e-12, b_tol=1e-12, b_max_iter=300, f_max_iter=300, ift=True, b_solver="broyden"))
    v = torch.randn(N, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss(t):
        W = layer.W.detach() + t * v
        z, _ = layer.deq(lambda z: torch.tanh(z @ W + layer.x), torch.zeros_like(layer.x))
        return (z[-1] ** 3).sum()

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="pass it through args"):  # W + t v is no leaf, and f closes over it
        torch.autograd.grad(loss(t), t, create_graph=True)
    (z,), _ = layer()
    (first,) = torch.autograd.grad((z**3).sum(), layer.W, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), layer.W)
    step = 1e-4
    grads = []
    for sign in (1, -1):
        moved = copy.deepcopy(layer)
        moved.W.data += sign * step * v
        grads.append(gradient(moved)[2])
    torch.testing.assert_close(second, (grads[0] - grads[1]) / (2 * step), rtol=1e-4, atol=1e-5)


@both
def test_a_writer_hears_of_backward_solves(make):
    for solver, length in (("anderson", 29), ("broyden", 31), ("fixed_point_iter", 31)):
        heard: list[dict[str, torch.Tensor]] = []
        layer = Layer(make(ift=True, b_solver=solver, b_max_iter=30, b_tol=1e-3, f_max_iter=100, f_tol=1e-6))
        states, _ = layer(backward_writer=heard.append)
        loss = (states[-1] ** 3).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert len(heard) == 2
        for info in heard:
            assert info["abs_trace"].shape == (B, length)
            assert (info["rel_lowest"] <= 1e-3).all() and (info["nstep"] > 0).all()
            assert torch.equal(info["rel_trace"][:, -1], info["rel_lowest"])


def test_a_backward_solve_that_fails_says_so():
    layer = Layer(ours.get_deq(ift=True, b_max_iter=2, f_max_iter=100, f_tol=1e-6))
    with pytest.warns(dq.GradientWarning):
        gradient(layer)


@both
def test_modules_pickle_and_copy(make):
    layer = Layer(make(core="indexing", f_solver="anderson", n_states=2, grad=2, ift=True))
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        for a, b in zip(gradient(layer)[0], gradient(other)[0], strict=True):
            assert torch.equal(a, b)


@both
def test_tolerance_and_limit_of_one_call(make):
    layer = Layer(make(f_solver="broyden", core="indexing")).eval()
    with torch.no_grad():
        _, loose = layer()
        _, tight = layer(solver_kwargs={"f_tol": 1e-9})
        _, short = layer(solver_kwargs={"f_max_iter": 3})
    assert loose["abs_lowest"].max() < 1e-3 and loose["abs_lowest"].max() > 1e-9
    assert tight["abs_lowest"].max() < 1e-9
    assert short["abs_trace"].shape == (B, 4)
    with pytest.raises(TypeError, match="unknown argument 'momentum'"):
        layer(solver_kwargs={"momentum": 1})


@both
def test_lists_of_tensors(make):
    for no_stat in (None, True):
        deq = make(f_solver="fixed_point_iter", no_stat=no_stat, f_max_iter=60, f_tol=1e-8, grad=2, tau=0.9)
        if no_stat and make is from_torchdeq:
            deq = make(f_solver="simple_fixed_point_iter", f_max_iter=60, grad=2, tau=0.9)
        p = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        start = [torch.zeros(3, 2, 2, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)]
        states, _ = deq(lambda a, b, p=p: (torch.cos(p * b).view_as(a), torch.sin(a).flatten(1)), start)
        a, b = states[-1]
        assert a.shape == (3, 2, 2) and b.shape == (3, 4)
        assert (a.flatten(1) - torch.cos(p * b)).abs().max() < 1e-6
        (a.sum() + b.sum()).backward()
        assert p.grad.abs() > 0.1


def test_eval_mode_has_gradients_and_the_right_radius():  # torchdeq: none, and wrong for complex eigenvalues
    for options in ({"ift": True, "b_max_iter": 200}, {"grad": 2}):
        layer = Layer(ours.get_deq(f_solver="broyden", f_tol=1e-9, eval_factor=3.0, **options)).eval()
        states, info = layer(sradius_mode=True)
        (states[0] ** 3).sum().backward()
        assert layer.W.grad.abs().max() > 0
        assert info["abs_trace"].shape == (B, 121) and info["sradius"].shape == (B,)
    turn = 0.9 * torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    deq = ours.get_deq(f_solver="broyden").eval()
    with torch.no_grad():
        (z,), info = deq(lambda z: z @ turn + 1, torch.zeros(3, 2, dtype=torch.float64), sradius_mode=True)
    torch.testing.assert_close(info["sradius"], torch.full((3,), 0.9, dtype=torch.float64))
    assert not z.requires_grad
    _, info = deq(lambda z: z @ turn + 1, torch.zeros(3, 2, dtype=torch.float64))
    assert info["sradius"].tolist() == [0]
    assert ours.get_deq(f_max_iter=7, eval_f_max_iter=5).config.evaluations == 5


def test_configurations_of_any_kind_and_not_changed():
    options = {"f_solver": "anderson", "core": "indexing", "f_max_iter": 30, "batch_size": 8}
    before = dict(options)
    found = [ours.get_deq(options, n_states=2), ours.get_deq(argparse.Namespace(**options), n_states=2)]
    found.append(ours.get_deq(theirs.utils.config.DEQConfig(options), n_states=2))
    assert options == before
    assert all(deq.config == found[0].config and deq.config.f_max_iter == 30 for deq in found)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"f_solvr": "anderson"}, TypeError, r"get_deq\(\) got an unknown argument 'f_solvr'; did you mean 'f_solver'"),
        ({"core": "sliding"}, ValueError, "core must be 'sliced' or 'indexing', got 'sliding'"),
        ({"f_solver": "andersen"}, ValueError, "f_solver must be one of .*did you mean 'anderson'"),
        ({"grad": 0}, ValueError, "grad must be at least 1"),
        ({"n_states": 3, "grad": [1, 2]}, ValueError, "grad must be one number or one for each of 3 states, got 2"),
        ({"f_tol": -1.0}, ValueError, "f_tol must be finite"),
        ({"f_stop_mode": "max"}, ValueError, "f_stop_mode must be 'abs' or 'rel'"),
        ({"ift": 1}, TypeError, "ift must be a bool"),
        ({"indexing": [0]}, ValueError, "indexing must hold evaluations"),
        ({"ift": True, "b_solver": print}, TypeError, "b_solver must be one of deqfast"),
        ({"args": 3}, TypeError, "args must be a mapping"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        ours.get_deq(**options)


def test_installed_and_taken_out_again():
    own = get_solver("anderson")
    ours.install()
    ours.install()
    assert get_solver("anderson") is ours.anderson_solver and get_solver("anderson").__name__ == own.__name__
    ours.install(faithful=True)
    assert get_solver("anderson") is _faithful.anderson_solver
    with ours.installed():
        assert get_solver("broyden") is ours.broyden_solver
    assert get_solver("broyden") is _faithful.broyden_solver
    ours.uninstall()
    assert get_solver("anderson") is own
    with pytest.warns(ours.InstallWarning, match="nothing to uninstall"):
        ours.uninstall()
    with pytest.raises(RuntimeError, match="inside"), ours.installed():
        raise RuntimeError("inside")
    assert get_solver("anderson") is own


def test_solvers_of_others_stay():
    own = get_solver("anderson")
    with ours.installed():
        register_solver("anderson", print)
    assert get_solver("anderson") is print
    register_solver("anderson", own)

    def mine(func, x0, **options):
        return get_solver("fixed_point_iter")(func, x0, **options)

    register_solver("mine", mine)
    with ours.installed():
        layer = Layer(theirs.get_deq(f_solver="mine", b_solver="mine", ift=True, b_max_iter=200, f_tol=1e-9))
    try:
        torch.testing.assert_close(gradient(layer)[2], exact(), rtol=0, atol=1e-4)
    finally:
        theirs.solver._solvers.pop("mine")


def test_too_late_is_said():
    early = theirs.get_deq()
    with pytest.warns(ours.InstallWarning, match=r"too late for 1 module of torchdeq.*before get_deq"):
        ours.install()
    del early
    ours.uninstall()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.install()


def test_another_version_is_said_once(monkeypatch):
    monkeypatch.setattr(_install, "_said", set())
    monkeypatch.setattr(_install, "version", lambda name: "0.2.0")
    with pytest.warns(ours.InstallWarning, match=r"written for torchdeq 0\.1\.0, this is 0\.2\.0"):
        ours.install()
    ours.uninstall()
    assert importlib.metadata.version("torchdeq") == "0.1.0"


def test_faithful_modules_are_torchdeqs():
    options = {"f_solver": "anderson", "b_solver": "anderson", "ift": True, "f_max_iter": 20, "b_max_iter": 20}
    options |= {"f_tol": 1e-12, "b_tol": 1e-12}
    with ours.installed(faithful=True):
        deq = theirs.get_deq(**options)
    states, _, grad = gradient(Layer(deq))
    states_expected, _, grad_expected = gradient(Layer(theirs.get_deq(**options)))
    torch.testing.assert_close(states[0], states_expected[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(grad, grad_expected, rtol=0, atol=1e-7)


def test_threads_install_and_solve():
    failures = []

    def work():
        try:
            for _ in range(5):
                ours.install()
                gradient(Layer(theirs.get_deq(f_solver="anderson", ift=True, b_max_iter=200, f_tol=1e-8)))
        except Exception as error:
            failures.append(error)

    ours.install()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


WITHOUT = """
import sys
sys.modules["torchdeq"] = None
import torch, deqfast as dq
td = dq.compat.torchdeq
deq = td.get_deq(core="sliced", f_solver="broyden")
z, info = deq(torch.cos, torch.zeros(3, 2))
print(z[0].mean().item() > 0.73, sorted(info))
try:
    td.install()
except ImportError as error:
    print(error)
"""


def test_without_torchdeq():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True ['abs_lowest'") and "there is no torchdeq to install" in done.stdout


def test_normalisation_and_dropout_are_untouched():
    for make in MAKERS:
        torch.manual_seed(0)
        linear = torch.nn.Linear(N, N)
        theirs.apply_norm(linear, "weight_norm")
        drop = theirs.dropout.VariationalDropout(0.2)
        block = torch.nn.Sequential(linear, drop)
        theirs.reset_deq(block)
        deq = make(f_solver="anderson", ift=True, f_max_iter=60, b_max_iter=60)
        x = torch.randn(B, N)
        (z,), _ = deq(lambda z, block=block, x=x: torch.tanh(0.3 * block(z) + x), torch.zeros(B, N))
        z.sum().backward()
        assert sum(float(p.grad.abs().sum()) for p in block.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize(
    "options", [{"ift": True, "b_max_iter": 200}, {"grad": 3}, {"n_states": 2, "core": "indexing"}]
)
def test_torch_func_goes_through(options):
    for solver in NAMES:
        layer = Layer(ours.get_deq(f_solver=solver, f_tol=1e-9, b_tol=1e-10, f_max_iter=100, **options))
        layer.x.requires_grad_()
        _, _, expected = gradient(layer)

        def loss(W, layer=layer):
            states, _ = torch.func.functional_call(layer, {"W": W})
            return sum((z**3).sum() for z in states)

        found = torch.func.grad(loss)(layer.W.detach())
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
