"""Columns in the host's memory, or read piece by piece where they are: the same solves, with little on the device.

A CPU stands in for the device: there is no link, but every piece goes the same way.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from problems import needs_native, problem, pull, rows_of, same_bits, solve
from quadratics import LinearQuadratic
from test_anderson import OPTIONS, check_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as leaves

import deqfast as dq
from deqfast.ops import hosted, pool
from deqfast.ops.codes import BLOCK, Int
from deqfast.ops.hosted import HostedWorkspace
from deqfast.ops.lag import Later
from deqfast.ops.layout import Layout
from deqfast.ops.plain import link, streamed
from deqfast.ops.plain.link import Link
from deqfast.ops.plain.streamed import StreamedStep

pytestmark = pytest.mark.host

PIECE = 2 * BLOCK


@pytest.fixture
def device(monkeypatch):
    """The CPU as a device with memory of its own, and small pieces."""
    monkeypatch.setattr(hosted, "SHARED", ())
    monkeypatch.setattr(hosted, "LEAST", PIECE)
    monkeypatch.setattr(hosted, "MOST", PIECE)


@pytest.fixture
def narrow(monkeypatch):
    """Histories that are narrower than the products are read piece by piece, however small."""
    monkeypatch.setattr(streamed, "WIDE_MOST", -1)
    monkeypatch.setattr("deqfast.ops.plain.stores.IN_CACHE", PIECE)


SOLVERS = {
    "default": dq.Anderson(m=4, history_dtype=torch.bfloat16),
    "type-1": dq.Anderson(m=4, type=1, history_dtype=torch.float32),
    "type-2": dq.Anderson(m=4, type=2, evict="oldest", history_dtype=torch.bfloat16),
    "mixing": dq.Anderson(m=4, mixing=0.7, history_dtype=torch.float32),
    "turns": dq.Anderson(m=6, mix_every=2, history_dtype=torch.bfloat16),
    "float16": dq.Anderson(m=4, history_dtype=torch.float16),
    "int8": dq.Anderson(m=4, history_dtype=torch.int8),
    "m1": dq.Anderson(m=1),
}
EVERY = [pytest.param(solver, id=name) for name, solver in SOLVERS.items()]
# Pieces of several samples, of parts of one, and of whole blocks and a rest.
SIZES = [(5, 3), (7, 700), (2, 5 * BLOCK + 17), (3, PIECE)]


def on_host(solver: dq.Anderson) -> dq.Anderson:
    return dataclasses.replace(solver, history_device="cpu")


F64 = torch.float64  # of states: of a column rounded to few bits next to none is rounded the other way


def assert_alike(state: Any, other: Any, tolerance: float = 1e-9, samples: Any = slice(None)) -> None:
    """The iterates of these samples up to rounding, and the same decisions for all."""
    for row in (Int.STATUS, Int.STEPS, Int.SLOT, Int.COUNT, Int.EVICTIONS, Int.STEP_FALLBACKS, Int.SOLVE_FALLBACKS):
        assert torch.equal(state.ws.int_row(row), other.ws.int_row(row)), row
    now, then = rows_of(state.z)[samples], rows_of(other.z)[samples]
    assert bool(((now - then).norm(dim=1) <= tolerance * then.norm(dim=1)).all())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("solver", EVERY)
def test_steps_are_those_of_a_history_on_the_device(device, solver, size):
    p = problem(*size, slowest=0.9, zero=False, dtype=F64)
    states = [s.init(p.z0, rtol=0.0, max_iter=12, backend="torch") for s in (on_host(solver), solver)]
    assert isinstance(states[0].ws, HostedWorkspace) and isinstance(states[0].bound, StreamedStep)
    for _ in range(9):
        for state in states:
            state.step(pull(state.z, *p.args))
        assert_alike(*states)
    if size[1] > BLOCK:
        assert len(states[0].ws.pieces) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
def test_steps_of_every_state_dtype(device, dtype):
    p = problem(3, 900, dtype=dtype, slowest=0.9)
    solver = dq.Anderson(m=4)
    states = [s.init(p.z0, rtol=0.0, backend="torch") for s in (on_host(solver), solver)]
    for _ in range(7):
        for state in states:
            state.step(pull(state.z, *p.args))
        assert_alike(*states, tolerance={torch.float32: 1e-4, torch.bfloat16: 2e-2}.get(dtype, 1e-9))


def test_trees_and_strided_states(device):
    p = problem(3, 2, 30, 35, slowest=0.9, dtype=F64)
    split = [{"a": t.to(memory_format=torch.channels_last), "b": (t[:, 0, :3] + 1).mT} for t in (p.z0, p.x)]
    solver = dq.Anderson(m=4, history_dtype=torch.int8)
    states = [s.init(split[0], rtol=0.0, backend="torch") for s in (on_host(solver), solver)]
    assert {piece.leaf for piece in states[0].ws.pieces} == {0, 1}
    for _ in range(7):
        for state in states:
            state.step({name: pull(state.z[name], split[1][name], p.rate) for name in ("a", "b")})
        assert_alike(*states)


@pytest.mark.parametrize("solver", EVERY)
def test_samples_that_overflow_stop_or_change_their_unit(device, solver):
    p = problem(6, 700, slowest=0.95, dtype=F64)
    p.rate.fill_(0.9)
    p.rate[3] = 0.05
    settings = {"rtol": 1e-6, "max_iter": 18, "backend": "torch"}
    states = [s.init(p.z0, **settings) for s in (on_host(solver), solver)]
    for k in range(18):
        for state in states:
            f = pull(state.z, *p.args)
            if k == 5:
                f[0] *= 1e15
            if k == 7:
                f[1] = torch.nan
            if k == 8:
                f[2] *= 1e30
            state.step(f)
        # On its way back from there a sample has no digit that it shares with one rounded otherwise.
        assert_alike(*states, samples=[1, 3, 4, 5] if k < 17 else slice(None))
    assert states[0].status[1] == dq.Status.NON_FINITE and states[0].steps[3] < 12
    assert bool(states[0].ws.int_row(Int.RESCALES).any())


@pytest.mark.parametrize(
    "settings", [{}, {"compact": True}, {"stop": "all"}, {"returns": "next"}, {"returns": "image"}]
)
@pytest.mark.parametrize("name", ["default", "type-2", "int8"])
def test_solves_are_those_of_a_history_on_the_device(device, name, settings):
    p = problem(9, 300, slowest=0.97)
    expected = solve(p, solver=SOLVERS[name], rtol=1e-5, max_iter=80, backend="torch", **settings)
    found = solve(p, solver=on_host(SOLVERS[name]), rtol=1e-5, max_iter=80, **settings)
    assert found.backend == "torch" and bool(found.converged.all())
    assert bool(((found.steps - expected.steps).abs() <= 2).all())
    assert torch.allclose(found.z, expected.z, rtol=1e-3, atol=1e-4)


def test_segments_of_unequal_length(device):
    lengths = [3, 40, 7, 3]
    rows = sum(lengths)
    p = problem(rows, 50, slowest=0.9)
    offsets = [0, *itertools.accumulate(lengths)]
    a, b = p.rate[:, None], p.x
    solver = dq.Anderson(m=4)
    found, expected = (
        dq.fixed_point(lambda z: a * z.tanh() + b, p.z0, solver=s, segments=offsets, rtol=1e-5, backend="torch")
        for s in (on_host(solver), solver)
    )
    assert bool(found.converged.all()) and found.converged.shape == (4,)
    assert torch.allclose(found.z, expected.z, rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_a_history_on_the_device(device):
    p = problem(4, 300, slowest=0.8)
    gradients = []
    for solver in (on_host(SOLVERS["default"]), SOLVERS["default"]):
        x = p.x.clone().requires_grad_()
        sol = dq.fixed_point(pull, p.z0, (x, p.rate), solver=solver, rtol=1e-6, backend="torch")
        sol.z.square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


def test_a_joint_solve_has_its_columns_there(device):
    q = LinearQuadratic(norm=0.5)
    args = q.tensors(torch.float32)
    step_size = 1 / q.solution(*q.tensors())[1]
    z0, x0 = torch.zeros(q.B, q.nz), torch.zeros(q.B, q.nx)
    options = {"rtol": 1e-3, "max_iter": 300, "step_size": step_size, "backward": "none"}
    expected = dq.joint_solve(q.f, q.loss, z0, x0, args, solver=dq.Anderson(), backend="torch", **options)
    found = dq.joint_solve(q.f, q.loss, z0, x0, args, solver=dq.Anderson(history_device="cpu"), **options)
    assert found.backend == "torch" and bool(found.converged.all())
    assert torch.allclose(found.x, expected.x, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("solver", EVERY)
def test_a_saved_state_goes_on_to_the_bit(device, solver):
    p = problem(4, 700, slowest=0.95)
    state = on_host(solver).init(p.z0, rtol=0.0, backend="torch")
    for _ in range(6):
        state.step(pull(state.z, *p.args))
    saved = copy.deepcopy(state.state_dict())
    again = on_host(solver).init(p.z0, rtol=0.0, backend="torch")
    for junk in (again.ws.history, again.ws.scales):
        junk.view(torch.uint8).fill_(255)  # NaN in every dtype that has one
    again.load_state_dict(saved)
    third = copy.deepcopy(state)
    for _ in range(4):
        for each in (state, again, third):
            each.step(pull(each.z, *p.args))
        assert same_bits(state.z, again.z) and same_bits(state.z, third.z)
    assert torch.equal(state.ws.own()["history"], again.ws.own()["history"])


def test_a_smaller_batch_and_another_solve_take_the_columns_along(device):
    p = problem(9, 700, slowest=0.97, dtype=F64)
    for solver in (SOLVERS["default"], SOLVERS["int8"]):
        states = [s.init(p.z0, rtol=0.0, backend="torch") for s in (on_host(solver), solver)]
        q = p
        for k in range(10):
            if k == 5:
                q = p.rows([1, 4, 8])
                for state in states:
                    state.keep([1, 4, 8])
            for state in states:
                state.step(pull(state.z, *q.args))
            assert_alike(*states)
        later = [state.options.init(q.z0, rtol=0.0, backend="torch", history=state) for state in states]
        for _ in range(3):
            for state in later:
                state.step(pull(state.z, *q.args))
            assert_alike(*later)


def test_columns_are_those_that_a_history_on_the_device_holds(device):
    p = problem(5, 3 * BLOCK + 5, slowest=0.9)
    solver = SOLVERS["int8"]
    states = [s.init(p.z0, rtol=0.0, backend="torch") for s in (on_host(solver), solver)]
    for _ in range(2):  # whose iterates have the same bits
        for state in states:
            state.step(p.x * (state.nfe + 1) ** 2)
    for state in states:
        state.ws.settle()
    for which in (0, 1):
        found, expected = (state.ws.columns(which)[:, 0] for state in states)
        assert torch.equal(found, expected) and bool(found.any())
    assert torch.equal(*(state.ws.scales[:, :, 0] for state in states))


# ---- what is on the device ----


class Watch(TorchDispatchMode):
    """Notes the largest tensor that an operation makes, and which operations touch some memory."""

    def __init__(self, memory: Tensor) -> None:
        super().__init__()
        self._memory = memory.untyped_storage().data_ptr()
        self.largest = 0
        self.touched: set[str] = set()

    def _inside(self, t: Any) -> bool:
        return isinstance(t, Tensor) and t.untyped_storage().data_ptr() == self._memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.is_view:
            return found
        if any(self._inside(t) for t in leaves((args, kwargs))):
            self.touched.add(str(func))
        made = [t for t in leaves(found) if isinstance(t, Tensor) and not self._inside(t)]
        self.largest = max([self.largest, *(t.numel() for t in made)])
        return found


@pytest.mark.parametrize("name", ["default", "type-2", "int8", "mixing"])
def test_only_copies_touch_the_history_and_nothing_is_larger_than_the_state(device, name):
    p = problem(2, 40 * BLOCK, slowest=0.99)
    state = on_host(SOLVERS[name]).init(p.z0, rtol=0.0, backend="torch")
    for k in range(8):
        f = pull(state.z, *p.args)
        with Watch(state.ws.history) as seen:
            state.step(f)
        assert seen.touched <= {"aten.copy_.default", "aten.zero_.default"}, seen.touched
        assert k == 0 or "aten.copy_.default" in seen.touched
        if k:  # the iterates in place; at the first step places for two pieces are made besides
            assert seen.largest <= p.z0.numel()
            assert seen.largest >= 2 * PIECE
    own = [t for t in state.ws.tensors().values() if t is not state.ws.history]
    assert max(t.numel() for t in own) <= p.z0.numel() < state.ws.history.numel() / 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_narrow_history_is_not_widened_as_a_whole(narrow, dtype):
    p = problem(2, 40 * BLOCK, slowest=0.99)
    state = dq.Anderson(m=4, history_dtype=dtype).init(p.z0, rtol=0.0, backend="torch")
    assert isinstance(state.bound, StreamedStep) and not isinstance(state.ws, HostedWorkspace)
    for _ in range(5):
        f = pull(state.z, *p.args)
        with Watch(state.ws.history) as seen:
            state.step(f)
        assert seen.largest <= p.z0.numel()


def test_a_history_that_is_wide_or_small_is_stepped_as_a_whole(monkeypatch):
    z0 = torch.zeros(2, 4 * BLOCK)
    for solver in (dq.Anderson(), dq.Anderson(history_dtype=torch.float32), dq.Picard()):
        assert not isinstance(solver.init(z0, backend="torch").bound, StreamedStep)
    monkeypatch.setattr(streamed, "WIDE_MOST", 2 * 10 * z0.nbytes - 1)
    assert isinstance(dq.Anderson().init(z0, backend="torch").bound, StreamedStep)
    assert not isinstance(dq.Anderson(history_dtype=torch.float32).init(z0, backend="torch").bound, StreamedStep)
    monkeypatch.setattr(streamed, "WIDE_MOST", 2 * 10 * z0.nbytes)
    assert not isinstance(dq.Anderson().init(z0, backend="torch").bound, StreamedStep)


NARROW = [name for name in OPTIONS if "history" in name]


@pytest.mark.parametrize("size", [(17, 33), (3, 4097), (2, 70_000)], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_piecewise_steps_agree_with_the_formulas(narrow, name, size):
    check_step(OPTIONS[name], torch.float32, *size, "torch", steps=8)


@needs_native
@pytest.mark.parametrize("solver", [SOLVERS["default"], dq.Anderson(m=4, type=2, history_dtype=torch.int8)])
def test_another_backend_takes_up_what_was_read_piece_by_piece(narrow, solver):
    p = problem(3, 3 * BLOCK + 9, slowest=0.95, dtype=F64)
    state = solver.init(p.z0, rtol=0.0, backend="torch")
    for _ in range(6):
        state.step(pull(state.z, *p.args))
    others = [solver.init(p.z0, rtol=0.0, backend=backend) for backend in ("native", "reference")]
    for other in others:
        other.load_state_dict(state.state_dict())
    for _ in range(3):
        for each in (state, *others):
            each.step(pull(each.z, *p.args))
        for other in others:
            assert_alike(other, state)


def test_a_residual_of_ones_own_is_minimised_beside_a_large_narrow_history(narrow):
    p = problem(3, 300, slowest=0.9, dtype=F64)
    solver = SOLVERS["type-2"]
    states = [solver.init(p.z0, rtol=1e-5, max_iter=30, backend=backend) for backend in ("torch", "reference")]
    assert isinstance(states[0].bound, StreamedStep)
    for _ in range(6):
        for state in states:
            f = pull(state.z, *p.args)
            state.step(f, residual=(f - state.z) * 2)
        assert_alike(*states)


# ---- copies that run ahead ----


class Stream:
    """A stream that writes down what is ordered on it."""

    log: list[tuple[Any, ...]]

    def __init__(self, name: str) -> None:
        self.name = name

    def record_event(self) -> int:
        Stream.log.append(("record", self.name))
        return len(Stream.log) - 1

    def wait_event(self, event: int) -> None:
        Stream.log.append(("wait", self.name, event))


class Streams:
    """torch's module of a device with streams."""

    current = Stream("main")

    def Stream(self, device: Any) -> Stream:  # noqa: N802
        return Stream("copies")

    def current_stream(self, device: Any) -> Stream:
        return Streams.current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Any:
        Stream.log.append(("on", stream.name))
        yield
        Stream.log.append(("off", stream.name))


def test_a_piece_is_used_when_it_is_there_and_its_place_filled_when_it_is_free(device, monkeypatch):
    monkeypatch.setattr(Stream, "log", [], raising=False)
    monkeypatch.setattr(link, "streams_of", lambda device_type: Streams())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    filled = Link._copy
    monkeypatch.setattr(
        Link,
        "_copy",
        lambda self, piece, kinds, count, place: (
            Stream.log.append(("fill", place)),
            filled(self, piece, kinds, count, place),
        )[1],
    )
    p = problem(1, 10 * BLOCK)
    state = on_host(dq.Anderson(m=4)).init(p.z0, rtol=0.0, backend="torch")
    ws = state.ws
    ws.history.copy_(torch.arange(ws.history.numel()).view_as(ws.history) % 128)
    place = 0
    for piece, columns in Link(ws).read((0, 1), 3):
        Stream.log.append(("use", place))
        for kind, found in enumerate(columns):
            assert torch.equal(found, ws.piece(kind, piece)[:3])
        place = 1 - place
    log = Stream.log
    fills = [i for i, entry in enumerate(log) if entry[0] == "fill"]
    uses = [i for i, entry in enumerate(log) if entry[0] == "use"]
    assert len(fills) == len(uses) == len(ws.pieces) == 5
    for k, (fill, use) in enumerate(zip(fills, uses, strict=True)):
        assert log[fill][1] == log[use][1] == k % 2
        waits = [entry[2] for entry in log[:use] if entry[:2] == ("wait", "main")]
        assert waits and log[waits[-1]] == ("record", "copies") and fill < waits[-1]
        if k:
            assert fills[k] < uses[k - 1] or k == 0  # one piece ahead
        freed = [entry[2] for entry in log[:fill] if entry[:2] == ("wait", "copies")][-1]
        assert log[freed] == ("record", "main") and (k < 2 or freed > uses[k - 2])
    assert bool((ws.int_row(Int.STATUS) == 0).all())


def test_a_whole_solve_goes_through_the_streams(device, monkeypatch):
    p = problem(2, 5 * BLOCK, slowest=0.9)
    solver = on_host(dq.Anderson(m=4))
    expected = solve(p, solver=solver, rtol=1e-5)
    monkeypatch.setattr(Stream, "log", [], raising=False)
    monkeypatch.setattr(link, "streams_of", lambda device_type: Streams())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    found = solve(p, solver=solver, rtol=1e-5)
    assert same_bits(found.z, expected.z) and Stream.log


def test_numbers_are_read_when_they_are_asked_for():
    assert Later(torch.tensor([[3, 4]])).read() == [3, 4]
    assert Later(torch.tensor([True])) and not Later(torch.tensor([False]))


# ---- pieces ----


@pytest.mark.parametrize("sizes", [[1], [7, 0, 5000], [BLOCK], [3 * BLOCK + 1, 2], [10 * BLOCK]], ids=str)
@pytest.mark.parametrize("B", [0, 1, 5, 300])
def test_pieces_cover_every_number_once(B, sizes):
    layout = Layout([torch.zeros(B, n) for n in sizes])
    pieces = hosted.cut(layout, PIECE)
    seen = torch.zeros(B, layout.N, dtype=torch.int32)
    blocks = torch.zeros(B, sum(-(-n // BLOCK) for n in sizes), dtype=torch.int32)
    start = 0
    for piece in pieces:
        seen[piece.rows, piece.numbers] += 1
        blocks[piece.rows, piece.blocks] += 1
        assert piece.inside.start % BLOCK == 0 and piece.start == start
        assert piece.shape[0] * piece.shape[1] <= PIECE
        start += piece.shape[0] * piece.shape[1]
    assert start == B * layout.N and bool((seen == 1).all()) and bool((blocks == 1).all())


# ---- what is refused ----


def test_what_cannot_be_is_refused(device, monkeypatch):
    z0 = torch.zeros(2, 30)
    with pytest.raises(
        ValueError, match=r"history_device must be None or 'cpu', got 'cuda'|one of .*'cpu'.*got 'cuda'"
    ):
        dq.Anderson(history_device="cuda")
    solver = dq.Anderson(history_device="cpu", type=2)
    for backend in ("native", "reference"):
        with pytest.raises(
            ValueError, match=rf"history_device='cpu' needs backend='auto' or 'torch', got backend='{backend}'"
        ):
            solver.init(z0, backend=backend)
    monkeypatch.setenv("DEQFAST_BACKEND", "reference")
    with pytest.raises(ValueError, match=r"got DEQFAST_BACKEND='reference'"):
        dq.fixed_point(torch.cos, z0, solver=solver)
    monkeypatch.delenv("DEQFAST_BACKEND")
    state = solver.init(z0)
    with pytest.raises(ValueError, match=r"residual cannot be given with history_device='cpu'"):
        state.step(torch.cos(state.z), residual=torch.ones(2, 30))
    with pytest.raises(ValueError, match=r"history_device does not go together with backward=dq.Unroll\(\)"):
        dq.fixed_point(torch.cos, z0, solver=solver, backward=dq.Unroll())
    with pytest.raises(TypeError, match="history_device"):
        dq.Broyden(history_device="cpu")


def test_a_state_in_the_hosts_memory_is_refused():
    with pytest.raises(
        ValueError, match=r"history_device='cpu' is for a state on a device .* got one on cpu; history_dtype="
    ):
        dq.fixed_point(torch.cos, torch.zeros(2, 3), solver=dq.Anderson(history_device="cpu"))


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_a_history_that_does_not_fit_is_named_with_its_size_and_the_ways_out(monkeypatch, said):
    def full(shape: Any, dtype: Any, device: Any) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(pool, "empty", full)
    text = (
        r"no room for the history of Anderson\(m=10.* for 4 samples of 50000000 numbers: keep fewer columns .*"
        r"history_dtype=torch.bfloat16, torch.int8.*history_device='cpu'.*; "
        r"it takes 8.0 GB \(2 x 4 x 10 x 50000000 numbers of torch.bfloat16\)"
    )
    z0 = torch.zeros(1, 1).expand(4, 50_000_000)
    with pytest.raises(torch.OutOfMemoryError, match=text):
        grouped_workspace(z0)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"Broyden\(.*it takes 0.0 GB \(2 x 5 x 3 numbers of torch.float32\)"
    ):
        dq.fixed_point(torch.cos, torch.zeros(2, 3), solver=dq.Broyden(memory=5))


def grouped_workspace(z0: Tensor) -> None:
    """Anderson's workspace, whose iterates take no memory."""
    from deqfast.ops import grouped, workspace

    layout = Layout(z0)
    empty = workspace.Memory.iterates
    try:
        workspace.Memory.iterates = lambda self, layout: ([], [], [])
        grouped.workspace_of(dq.Anderson(), layout, workspace.Stopping(1e-3))
    finally:
        workspace.Memory.iterates = empty


def test_another_error_of_the_allocator_is_left_alone(monkeypatch):
    def broken(shape: Any, dtype: Any, device: Any) -> Any:
        raise RuntimeError("no such device")

    monkeypatch.setattr(pool, "empty", broken)
    with pytest.raises(RuntimeError, match="^no such device$"):
        dq.Anderson().init(torch.zeros(2, 3))
