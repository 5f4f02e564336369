"""Solves recorded as CUDA graphs, here on a tape of CPU operations that is replayed into the same memory."""

import functools
import gc
import warnings
import weakref
from typing import Any

import pytest
import tape
import torch
from torch import nn

import deqfast as dq
from deqfast import graphs
from deqfast.graphs import identity, kept
from deqfast.graphs import recorder as recording
from deqfast.graphs.recording import Recording

SOLVERS = [dq.Anderson(), dq.Anderson(m=4, type=2), dq.Broyden(), dq.Picard(damping=0.7)]


@pytest.fixture
def recorder(monkeypatch):
    found = tape.TapeRecorder()
    monkeypatch.setattr(recording, "RECORDER", found)
    graphs.clear()
    with tape.taped_backends():
        yield found
    graphs.clear()


class Cell(nn.Module):
    def __init__(self, n=24):
        super().__init__()
        self.inner = nn.Linear(n, n)
        with torch.no_grad():
            self.inner.weight.mul_(0.9 / torch.linalg.matrix_norm(self.inner.weight, 2))

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + x)


def assert_same(a, b):
    for one, other in zip(torch.utils._pytree.tree_leaves(a.z), torch.utils._pytree.tree_leaves(b.z), strict=True):
        assert torch.equal(one, other)
    for name in ("converged", "steps", "residual", "status"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("mode", ["graph", "device"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__ + str(getattr(s, "type", "")))
def test_recorded_solve_gives_the_bits_of_the_loop(recorder, mode, solver):
    cell = Cell()
    for _ in range(3):
        x, z0 = torch.randn(5, 24), torch.randn(5, 24)
        options = {"solver": solver, "rtol": 1e-5, "backward": "none"}
        plain = dq.fixed_point(cell, z0, (x,), **options)
        recorded = dq.fixed_point(cell, z0, (x,), mode=mode, **options)
        assert_same(recorded, plain)
        assert plain.nfe <= recorded.nfe <= plain.nfe + 2 * recording.PASS[mode]
        assert (plain.mode, recorded.mode) == ("loop", mode)
    assert recorder.recorded == 3  # the first evaluation, a pass, the rest: once for all three


@pytest.mark.parametrize("mode", ["graph", "device"])
@pytest.mark.parametrize("max_iter", [1, 2, 3, 4, 5, 9, 11])
def test_recorded_solve_makes_max_iter_evaluations_at_most(recorder, mode, max_iter):
    cell, x = Cell(), torch.randn(3, 24)
    options = {"rtol": 0.0, "max_iter": max_iter, "backward": "none"}
    recorded = dq.fixed_point(cell, torch.zeros(3, 24), (x,), mode=mode, **options)
    assert_same(recorded, dq.fixed_point(cell, torch.zeros(3, 24), (x,), **options))
    assert recorded.nfe == max_iter


def test_recorded_solve_stops_when_the_last_sample_does(recorder):
    rate = torch.tensor([[0.1], [0.9]])
    recorded = dq.fixed_point(lambda z: rate * z + 1, torch.zeros(2, 9), solver="picard", mode="graph", max_iter=400)
    assert recorded.converged.all()
    assert recorded.steps.max() <= recorded.nfe <= recorded.steps.max() + 2 * recording.PASS["graph"]


def test_answers_of_earlier_solves_stay(recorder):
    cell = Cell()
    solve = functools.partial(dq.fixed_point, cell, torch.zeros(2, 24), backward="none", mode="graph")
    first = solve((torch.ones(2, 24),))
    kept = first.z.clone(), first.steps.clone(), first.residual.clone()
    solve((-3 * torch.ones(2, 24),))
    assert torch.equal(first.z, kept[0]) and torch.equal(first.steps, kept[1]) and torch.equal(first.residual, kept[2])


def test_weights_changed_in_place_are_seen(recorder):
    cell, x = Cell(), torch.randn(2, 24)
    for _ in range(2):
        recorded = dq.fixed_point(cell, torch.zeros(2, 24), (x,), backward="none", mode="graph")
        assert_same(recorded, dq.fixed_point(cell, torch.zeros(2, 24), (x,), backward="none"))
        with torch.no_grad():
            cell.inner.weight.mul_(0.5)
    assert recorder.recorded == 3


def test_weights_that_were_replaced_are_seen(recorder):
    cell, x = Cell(), torch.randn(2, 24)
    for _ in range(2):
        recorded = dq.fixed_point(cell, torch.zeros(2, 24), (x,), backward="none", mode="graph")
        assert_same(recorded, dq.fixed_point(cell, torch.zeros(2, 24), (x,), backward="none"))
        cell.inner.weight = nn.Parameter(0.5 * cell.inner.weight.detach())
    assert recorder.recorded == 6


def test_tree_of_tensors_and_reused_output(recorder):
    a, b = torch.randn(3, 4, 5), torch.randn(3, 7)
    buffer = torch.empty(3, 7)

    def f(z, a):
        return {"a": 0.5 * torch.cos(z["a"]) + a, "b": torch.mul(z["b"].sin(), 0.4, out=buffer)}

    z0 = {"a": torch.zeros(3, 4, 5).mT, "b": b}
    options = {"rtol": 1e-6, "backward": "none"}
    for mode in ("graph", "device"):
        assert_same(dq.fixed_point(f, z0, (a.mT,), mode=mode, **options), dq.fixed_point(f, z0, (a.mT,), **options))


@pytest.mark.parametrize("mode", ["graph", "device"])
def test_gradients_are_those_of_the_loop(recorder, mode):
    cell = Cell()
    counts = []
    for _ in range(2):
        x = torch.randn(4, 24)
        found = {}
        for which in ("loop", mode):
            given = x.clone().requires_grad_()
            cell.zero_grad()
            z = dq.fixed_point(cell, torch.zeros(4, 24), (given,), rtol=1e-6, mode=which).z
            z.square().sum().backward()
            found[which] = [given.grad, *(p.grad for p in cell.parameters())]
        assert all(torch.equal(a, b) for a, b in zip(found["loop"], found[mode], strict=True))
        counts.append(recorder.recorded)
    assert counts == [6, 6]  # forward and backward, once each


@pytest.mark.parametrize("mode", ["graph", "device"])
def test_backward_solves_report_as_those_of_the_loop(recorder, mode):
    cell, heard = Cell(), []
    x = torch.randn(4, 24, requires_grad=True)
    for which in ("loop", mode):
        backward = dq.Implicit(callback=lambda report: heard.append(report))
        sol = dq.fixed_point(cell, torch.zeros(4, 24), (x,), rtol=1e-6, mode=which, backward=backward)
        assert sol.backward is None
        sol.z.square().sum().backward()
        assert sol.backward is heard[-1]
    of_loop, of_mode = heard
    assert of_mode.status.tolist() == of_loop.status.tolist() == [int(dq.Status.CONVERGED)] * 4
    assert torch.equal(of_mode.residual, of_loop.residual) and bool(of_mode.converged.all())
    assert of_loop.evaluations <= of_mode.evaluations <= of_loop.evaluations + 8
    # Another solve in the recording's memory leaves the report as it is.
    kept = of_mode.residual.clone()
    again = dq.fixed_point(cell, torch.zeros(4, 24), (x,), rtol=1e-6, mode=mode, backward=dq.Implicit())
    (again.z * torch.arange(24)).sum().backward()
    assert torch.equal(of_mode.residual, kept) and not torch.equal(again.backward.residual, kept)


def test_backward_solve_that_fails_in_a_recording_is_reported(recorder):
    weight, b = 0.999 * torch.eye(4), torch.ones(2, 4, requires_grad=True)
    options = {"solver": "picard", "max_iter": 5, "rtol": 1e-9, "mode": "graph"}
    sol = dq.fixed_point(lambda z, b: z @ weight + b, torch.zeros(2, 4), (b,), **options)
    with pytest.warns(RuntimeWarning, match="did not converge for 2 of 2"):
        sol.z.sum().backward()
    assert sol.backward.evaluations == 5 and not bool(sol.backward.converged.any())


def test_double_backward_and_functional_gradients_run_in_graph_mode_too(recorder):
    cell = Cell(6).double()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    solve = lambda x: dq.fixed_point(cell, torch.zeros(2, 6, dtype=torch.float64), (x,), rtol=1e-12, mode="graph").z  # noqa: E731
    assert torch.autograd.gradgradcheck(solve, (x,))


def test_backward_that_fails_warns(recorder):
    weight = 0.999 * torch.eye(4)
    b = torch.ones(2, 4, requires_grad=True)
    options = {"solver": "picard", "max_iter": 5, "rtol": 1e-9}
    z = dq.fixed_point(lambda z, b: z @ weight + b, torch.zeros(2, 4), (b,), mode="graph", **options).z
    with pytest.warns(RuntimeWarning, match="did not converge for 2 of 2"):
        z.sum().backward()


def test_new_lambda_over_the_same_tensors_is_the_same_program(recorder):
    x = torch.randn(2, 8)
    for _ in range(3):
        dq.fixed_point(lambda z: 0.5 * torch.cos(z) + x, torch.zeros(2, 8), mode="graph")
    assert recorder.recorded == 3


def test_f_with_the_entries_of_a_tuple_is_recorded_once(recorder):
    x, z0 = torch.randn(2, 8), (torch.zeros(2, 8), torch.ones(2, 8))
    options = {"unpack": True, "backward": "none"}

    def solve(**more):
        return dq.fixed_point(lambda a, b: (0.5 * torch.cos(b) + x, a / 2), z0, **options, **more)

    for _ in range(3):
        recorded = solve(mode="graph")
    assert recorded.mode == "graph" and recorder.recorded == 3
    assert_same(recorded, solve())


def test_closure_over_ever_new_tensors_falls_back_and_says_so(recorder):
    alive = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(kept.NEW_EVERY_TIME + 1):
            x = torch.full((2, 8), float(i))
            alive.append(x)
            solution = dq.fixed_point(lambda z, x=x: 0.5 * torch.cos(z) + x, torch.zeros(2, 8), mode="graph")
            assert torch.allclose(solution.z, 0.5 * torch.cos(solution.z) + x, atol=1e-3)
    assert [str(w.message).split(": ", 1)[1] for w in caught] == [
        "f closes over tensors that are others at every call: hand them over through args"
    ]
    assert solution.mode == "loop"


def _random(z):
    return 0.5 * torch.cos(z) + 1e-4 * torch.rand_like(z)


def _writes(z):
    return z.mul_(0.5).add_(1)


def _fails_when_recorded(z):
    if tape.Tape.recording is not None:
        raise RuntimeError("operation not permitted when stream is capturing")
    return 0.5 * torch.cos(z)


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (_random, "draws random numbers"),
        (_writes, "writes into the iterate"),
        (_fails_when_recorded, "RuntimeError: operation not permitted when stream is capturing"),
    ],
)
def test_what_cannot_be_recorded_runs_in_the_loop_and_says_why(recorder, f, reason):
    with pytest.warns(graphs.ModeWarning, match=reason):
        solution = dq.fixed_point(f, torch.zeros(2, 8), mode="graph", rtol=1e-2, max_iter=30)
    assert solution.mode == "loop" and solution.nfe > 1


def test_args_that_f_writes_to_are_refused(recorder):
    counter = torch.zeros(2, 1)

    def f(z, counter):
        return 0.5 * torch.cos(z + 0 * counter.add_(1))

    with pytest.warns(graphs.ModeWarning, match="f writes into its args"):
        solution = dq.fixed_point(f, torch.zeros(2, 8), (counter,), mode="graph", backward="none")
    assert int(counter[0]) == solution.nfe


def test_sparse_tensors_are_closed_over_or_refused(recorder):
    matrix = (0.3 * torch.eye(8)).to_sparse()
    solution = dq.fixed_point(lambda z: torch.sparse.mm(matrix, z.T).T + 1, torch.zeros(2, 8), mode="graph")
    assert solution.mode == "graph" and solution.converged.all()
    with pytest.warns(graphs.ModeWarning, match="args holds a tensor of layout torch.sparse_coo"):
        dq.fixed_point(lambda z, a: torch.sparse.mm(a, z.T).T + 1, torch.zeros(2, 8), (matrix,), mode="graph")


def test_recordings_of_inference_mode_serve_training_too(recorder):
    cell, x = Cell(), torch.randn(2, 24)
    with torch.inference_mode():
        first = dq.fixed_point(cell, torch.zeros(2, 24), (x,), mode="graph").z.clone()
    second = dq.fixed_point(cell, torch.zeros(2, 24), (x,), mode="graph")
    second.z.sum().backward()
    assert torch.equal(first, second.z) and cell.inner.weight.grad is not None
    assert recorder.recorded == 6


def test_recordings_do_not_keep_the_callers_tensors_alive(recorder):
    cell = Cell()
    encoder = nn.Linear(24, 24)
    x = encoder(torch.randn(2, 24))
    seen = weakref.ref(x)
    dq.fixed_point(cell, torch.zeros(2, 24), (x,), mode="graph").z.sum().backward()
    del x
    gc.collect()
    assert seen() is None


def test_hooks_and_attributes_of_modules_are_seen(recorder):
    class Scaled(Cell):
        def __init__(self):
            super().__init__()
            self.factors = [1.0]

        def forward(self, z, x):
            return self.factors[0] * super().forward(z, x)

    cell, x = Scaled(), torch.randn(2, 24)
    changes = [
        lambda: cell.factors.__setitem__(0, 0.5),
        lambda: cell.inner.register_forward_hook(lambda *a: 0.1 * a[2]),
    ]
    for change in changes:
        change()
        recorded = dq.fixed_point(cell, torch.zeros(2, 24), (x,), backward="none", mode="graph")
        assert_same(recorded, dq.fixed_point(cell, torch.zeros(2, 24), (x,), backward="none"))


def test_within_a_capture_of_the_caller_the_loop_runs(recorder, monkeypatch):
    monkeypatch.setattr(recorder, "capturing", lambda device: True)
    with pytest.warns(graphs.ModeWarning, match="a CUDA graph is being captured") as caught:
        assert dq.fixed_point(torch.cos, torch.zeros(2, 8), mode="graph").mode == "loop"
    assert caught[0].filename == __file__
    assert recorder.recorded == 0


def test_no_memory_for_a_recording_is_no_error_and_not_for_ever(recorder, monkeypatch):
    record = Recording.record

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Recording, "record", out_of_memory)
    with pytest.warns(graphs.ModeWarning, match="no memory for a recording"):
        dq.fixed_point(torch.cos, torch.zeros(2, 8), mode="graph")
    monkeypatch.setattr(Recording, "record", record)
    assert dq.fixed_point(torch.cos, torch.zeros(2, 8), mode="graph").mode == "graph"


def test_many_layers_of_one_class_are_programs_of_their_own(recorder):
    class Layer:
        def __init__(self, shift):
            self.shift = torch.full((8,), shift)

        def f(self, z):
            return 0.5 * torch.cos(z) + self.shift

    layers = [Layer(float(i)) for i in range(kept.NEW_EVERY_TIME + 2)]
    for layer in layers:
        assert dq.fixed_point(layer.f, torch.zeros(2, 8), mode="graph").mode == "graph"


def test_own_exceptions_of_f_pass_through(recorder):
    def f(z):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        dq.fixed_point(f, torch.zeros(2, 8), mode="graph")


def test_without_graphs_the_loop_runs_and_says_so():
    with pytest.warns(graphs.ModeWarning, match="device cpu has no graphs"):
        assert dq.fixed_point(torch.cos, torch.zeros(2, 8), mode="device").mode == "loop"


@pytest.mark.parametrize("name", ["trace", "progress", "compact"])
def test_options_that_look_at_every_evaluation_are_refused(name):
    with pytest.raises(ValueError, match=f"mode='graph' cannot be combined with {name}"):
        dq.fixed_point(torch.cos, torch.zeros(2, 8), mode="graph", **{name: True})


def test_wrong_mode_and_unrolling_are_refused():
    with pytest.raises(ValueError, match="mode must be one of 'loop', 'graph', 'device', got 'fast'"):
        dq.fixed_point(torch.cos, torch.zeros(2, 8), mode="fast")
    with pytest.raises(ValueError, match="cannot be combined with callback"):
        dq.fixed_point(torch.cos, torch.zeros(2, 8), mode="graph", callback=lambda k, state: None)
    with pytest.raises(ValueError, match="cannot be combined with backward=Unroll"):
        dq.fixed_point(torch.cos, torch.zeros(2, 8), mode="graph", backward=dq.Unroll())


def test_functional_transforms_run_in_the_loop_and_say_so(recorder):
    def total(x):
        return dq.fixed_point(lambda z, x: 0.5 * torch.cos(z) + x, torch.zeros(2, 8), (x,), mode="graph").z.sum()

    with pytest.warns(graphs.ModeWarning, match="torch.func"):
        found = torch.func.grad(total)(torch.ones(2, 8))
    assert torch.isfinite(found).all()


def test_empty_batch_needs_no_recording(recorder):
    assert dq.fixed_point(torch.cos, torch.zeros(0, 8), mode="graph").nfe == 0
    assert recorder.recorded == 0


def test_few_recordings_are_kept(recorder):
    for n in range(2, 2 + kept.KEPT + 2):
        dq.fixed_point(torch.cos, torch.zeros(2, n), mode="graph", solver="picard", max_iter=3)
    assert len(kept._kept) == kept.KEPT


class Holder:
    def __init__(self, t):
        self.t = t

    def f(self, z):
        return z + self.t


same_program = functools.partial(identity, device=torch.device("cpu"))


def test_identity_follows_what_a_recording_would_read():
    t, cell = torch.zeros(3), Cell(3)
    make = lambda t: lambda z: z + t  # noqa: E731
    assert same_program(make(t)) == same_program(make(t))
    assert same_program(make(t)) != same_program(make(t.clone()))
    assert same_program(make(t)) != same_program(make(t[:2]))
    assert same_program(functools.partial(torch.add, t)) != same_program(functools.partial(torch.add, t.clone()))
    assert same_program(Holder(t).f) != same_program(Holder(t).f)  # an object of an unknown kind is itself alone
    before = same_program(cell)
    assert same_program(cell) == before
    cell.eval()
    assert same_program(cell) != before
    cell.train()
    assert same_program(cell) == before
    cell.note = 1.5  # type: ignore[assignment]
    assert same_program(cell) != before
    recursive: Any = lambda z: recursive  # noqa: E731
    assert same_program(recursive) == same_program(recursive)
    assert (
        same_program([1, "a", {"k": (None, t)}])
        == same_program([1, "a", {"k": (None, t)}])
        != same_program([1, "a", {"k": t}])
    )


def test_a_compiled_model_records_compiled_evaluations(recorder, request):
    request.addfinalizer(torch.compiler.reset)
    cell = Cell()
    solve = torch.compile(
        lambda x: dq.fixed_point(cell, torch.zeros(2, 24), (x,), mode="graph", backward="none").z, backend="eager"
    )
    for _ in range(2):
        x = torch.randn(2, 24)
        assert torch.equal(solve(x), dq.fixed_point(cell, torch.zeros(2, 24), (x,), backward="none").z)
    assert recorder.recorded == 3
