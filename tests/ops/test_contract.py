"""The contract between solvers and backends, by a backend from outside of the package."""

import gc
import weakref
from typing import Any

import pytest
import torch

import deqfast as dq
from deqfast import ops
from deqfast.ops import contract
from deqfast.ops.anderson import AndersonWorkspace
from deqfast.ops.broyden import BroydenWorkspace
from deqfast.ops.codes import Int
from deqfast.status import Status

CPU = torch.device("cpu")


class NotedStep(ops.BoundStep):
    """Another backend's step, with a note of every call."""

    def __init__(self, inner, notes):
        super().__init__(inner.ws)
        self.inner, self.notes = inner, notes

    def __call__(self, f, f_prev, f_rows, f_prev_rows):
        self.notes.append((type(self.ws).__name__, f_prev is not None))
        return self.inner(f, f_prev, f_rows, f_prev_rows)


class NotedEnds(ops.JointEnds):
    def __init__(self, inner, notes):
        super().__init__(inner.ws)
        self.inner, self.notes = inner, notes

    def map(self, values, step_size, cost):
        self.notes.append("map")
        self.inner.map(values, step_size, cost)

    def finish(self, cost, made):
        self.notes.append("finish")
        self.inner.finish(cost, made)


class Recording(ops.Backend):
    """Hands everything on to the oracle and writes down what it was asked."""

    name = "recording"

    def __init__(self):
        self.notes: list[Any] = []
        self.oracle = ops.choose("reference", CPU)
        self.steps = {
            kind: lambda ws, made, bind=bind: NotedStep(bind(ws, made), self.notes)  # type: ignore[misc]
            for kind, bind in self.oracle.steps.items()
        }

    def why_not(self, device):
        return None if device.type == "cpu" else "it records on the CPU"

    def joint(self, ws):
        return NotedEnds(self.oracle.joint(ws), self.notes)


@pytest.fixture
def recording():
    backend = Recording()
    ops.register(backend, before=ops.names()[0])
    yield backend
    ops.unregister("recording")


def f(z):
    return 0.5 * z + 1


def test_a_backend_from_outside_serves_by_its_name(recording):
    z0 = torch.zeros(3, 5, dtype=torch.float64)
    found = dq.fixed_point(f, z0, backend="recording", solver=dq.Anderson(m=2))
    expected = dq.fixed_point(f, z0, backend="reference", solver=dq.Anderson(m=2))
    assert found.backend == "recording"
    assert torch.equal(found.z, expected.z)
    assert recording.notes == [("AndersonWorkspace", k > 0) for k in range(found.nfe)]


def test_auto_asks_it_first_where_it_was_put_first(recording, monkeypatch):
    monkeypatch.delenv("DEQFAST_BACKEND", raising=False)
    assert dq.fixed_point(f, torch.zeros(2, 3), solver="broyden").backend == "recording"
    assert {name for name, _ in recording.notes} == {"BroydenWorkspace"}


def test_it_serves_gradients_and_joint_solves_too(recording):
    theta = torch.ones(3, requires_grad=True)
    sol = dq.fixed_point(lambda z: 0.5 * z + theta, torch.zeros(2, 3), backend="recording")
    forward = len(recording.notes)
    sol.z.sum().backward()
    assert theta.grad is not None and torch.allclose(theta.grad, torch.full((3,), 4.0), rtol=1e-3)
    assert len(recording.notes) > forward
    recording.notes.clear()
    dq.joint_solve(
        lambda z, x: 0.5 * z + x,
        lambda z, x: (z - 1).square().sum(1),
        torch.zeros(2, 3),
        torch.zeros(2, 3),
        step_size=0.1,
        max_iter=4,
        backend="recording",
    )
    assert recording.notes[:3] == ["map", ("AndersonWorkspace", False), "finish"]


def test_a_device_it_does_not_serve_is_refused_with_its_reason(recording):
    with pytest.raises(ValueError, match=r"backend='recording' cannot serve device cuda:0: it records on the CPU"):
        ops.choose("recording", torch.device("cuda", 0))


def test_names_are_taken_once_and_forgotten_names_are_unknown(recording):
    with pytest.raises(ValueError, match="a backend named 'recording' is registered already"):
        ops.register(Recording())
    with pytest.raises(ValueError, match=r"before must be one of 'recording', 'native', .* got 'other'"):
        ops.register(type("Other", (Recording,), {"name": "another"})(), before="other")
    ops.unregister("recording")
    try:
        with pytest.raises(ValueError, match=r"backend must be one of 'auto', .* got 'recording'"):
            dq.fixed_point(f, torch.zeros(2, 3), backend="recording")
    finally:
        ops.register(recording, before=ops.names()[0])


STEPS = {AndersonWorkspace: ops.BoundStep}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "Made.name must be what users call it by, a str, got None"),
        ({"name": "", "steps": STEPS}, "Made.name must be what users call it by, a str, got ''"),
        ({"name": 3, "steps": STEPS}, "Made.name must be .* got 3"),
        ({"name": "made"}, "Made.steps must map kinds of workspaces to what binds one, got None"),
        ({"name": "made", "steps": {}}, r"Made.steps must map .* got \{\}"),
        (
            {"name": "made", "steps": {"anderson": ops.BoundStep}},
            "kinds of workspaces for keys, got 'anderson'",
        ),
        (
            {"name": "made", "steps": {AndersonWorkspace: None}},
            r"steps\[AndersonWorkspace\] must be callable",
        ),
    ],
)
def test_what_is_no_whole_backend_is_refused(wrong, message):
    members = {"why_not": lambda self, device: None, "joint": lambda self, ws: None, **wrong}
    with pytest.raises(TypeError, match=message):
        ops.register(type("Made", (ops.Backend,), members)())
    assert "made" not in ops.names()


def test_what_is_no_backend_is_refused():
    with pytest.raises(TypeError, match="backend must be an instance of a Backend, got the class Recording"):
        ops.register(Recording)
    with pytest.raises(TypeError, match="backend must be an instance of a Backend, got str"):
        ops.register("native")


@pytest.mark.parametrize("ask", [ops.unregister, lambda name: ops.why_not(name, CPU)])
def test_unknown_names_are_told_the_known_ones(ask):
    with pytest.raises(ValueError, match=r"^name must be one of 'native', .* got 'natve'; did you mean 'native'\?$"):
        ask("natve")
    with pytest.raises(ValueError, match=r"^name must be one of 'native', .* got None$"):
        ask(None)


def test_auto_passes_over_a_backend_without_the_step(recording, monkeypatch):
    monkeypatch.delenv("DEQFAST_BACKEND", raising=False)
    recording.steps = {AndersonWorkspace: recording.steps[AndersonWorkspace]}
    assert dq.fixed_point(f, torch.zeros(2, 3)).backend == "recording"
    assert dq.fixed_point(f, torch.zeros(2, 3), solver="broyden").backend != "recording"
    with pytest.raises(ValueError, match="backend 'recording' has no step for a BroydenWorkspace"):
        dq.fixed_point(f, torch.zeros(2, 3), solver="broyden", backend="recording")
    recording.steps = {BroydenWorkspace: None}
    x = torch.zeros(2, 3)
    found = dq.joint_solve(lambda z, x: 0.5 * z + x, lambda z, x: z.square().sum(1), x, x, step_size=0.1, max_iter=2)
    assert found.backend != "recording"


def test_auto_that_finds_none_says_why_of_each(monkeypatch):
    monkeypatch.delenv("DEQFAST_BACKEND", raising=False)
    monkeypatch.setattr(contract, "_backends", {"reference": contract._backends["reference"]})
    message = "^backend='auto' found none that serves device cpu; 'reference': it serves those who name it$"
    with pytest.raises(ValueError, match=message):
        dq.fixed_point(f, torch.zeros(2, 3))
    assert dq.fixed_point(f, torch.zeros(2, 3), backend="reference").backend == "reference"
    monkeypatch.setattr(contract, "_backends", {})
    with pytest.raises(ValueError, match=r"^backend='auto' found none .* cpu; none known$"):
        dq.fixed_point(f, torch.zeros(2, 3))


def test_a_step_that_says_no_more_counts_failures_by_the_statistics(recording):
    state = dq.Picard().init(torch.zeros(4, 3), max_iter=2, backend="recording")
    with torch.no_grad():
        while not state.done:
            state.step(f(state.z))
    assert state.failed() == int((state.ws.int_row(Int.STATUS) > Status.CONVERGED).sum()) == 4
    assert state.bound.quick is None and state.bound.replay is None


def test_a_backend_without_a_step_says_so():
    class Empty(Recording):
        name, steps = "empty", {}

        def __init__(self):
            pass

    ws = dq.Picard().init(torch.zeros(2, 3)).ws
    with pytest.raises(ValueError, match="backend 'empty' has no step for a AndersonWorkspace"):
        Empty().bind(ws)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_a_state_that_nobody_keeps_is_freed_at_once(backend):
    if ops.why_not(backend, CPU) is not None:
        pytest.skip(f"the {backend} backend is not there")
    gc.collect()
    gc.disable()
    try:
        state = dq.Anderson(m=3).init(torch.zeros(4, 8), backend=backend)
        for _ in range(4):
            state.step(f(state.z))
        kept = weakref.ref(state.ws)
        del state
        assert kept() is None
    finally:
        gc.enable()
