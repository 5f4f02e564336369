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
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .compiled import Compiled
from .guards import cell_content, identity
from .ops import native
from .ops.lag import capturing
from .ops.layout import Layout
from .state import Solver, SolverState

if TYPE_CHECKING:
    from .implicit import Problem

MODES = ("loop", "graph", "device")
PASS = {"graph": 4, "device": 2}  # evaluations in a pass; even, so that a pass ends in the buffer it began in
KEPT = 32  # recordings
NO_ROOM = "there is no memory for a recording beside what is in use: deqfast.graphs.clear() frees the older ones"
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
    def aside(self, device: torch.device, stream: Any) -> Iterator[None]:
        """Run on ``stream``, in order with the current one; what is captured there must have run there before."""
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            current.wait_stream(stream)

    def random_state(self, device: torch.device) -> Tensor:
        """The state of the generator that f draws from, if it does."""
        return torch.cuda.get_rng_state(device)

    def record(self, run: Callable[[], None], device: torch.device, stream: Any, pool: Any, keep: bool) -> Any:
        """A graph of what ``run`` launches, with ``replay``; ``keep`` it open for a loop on the device."""
        graph = torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            current = torch.cuda.current_stream(device)
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    run()
            finally:
                torch.cuda.set_stream(current)  # a capture that fails at its end leaves its stream behind
        return graph

    def capturing(self, device: torch.device) -> bool:
        """Whether the caller captures a graph of his own."""
        return capturing(device)

    def own_stream(self, device: torch.device) -> Any:
        """A stream for one recording."""
        return torch.cuda.Stream(device)

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
        self.program = replace(program, inputs=[])  # the first caller's tensors are not kept
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
        self.stream = RECORDER.own_stream(device)
        self._copy_in(start, inputs)
        before, versions = RECORDER.random_state(device), [t._version for t in self.inputs]
        with RECORDER.aside(device, self.stream):
            for _ in range(2):  # what a library does at its first and second call only must be over
                f = program.prepare(self.inputs)
                state.restart(self.start)
                for _ in range(min(3, program.max_iter)):
                    state.step(f(state.z))
        if not torch.equal(before, RECORDER.random_state(device)):
            raise CannotRecord("f draws random numbers, and a graph would draw other ones")
        if state.copies_z:
            raise CannotRecord("f writes into the iterate that it is given")
        if versions != [t._version for t in self.inputs]:
            raise CannotRecord("f writes into its args")
        try:
            self._capture(RECORDER.pool())
        except CannotRecord:
            raise
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            raise CannotRecord(f"capturing f failed with {type(error).__name__}: {text}") from error

    def _capture(self, pool: Any) -> None:
        state, on_device = self.state, self.program.mode == "device" and self.passes > 0
        record = functools.partial(RECORDER.record, device=state.layout.device, stream=self.stream, pool=pool)
        self.first = record(self._first, keep=False)
        self.held = state.previous
        self.pass_ = record(lambda: self._go_on(self.steps), keep=on_device) if self.passes else None
        self.last = record(lambda: self._go_on(self.rest), keep=on_device) if self.rest else None
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
_recording = threading.RLock()  # one capture at a time in a process; f may hold a solve of its own


def clear() -> None:
    """Forget every recording, and free its memory."""
    with _lock:
        _kept.clear()


def replayed(program: Program, start: list[Tensor], conclude: Callable[[SolverState, int | Tensor], T]) -> T | None:
    """What ``conclude`` makes of the solved state and the evaluations made.

    None, with a ``ModeWarning``, if the program cannot be recorded. The state belongs to the recording: ``conclude``
    copies what it returns.
    """
    if RECORDER.capturing(program.layout.device):
        warn(program.mode, "a CUDA graph is being captured")
        return None
    with torch.inference_mode(False), torch.no_grad():  # static memory must serve later calls in any mode
        found = _find(program, start)
        if isinstance(found, str):
            warn(program.mode, found)
            return None
        with found.lock:
            return conclude(found.state, found.run(start, program.inputs))


def warn(mode: str, reason: str) -> None:
    """Say that a solve runs in the plain loop, and why; at the line of the caller outside of this package."""
    text = f"mode={mode!r} is not possible here, the solve runs in the plain loop: {reason}"
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "deqfast":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, ModeWarning, stacklevel=level)


def _find(program: Program, start: list[Tensor]) -> Recording | str:
    device = program.layout.device
    stream = RECORDER.stream(device) if device.type == "cuda" else 0
    inputs = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in program.inputs)
    options = (program.solver, program.rtol, program.atol, program.max_iter, program.keep_best, program.backend)
    common = (program.family, inputs, repr(program.layout), device, options, program.mode, stream, _global_choices())
    key = (program.key, common)
    known = _look_up(key)
    if known is not None:
        return known
    with _recording:
        known = _look_up(key)
        if known is not None:
            return known
        with _lock:
            siblings = sum(other[1] == common for other in _kept)
        if siblings >= NEW_EVERY_TIME:
            return "f closes over tensors that are others at every call: hand them over through args"
        made = _record(program, start)
    if made == NO_ROOM:
        return made
    with _lock:
        _kept[key] = made
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return made


def _look_up(key: tuple[Hashable, Hashable]) -> Recording | str | None:
    with _lock:
        known = _kept.get(key)
        if known is not None:
            _kept.move_to_end(key)
        return known


def _record(program: Program, start: list[Tensor]) -> Recording | str:
    try:
        made = Recording(program)
        made.record(start, program.inputs)
        return made
    except CannotRecord as reason:
        return str(reason)
    except torch.OutOfMemoryError:
        return NO_ROOM  # not kept: there may be room another time


def _global_choices() -> Hashable:
    """Settings of torch by which f's operations choose their kernels."""
    attention = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        attention.flash_sdp_enabled(),
        attention.mem_efficient_sdp_enabled(),
        attention.math_sdp_enabled(),
    )


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
    tensors, rebuild, rest, others = split(problem.args, device)

    def prepare(inputs: list[Tensor]) -> Callable[[Any], Any]:
        given = rebuild(inputs)

        def evaluate(z: Any) -> Any:
            with without_cast_cache(device):
                return f(z, *given)

        return evaluate

    return Program(
        prepare=prepare,
        inputs=tensors,
        key=("forward", identity(f, device), rest, autocast_mode(device)),
        family=family(f),
        layout=problem.layout,
        solver=problem.solver,
        rtol=problem.rtol,
        atol=atol,
        max_iter=problem.max_iter,
        keep_best=keep_best,
        backend=problem.backend,
        mode=problem.mode,
        alive=(f, others),
    )


def split(
    args: tuple[Any, ...], device: torch.device
) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Any, ...]], Hashable, Any]:
    """The tensors of args, what puts others in their places, the identity of everything else, and that itself.

    Raises:
        CannotRecord: a tensor that a graph cannot read anew.
    """
    leaves, spec = pytree.tree_flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not _is_number(leaf, device)]
    tensors = [leaves[i] for i in places]
    for t in tensors:
        if t.device != device:
            raise CannotRecord(
                f"args holds a tensor on {t.device}, which a graph does not read again; move it to {device}"
            )
        if t.layout != torch.strided:
            raise CannotRecord(f"args holds a tensor of layout {t.layout}, which has no memory of its own to copy to")
    differentiated = tuple(t.requires_grad for t in tensors)
    others = [None if i in places else leaf for i, leaf in enumerate(leaves)]

    def rebuild(tensors: list[Tensor]) -> tuple[Any, ...]:
        filled = list(others)
        for i, t, wanted in zip(places, tensors, differentiated, strict=True):
            filled[i] = t.detach().requires_grad_(wanted)  # f may take derivatives of its own
        return pytree.tree_unflatten(filled, spec)

    key = (str(spec), tuple(places), differentiated, tuple(identity(leaf, device) for leaf in others))
    return [t.detach() for t in tensors], rebuild, key, others


def _is_number(t: Tensor, device: torch.device) -> bool:
    """Whether operations on ``device`` take ``t`` as a number: it is then part of the key."""
    return t.dim() == 0 and t.device.type == "cpu" and device.type != "cpu"


def family(f: Any) -> Hashable:
    """The same for functions that differ only in which tensors they close over."""
    while isinstance(f, (functools.partial, Compiled)):
        f = f.func if isinstance(f, functools.partial) else f.f
    function = getattr(f, "__func__", f)
    code = getattr(function, "__code__", None)
    if code is None:
        return id(f)
    cells = [cell_content(cell) for cell in function.__closure__ or ()]
    owners = [getattr(f, "__self__", None), *(value for value in cells if isinstance(value, nn.Module))]
    return code, tuple(id(owner) for owner in owners)
