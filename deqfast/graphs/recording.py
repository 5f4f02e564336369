"""One program in static memory: its graphs, captured once and replayed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..loop.again import warn_if_refused
from ..loop.state import SolverState
from ..ops import recheck
from . import recorder
from .program import Program
from .recorder import CannotRecord


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
            program.stopping,
            backend=program.backend,
            layout=layout,
        )
        reason = recorder.RECORDER.why_not(program.mode, self.state)
        if reason is not None:
            raise CannotRecord(reason)
        self.steps = recorder.PASS[program.mode]
        self.passes, self.rest = divmod(program.stopping.max_iter - 1, self.steps)
        self.newest: list[Tensor] = []
        self.made = torch.ones(1, dtype=torch.int32, device=layout.device)

    def record(self, start: list[Tensor], inputs: Sequence[Tensor]) -> None:
        """Run the program for real, as far as its third evaluation, then capture it.

        Raises:
            CannotRecord: with the reason. f's own exceptions pass through from the runs that are not captured.
        """
        state, program = self.state, self.program
        device = program.layout.device
        self.stream = recorder.RECORDER.own_stream(device, self)
        self._copy_in(start, inputs)
        before, versions = recorder.RECORDER.random_state(device), [t._version for t in self.inputs]
        with recorder.RECORDER.aside(device, recorder.RECORDER.side_stream(device)):
            for _ in range(2):  # what a library does at its first and second call only must be over
                f = program.prepare(self.inputs)
                state.restart(self.start)
                for _ in range(min(3, program.stopping.max_iter)):
                    state.step(f(state.z))
        if not torch.equal(before, recorder.RECORDER.random_state(device)):
            raise CannotRecord("f draws random numbers, and a graph would draw other ones")
        if state.copies_z:
            raise CannotRecord("f writes into the iterate that it is given")
        if versions != [t._version for t in self.inputs]:
            raise CannotRecord("f writes into its args")
        try:
            self._capture(recorder.RECORDER.pool())
        except CannotRecord:
            raise
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            raise CannotRecord(f"capturing f failed with {type(error).__name__}: {text}") from error

    def _capture(self, pool: Any) -> None:
        state, on_device = self.state, self.program.mode == "device" and self.passes > 0
        record = functools.partial(recorder.RECORDER.record, device=state.layout.device, stream=self.stream, pool=pool)
        self.first = record(self._first, keep=False)
        self.held = state.previous if state.options.uses_previous else self.newest
        self.pass_ = record(lambda: self._go_on(self.steps), keep=on_device) if self.passes else None
        self.last = record(lambda: self._go_on(self.rest), keep=on_device) if self.rest else None
        self.loop = None
        if on_device:
            limit = self.program.stopping.max_iter
            self.loop = recorder.RECORDER.loop(state.replay, (self.pass_, self.last), self.made, limit)

    def _first(self) -> None:
        self.f = self.program.prepare(self.inputs)  # what it saves for a backward lives in the pool, as long as it does
        self.state.restart(self.start)
        self._step(count=1)

    def _step(self, count: int) -> None:
        """Some evaluations; f's last output is ``newest`` where the solver holds none."""
        state = self.state
        for k in range(count):
            fz = self.f(state.z)
            state.step(fz)
            if k + 1 == count and not state.options.uses_previous:
                leaves = state.layout.flatten(fz, "f(z)")
                self.newest = self.newest or [torch.empty_like(t) for t in leaves]
                for kept, t in zip(self.newest, leaves, strict=True):
                    kept.copy_(t)

    def _go_on(self, count: int) -> None:
        """From where the first evaluation, or an earlier pass, ended to where the next may begin."""
        state = self.state
        state.resume(1, self.held if state.options.uses_previous else None)
        self._step(count)
        previous_ones = state.previous if state.options.uses_previous else self.held
        for held, previous in zip(self.held or [], previous_ones or [], strict=True):
            if held is not previous:
                held.copy_(previous)

    def _copy_in(self, start: list[Tensor], inputs: Sequence[Tensor]) -> None:
        for mine, given in zip([*self.start, *self.inputs], [*start, *inputs], strict=True):
            mine.copy_(given)

    def run(self, start: list[Tensor], inputs: Sequence[Tensor]) -> int | Tensor:
        """Solve; the answer is in ``state``. Returns the evaluations made, from a loop on the device as a tensor."""
        state = self.state
        self._copy_in(start, inputs)
        state.replay.rewind(0)
        self.first.replay()
        made: int | Tensor
        if self.loop is not None:
            self.loop.launch(recorder.RECORDER.stream(self.program.layout.device))
            made = self.made.clone()
        else:
            made = self._replay_passes()
        state.finish(made if isinstance(made, int) else 0)
        if state.layout.B > 1 and self.held:
            which = state.bound.outside(self.held, None, made)
            if which is not None:
                recheck.refuse(state.ws, which)
                if isinstance(made, int):  # the host has waited for the device already
                    warn_if_refused(which, self.program.mode)
        return made

    def _replay_passes(self) -> int:
        made, report = 1, self.state.replay.report
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
