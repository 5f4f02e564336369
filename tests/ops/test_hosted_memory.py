"""What is on a device whose columns are elsewhere, or are read piece by piece where they are; and what is refused."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from problems import needs_native, problem, pull, same_bits, solve
from test_anderson import OPTIONS, check_step
from test_hosted import F64, SOLVERS, assert_alike, hosted_memory, on_host
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as leaves

import deqfast as dq
from deqfast.ops import grouped, hosted, pool
from deqfast.ops.codes import BLOCK
from deqfast.ops.hosted import HostedWorkspace
from deqfast.ops.lag import Later
from deqfast.ops.layout import Layout
from deqfast.ops.plain import link, stores, streamed
from deqfast.ops.plain.link import Link
from deqfast.ops.plain.streamed import StreamedStep
from deqfast.ops.workspace import Memory, Stopping

pytestmark = pytest.mark.host

PIECE = 2 * BLOCK  # of conftest.py


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
            assert_alike([other, state])


def test_a_residual_of_ones_own_is_minimised_beside_a_large_narrow_history(narrow):
    p = problem(3, 300, slowest=0.9, dtype=F64)
    solver = SOLVERS["type-2"]
    states = [solver.init(p.z0, rtol=1e-5, max_iter=30, backend=backend) for backend in ("torch", "reference")]
    assert isinstance(states[0].bound, StreamedStep)
    for _ in range(6):
        for state in states:
            f = pull(state.z, *p.args)
            state.step(f, residual=(f - state.z) * 2)
        assert_alike(states)


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

    def current_stream(self, device: Any) -> Stream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Any:
        Stream.log.append(("on", stream.name))
        yield
        Stream.log.append(("off", stream.name))


setattr(Streams, Stream.__name__, lambda self, device: Stream("copies"))


@pytest.fixture
def streams(device, monkeypatch):
    """The device has streams; places of copies are noted, too."""
    monkeypatch.setattr(Stream, "log", [], raising=False)
    monkeypatch.setattr(link, "streams_of", lambda device_type: Streams())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    copy = Link._copy

    def noted(self: Link, piece: Any, kinds: Any, count: int, place: int) -> Any:
        Stream.log.append(("fill", place))
        return copy(self, piece, kinds, count, place)

    monkeypatch.setattr(Link, "_copy", noted)


def test_a_piece_is_used_when_it_is_there_and_its_place_filled_when_it_is_free(streams):
    p = problem(1, 10 * BLOCK)
    ws = hosted_memory(on_host(dq.Anderson(m=4)).init(p.z0, rtol=0.0))
    ws.history.copy_(torch.arange(ws.history.numel()).view_as(ws.history) % 128)
    for number, (piece, columns) in enumerate(Link(ws).read((0, 1), 3)):
        Stream.log.append(("use", number % 2))
        for kind, found in enumerate(columns):
            assert torch.equal(found, ws.piece(kind, piece)[:3])
    log = Stream.log
    fills, uses = ([i for i, entry in enumerate(log) if entry[0] == name] for name in ("fill", "use"))
    assert len(fills) == len(uses) == len(ws.pieces) == 5
    for k, (fill, use) in enumerate(zip(fills, uses, strict=True)):
        assert log[fill][1] == log[use][1] == k % 2
        arrived = [entry[2] for entry in log[:use] if entry[:2] == ("wait", "main")][-1]
        assert log[arrived] == ("record", "copies") and fill < arrived
        free = [entry[2] for entry in log[:fill] if entry[:2] == ("wait", "copies")][-1]
        assert log[free] == ("record", "main") and (k < 2 or free > uses[k - 2])
        assert k == 0 or fill < uses[k - 1]  # while the piece before is worked on


def test_a_whole_solve_goes_through_the_streams(streams, monkeypatch):
    p = problem(2, 5 * BLOCK, slowest=0.9)
    solver = on_host(dq.Anderson(m=4))
    found = solve(p, solver=solver, rtol=1e-5)
    assert len([entry for entry in Stream.log if entry[0] == "fill"]) > found.nfe
    monkeypatch.setattr(link, "streams_of", lambda device_type: None)
    assert same_bits(found.z, solve(p, solver=solver, rtol=1e-5).z)


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
        assert math.prod(piece.shape) <= PIECE
        start += math.prod(piece.shape)
    assert start == B * layout.N and bool((seen == 1).all()) and bool((blocks == 1).all())


# ---- what is refused ----


def test_what_cannot_be_is_refused(device, monkeypatch):
    z0 = torch.zeros(2, 30)
    with pytest.raises(ValueError, match=r"history_device must be .*'cpu'.* got 'cuda'"):
        dq.Anderson(history_device="cuda")
    solver = dq.Anderson(history_device="cpu", type=2)
    for backend in ("native", "reference"):
        expected = rf"history_device='cpu' needs backend='auto' or 'torch', got backend='{backend}'"
        with pytest.raises(ValueError, match=expected):
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
        dq.Broyden(**{"history_device": "cpu"})


def test_steps_in_which_the_host_takes_part_are_not_captured(device, monkeypatch):
    p = problem(2, 30)
    state = on_host(dq.Anderson(m=3)).init(p.z0, rtol=0.0)
    state.step(pull(state.z, *p.args))
    monkeypatch.setattr(stores, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"a CUDA graph cannot hold steps with history_device='cpu'"):
        state.step(pull(state.z, *p.args))


def test_a_state_in_the_hosts_memory_is_refused():
    expected = r"history_device='cpu' is for a state on a device .* got one on cpu; history_dtype="
    with pytest.raises(ValueError, match=expected):
        dq.fixed_point(torch.cos, torch.zeros(2, 3), solver=dq.Anderson(history_device="cpu"))


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_a_history_that_does_not_fit_is_named_with_its_size_and_the_ways_out(monkeypatch, said):
    def full(shape: Any, dtype: Any, device: Any) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(pool, "empty", full)
    monkeypatch.setattr(Memory, "iterates", lambda self, layout: ([], [], []))
    text = (
        r"no room for the history of Anderson\(m=10.* for 4 samples of 50000000 numbers: keep fewer columns .*"
        r"history_dtype=torch.bfloat16, torch.int8.*history_device='cpu'.*; "
        r"it takes 8.0 GB \(2 x 4 x 10 x 50000000 numbers of torch.bfloat16\). " + said[:10]
    )
    with pytest.raises(torch.OutOfMemoryError, match=text):
        grouped.workspace_of(dq.Anderson(), Layout(torch.zeros(1, 1).expand(4, 50_000_000)), Stopping(1e-3))
    with pytest.raises(torch.OutOfMemoryError, match=r"Broyden\(.*it takes 0.0 GB \(2 x 5 x 3 numbers of torch.float"):
        dq.fixed_point(torch.cos, torch.zeros(2, 3), solver=dq.Broyden(memory=5))


def test_another_error_of_the_allocator_is_left_alone(monkeypatch):
    def broken(shape: Any, dtype: Any, device: Any) -> Any:
        raise RuntimeError("no such device")

    monkeypatch.setattr(pool, "empty", broken)
    with pytest.raises(RuntimeError, match=r"^no such device$"):
        dq.Anderson().init(torch.zeros(2, 3))
