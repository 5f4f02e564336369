"""Solves recorded as CUDA graphs: ``mode="graph"`` and ``mode="device"``.

A recording owns static memory: a solver state, copies of the tensors in args, and graphs captured once of f and the
solver's step: the first evaluation, a pass of a few evaluations, and what remains of ``max_iter`` after whole passes. A
solve copies its start and args in, replays, and copies the answer out.

    graph    passes are replayed by the host until the count of running samples, read one pass late, is zero.
    device   a WHILE node repeats passes on the GPU; the host launches twice and knows nothing more.

Recordings are kept by what they depend on (``guards.identity`` of f and args, sizes, solver, tolerances, autocast), the
few used last. What cannot be recorded runs in the plain loop, with a ``ModeWarning`` that says why.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .compiled import Compiled
from .guards import identity
from .ops import native
from .ops.layout import Layout
from .state import Solver, SolverState

if TYPE_CHECKING:
    from .implicit import Problem

MODES = ("loop", "graph", "device")
PASS = {"graph": 4, "device": 2}  # evaluations in a pass; even, so that a pass ends in the buffer it began in
KEPT = 8  # recordings
NEW_EVERY_TIME = 4  # recordings of one f after which its closure is taken to hold other tensors at every call


class ModeWarning(RuntimeWarning):
    """A solve that was asked for as a CUDA graph ran in the plain loop."""


class CannotRecord(Exception):
    """Why a solve cannot be a CUDA graph."""


@dataclass
class Program:
    """What is recorded.

    ``prepare``: called once a solve with the static inputs, before the first evaluation; returns the f of the solve.
    """

    prepare: Callable[[list[Tensor]], Callable[[Any], Any]]
    inputs: list[Tensor]  # copied into static memory at every solve, and handed to ``prepare``
    key: Hashable  # beside the inputs' layout
    family: Hashable  # of programs that differ only in what f closes over
    layout: Layout
    solver: Solver
    rtol: float
    atol: float
    max_iter: int
    keep_best: bool
    backend: str
    mode: str
    alive: Any = None  # whatever the key speaks of


class Recorder:
    """Capturing and replaying on a CUDA device."""

    def why_not(self, mode: str, state: SolverState) -> str | None:
        """Why solves like ``state`` cannot be recorded, or None."""
        device = state.layout.device
        if device.type != "cuda":
            return f"device {device} has no graphs"
        if not hasattr(state.update, "report"):
            return f"the {state.backend} backend waits for the device at every step"
        if mode == "device":
            if state.backend != "native":
                return f"a loop on the device needs the native backend, this solve runs on {state.backend}"
            return native._C.why_no_device_loop() or None
        return None

    @contextlib.contextmanager
    def aside(self, device: torch.device) -> Any:
        """A stream beside the current one, in order with it; what is captured must have run there before."""
        current = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)

    def random_state(self, device: torch.device) -> Tensor:
        """The state of the generator that f draws from, if it does."""
        return torch.cuda.get_rng_state(device)

    def record(self, run: Callable[[], None], pool: Any, keep: bool) -> Any:
        """A graph of what ``run`` launches, with ``replay``; ``keep`` it open for a loop on the device."""
        graph = torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
        return graph

    def pool(self) -> Any:
        """Memory that the graphs of one recording share."""
        return torch.cuda.graph_pool_handle()

    def loop(self, state: SolverState, parts: tuple[Any, Any], made: Tensor, limit: int) -> Any:
        """The loop on the device over a pass and the rest, with ``launch(stream)``."""
        for part in parts:
            found = "" if part is None else native._C.node_not_allowed(part.raw_cuda_graph())
            if found:
                raise CannotRecord(f"f launches {found}, which cannot stand in a loop on the device")
        raw = [0 if part is None else part.raw_cuda_graph() for part in parts]
        running = state.update.running.data_ptr()
        index = state.layout.device.index
        return native._C.DeviceLoop(index, *raw, PASS["device"], running, made.data_ptr(), limit)

    def stream(self, device: torch.device) -> int:
        """The current stream as a number."""
        return torch.cuda.current_stream(device).cuda_stream


RECORDER = Recorder()


class Recording:
    """One program in static memory."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.lock = threading.Lock()
        self.inputs = [torch.empty_like(t) for t in program.inputs]
        layout = program.layout
        self.start = layout.empty()
        self.state = SolverState(
            program.solver,
            layout.unflatten(self.start),
            rtol=program.rtol,
            atol=program.atol,
            max_iter=program.max_iter,
            keep_best=program.keep_best,
            backend=program.backend,
            layout=layout,
        )
        reason = RECORDER.why_not(program.mode, self.state)
        if reason is not None:
            raise CannotRecord(reason)
        self.steps = PASS[program.mode]
        self.passes, self.rest = divmod(program.max_iter - 1, self.steps)
        self.made = torch.ones(1, dtype=torch.int32, device=layout.device)

    def record(self, start: list[Tensor], inputs: Sequence[Tensor]) -> None:
        """Run the program for real, as far as its third evaluation, then capture it.

        Raises:
            CannotRecord: with the reason. f's own exceptions pass through from the runs that are not captured.
        """
        state, program = self.state, self.program
        device = program.layout.device
        self._copy_in(start, inputs)
        before = RECORDER.random_state(device)
        with RECORDER.aside(device):
            for _ in range(2):  # what a library does at its first and second call only must be over
                f = program.prepare(self.inputs)
                state.restart(self.start)
                for _ in range(min(3, program.max_iter)):
                    state.step(f(state.z))
        if not torch.equal(before, RECORDER.random_state(device)):
            raise CannotRecord("f draws random numbers, and a graph would draw other ones")
        if state.copies_z:
            raise CannotRecord("f writes into the iterate that it is given")
        try:
            self._capture(RECORDER.pool())
        except CannotRecord:
            raise
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            raise CannotRecord(f"capturing f failed with {type(error).__name__}: {text}") from error

    def _capture(self, pool: Any) -> None:
        state, on_device = self.state, self.program.mode == "device" and self.passes > 0
        self.first = RECORDER.record(self._first, pool, False)
        self.held = state.previous
        self.pass_ = RECORDER.record(lambda: self._go_on(self.steps), pool, on_device) if self.passes else None
        self.last = RECORDER.record(lambda: self._go_on(self.rest), pool, on_device) if self.rest else None
        self.loop = None
        if on_device:
            self.loop = RECORDER.loop(state, (self.pass_, self.last), self.made, self.program.max_iter)

    def _first(self) -> None:
        self.f = self.program.prepare(self.inputs)  # what it saves for a backward lives in the pool, as long as it does
        self.state.restart(self.start)
        self.state.step(self.f(self.state.z))

    def _go_on(self, count: int) -> None:
        """From where the first evaluation, or an earlier pass, ended to where the next may begin."""
        state = self.state
        state.resume(1, self.held)
        for _ in range(count):
            state.step(self.f(state.z))
        for held, previous in zip(self.held or [], state.previous or [], strict=True):
            if held is not previous:
                held.copy_(previous)

    def _copy_in(self, start: list[Tensor], inputs: Sequence[Tensor]) -> None:
        for mine, given in zip([*self.start, *self.inputs], [*start, *inputs], strict=True):
            mine.copy_(given)

    def run(self, start: list[Tensor], inputs: Sequence[Tensor]) -> int | Tensor:
        """Solve; the answer is in ``state``. Returns the evaluations made, from a loop on the device as a tensor."""
        state = self.state
        self._copy_in(start, inputs)
        state.update.rewind(0)
        self.first.replay()
        made: int | Tensor
        if self.loop is not None:
            self.loop.launch(RECORDER.stream(self.program.layout.device))
            made = self.made.clone()
        else:
            made = self._replay_passes()
        state.finish(made if isinstance(made, int) else 0)
        return made

    def _replay_passes(self) -> int:
        made, report = 1, self.state.update.report
        for _ in range(self.passes):
            assert self.pass_ is not None
            self.pass_.replay()
            made += self.steps
            if report(1) == 0:
                return made
        if self.last is not None:
            self.last.replay()
            made += self.rest
        report(2)  # for whoever asks how many failed; this one does not wait for what was launched last
        return made


T = TypeVar("T")
_kept: OrderedDict[tuple[Hashable, Hashable], Recording | str] = OrderedDict()
_lock = threading.Lock()


def clear() -> None:
    """Forget every recording, and free its memory."""
    with _lock:
        _kept.clear()


def replayed(program: Program, start: list[Tensor], conclude: Callable[[SolverState, int | Tensor], T]) -> T | None:
    """What ``conclude`` makes of the solved state and the evaluations made.

    None, with a ``ModeWarning``, if the program cannot be recorded. The state belongs to the recording: ``conclude``
    copies what it returns.
    """
    with torch.no_grad():
        found = _find(program, start)
        if isinstance(found, str):
            warn(program.mode, found)
            return None
        with found.lock:
            return conclude(found.state, found.run(start, program.inputs))


def warn(mode: str, reason: str) -> None:
    """Say that a solve runs in the plain loop, and why."""
    text = f"mode={mode!r} is not possible here, the solve runs in the plain loop: {reason}"
    warnings.warn(text, ModeWarning, stacklevel=5)


def _find(program: Program, start: list[Tensor]) -> Recording | str:
    device = program.layout.device
    stream = RECORDER.stream(device) if device.type == "cuda" else 0
    inputs = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in program.inputs)
    options = (program.solver, program.rtol, program.atol, program.max_iter, program.keep_best, program.backend)
    common = (program.family, inputs, repr(program.layout), device, options, program.mode, stream)
    key = (program.key, common)
    with _lock:
        known = _kept.get(key)
        if known is not None:
            _kept.move_to_end(key)
            return known
        siblings = sum(other[1] == common for other in _kept)
    made: Recording | str
    if siblings >= NEW_EVERY_TIME:
        return "f closes over tensors that are others at every call: hand them over through args"
    try:
        made = Recording(program)
        made.record(start, program.inputs)
    except CannotRecord as reason:
        made = str(reason)
    with _lock:
        _kept[key] = made
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return made


def autocast_mode(device: torch.device) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for ``device``, and its dtype."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


@contextlib.contextmanager
def without_cast_cache(device: torch.device) -> Iterator[None]:
    """Autocast as it is, but with parameters cast anew at every use: a cast made once is not part of a graph."""
    enabled, dtype = autocast_mode(device)
    with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False) if enabled else _NOTHING:
        yield


_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def forward_program(problem: Problem, atol: float, *, keep_best: bool) -> Program:
    """The program of a solve of z = f(z, *args)."""
    if problem.transformed:
        raise CannotRecord("a torch.func transform or forward mode surrounds the call")
    f, device = problem.f, problem.layout.device
    tensors, rebuild, rest = split(problem.args)

    def prepare(inputs: list[Tensor]) -> Callable[[Any], Any]:
        given = rebuild(inputs)

        def evaluate(z: Any) -> Any:
            with without_cast_cache(device):
                return f(z, *given)

        return evaluate

    return Program(
        prepare=prepare,
        inputs=tensors,
        key=("forward", identity(f), rest, autocast_mode(device)),
        family=family(f),
        layout=problem.layout,
        solver=problem.solver,
        rtol=problem.rtol,
        atol=atol,
        max_iter=problem.max_iter,
        keep_best=keep_best,
        backend=problem.backend,
        mode=problem.mode,
        alive=(f, problem.args),
    )


def split(args: tuple[Any, ...]) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Any, ...]], Hashable]:
    """The tensors of args, what puts others in their places, and the identity of everything else."""
    leaves, spec = pytree.tree_flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    differentiated = tuple(leaves[i].requires_grad for i in places)

    def rebuild(tensors: list[Tensor]) -> tuple[Any, ...]:
        filled = list(leaves)
        for i, t, wanted in zip(places, tensors, differentiated, strict=True):
            filled[i] = t.detach().requires_grad_(wanted)  # f may take derivatives of its own
        return pytree.tree_unflatten(filled, spec)

    others = tuple(identity(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
    return [leaves[i].detach() for i in places], rebuild, (str(spec), tuple(places), differentiated, others)


def family(f: Any) -> Hashable:
    """The same for functions that differ only in what they close over."""
    while isinstance(f, (functools.partial, Compiled)):
        f = f.func if isinstance(f, functools.partial) else f.f
    return getattr(getattr(f, "__func__", f), "__code__", None) or id(f)
