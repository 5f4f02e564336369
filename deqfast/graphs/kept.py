"""Solves recorded as CUDA graphs: ``mode="graph"`` and ``mode="device"``.

A recording owns static memory: a solver state, copies of the tensors in args, and graphs captured once of f and the
solver's step: the first evaluation, a pass of a few evaluations, and what remains of ``max_iter`` after whole passes. A
solve copies its start and args in, replays, and copies the answer out.

    graph    passes are replayed by the host until the count of running samples, read one pass late, is zero.
    device   a WHILE node repeats passes on the GPU; the host launches twice and knows nothing more.

Recordings are kept by what they depend on (``identity`` of f and args, sizes, solver, tolerances, autocast), the
few used last. What cannot be recorded runs in the plain loop, with a ``ModeWarning`` that says why.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from .. import warning
from ..loop.state import SolverState
from . import recorder
from .program import Program
from .recorder import CannotRecord
from .recording import Recording

KEPT = 32  # recordings
NO_ROOM = "there is no memory for a recording beside what is in use: deqfast.graphs.clear() frees the older ones"
NEW_EVERY_TIME = 4  # recordings of one f after which its closure is taken to hold other tensors at every call


class ModeWarning(RuntimeWarning):
    """A solve that was asked for as a CUDA graph ran in the plain loop."""


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
    if recorder.RECORDER.capturing(program.layout.device):
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
    """Say that a solve runs in the plain loop, and why."""
    text = f"mode={mode!r} is not possible here, the solve runs in the plain loop: {reason}"
    warning.warn(text, ModeWarning)


def _find(program: Program, start: list[Tensor]) -> Recording | str:
    device = program.layout.device
    stream = recorder.RECORDER.stream(device) if device.type == "cuda" else 0
    inputs = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in program.inputs)
    options = (program.solver, program.stopping, program.backend)
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
