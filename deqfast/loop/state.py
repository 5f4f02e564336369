"""The state of a solve between two evaluations of f."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import compiled
from ..ops import contract, grouped, recheck
from ..ops.codes import Int, Real
from ..ops.layout import Layout
from ..ops.shared import Group
from ..ops.workspace import Stopping, Workspace
from ..status import Status
from . import own_residual
from .answer import answer
from .consensus import together_on
from .origin import EVERY, Origin
from .outputs import Outputs
from .saved import Saved
from .together import never

_NOTHING = contextlib.nullcontext()


class SolverState(Saved):
    """One solve in progress, for a loop of your own.

    ::

        state = dq.Anderson(m=6).init(z0, rtol=1e-4)
        while not state.done:
            state.step(f(state.z))

    Attributes:
        nfe: evaluations of f that have been fed to ``step``.
        wakings: how often samples that had converged had to go on, because f couples samples.
        options: the solver.
        layout: structure and sizes of the state.
    """

    def __init__(
        self,
        options: contract.Method,
        z0: Any,
        stopping: Stopping,
        *,
        backend: str = "auto",
        layout: Layout | None = None,
        together: bool = False,
        limit: int | None = None,
        group: Group | None = None,
    ) -> None:
        self.options = options
        self.layout = Layout(z0) if layout is None else layout
        self._asked_for, self._limit, self._group = backend, limit, group
        rule = never(stopping) if together else stopping
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING:
            self.ws: Workspace = grouped.workspace_of(options, self.layout, rule)
        self._backend = contract.choose(backend, self.layout.device, kind=self.ws.kind)
        self.nfe = 0
        self._running = self.layout.B if self.layout.total else 0
        start = [t.detach() for t in self.layout.tensors(z0)]
        for x, t in zip(self.ws.x[0], start, strict=True):
            x.copy_(t)
        self._own_residual = False
        self.wakings = 0
        self._origin: Origin | None = None
        self._stopping = stopping
        self._together = together_on(self.ws, stopping, 0, group) if together else None
        if self._together is not None and group is not None and not group.spread:
            self._running = 1  # of all ranks
        # Views in the caller's shape, of a state of one tensor.
        self._shown = (
            [self.layout.unflatten(x) for x in self.ws.x] if self.layout.single and self.layout.samples.views else []
        )
        self._showing = False  # while a callback looks, every iterate it asks for is a copy
        self.bound = grouped.bind(self._backend, self.ws, group=group)
        self._outputs = Outputs(self.ws, self.bound, options.uses_previous, start)

    def _bind(self) -> None:
        self.bound = grouped.bind(self._backend, self.ws, self.made, self._group)
        self._outputs.bind(self.bound)

    @property
    def backend(self) -> str:
        """The backend that runs the updates."""
        return self._backend.name

    @property
    @compiled.skip
    def z(self) -> Any:
        """The iterate to evaluate f at, structured like z0; valid until the next step."""
        ws, outputs = self.ws, self._outputs
        if outputs.plain and not self._showing:
            return self._shown[ws.cur]
        x = ws.x[ws.cur]
        if outputs.start and outputs.z_changed():  # by a call of f that did not end in a step
            outputs.restore_z()
        return self.layout.unflatten([t.clone() for t in x] if outputs.copies_z or self._showing else x)

    @property
    @compiled.skip
    def copies_z(self) -> bool:
        """Whether f was seen to write into the iterate it is given, so that it gets copies."""
        return self._outputs.copies_z

    @property
    @compiled.skip
    def done(self) -> bool:
        """True when no sample is known to run any more.

        On a GPU that becomes known up to two steps late, without waiting for the device; surplus steps change nothing.
        """
        return self._running == 0

    @property
    @compiled.skip
    def known_running(self) -> int:
        """How many samples still ran when the host last heard: exact on a CPU, else that many or fewer run now."""
        return self._running

    @compiled.skip
    def failed(self) -> int:
        """How many samples ended without having converged; waits for the device, and knows nothing under capture."""
        return self.bound.failed()

    @property
    @compiled.skip
    def running(self) -> Tensor:
        """(B,) bool: samples that have not stopped."""
        return self.status == int(Status.RUNNING)

    @property
    @compiled.skip
    def status(self) -> Tensor:
        """(B,) int32 of ``Status``."""
        return self.layout.counted(self.ws.int_row(Int.STATUS))

    @property
    @compiled.skip
    def steps(self) -> Tensor:
        """(B,) int32: evaluations each sample has used."""
        return self.layout.counted(self.ws.steps())

    @property
    @compiled.skip
    def residual(self) -> Tensor:
        """(B,) relative residual ||f(z) - z|| / ||f(z)|| at each sample's newest evaluation."""
        return self.layout.counted(self.ws.real_row(Real.RESIDUAL))

    @compiled.skip
    def step(self, fz: Any, residual: Any = None) -> bool:
        """Take f at ``z``, move to the next iterate; returns ``done``.

        When the last sample stops, those that had converged before are judged at this evaluation too: where f couples
        samples, some may have to go on.

        Args:
            fz: f(state.z), structured like z0. It is read in place and kept until the next step.
            residual: a residual of your own, a tensor or tree of tensors (B, ...), possibly in another space than z:
                the weights minimise it and a sample stops at ||residual|| <= atol + rtol ||f(z)||. Type II Anderson
                without mixing; give it at every step or at none. With backend="auto" the first residual moves the
                state to a backend that takes one, and ``backend`` says so.

        Raises:
            TypeError, ValueError: ``fz`` has another structure, shape, dtype or device, or ``residual`` cannot be used;
                the state is as before.
        """
        if residual is not None or self._own_residual:
            return self._step_with_residual(fz, residual)
        if self._group is not None:
            return self.advance(self.layout.flatten(fz, "f(z)"), None)
        if self._outputs.plain and fz.__class__ is Tensor and self._running:
            running = self._outputs.quick(fz)
            if running is not None:
                self.ws.cur ^= 1
                self.nfe += 1
                if running and self._together is None and self.nfe % EVERY and self.nfe != self._limit:
                    self._running = running
                    return False
                return self._close(running, self.layout.tensors(fz), None)
        return self.advance(self.layout.flatten(fz, "f(z)"), None)

    @compiled.skip
    def advance(self, leaves: list[Tensor], rows: Tensor | None) -> bool:
        """``step`` for checked leaves; ``rows`` maps samples to rows of the leaves, -1 for dropped samples."""
        if self._running == 0:
            return True
        if self._together is not None and self._together.over():
            self._running = 0
            return True
        running = self._outputs.careful(leaves, rows, self.nfe)
        self.ws.cur ^= 1
        self.nfe += 1
        return self._close(running, self._outputs.newest, rows)

    def _close(self, running: int, leaves: list[Tensor], rows: Tensor | None) -> bool:
        """After a step of the kernels that left so many samples running, from f's ``leaves``; returns ``done``."""
        if self.nfe == 1 and self.ws.before:
            recheck.begin(self.ws)
        if self._together is not None:
            running = self._together.look(running)
        elif running == 0 and not (self.bound.exact and self._running == self.layout.B):
            running = self._again(leaves, rows)  # where every sample ran until now nobody can have converged before
        self._running = running
        if running and not self.nfe % EVERY and (self._stopping.rtol or self._stopping.atol):
            self._origin = self._origin or Origin(self.ws)
            if self._origin.look():
                self._outputs.note_versions()
        if self.nfe == self._limit:
            self._running = 0
        return self._running == 0

    def _step_with_residual(self, fz: Any, residual: Any) -> bool:
        if self._group is not None and self._group.spread:
            raise ValueError("residual cannot be given where ranks share every sample: no kernel adds it up over them")
        first = self.nfe == 0 or self._own_residual
        backend, ws, rows = own_residual.taken(self.ws, self.options, residual, first, self._backend, self._asked_for)
        leaves = self.layout.flatten(fz, "f(z)")
        self._serve_residual(backend)
        ws.set_residual(rows)
        return self.advance(leaves, None)

    def _serve_residual(self, backend: contract.Backend) -> None:
        self._own_residual = True
        if backend is not self._backend:
            self._backend = backend
            self._bind()

    @compiled.skip
    def answer(self, returns: str = "best") -> tuple[list[Tensor], Tensor]:
        """Leaves of the returned iterate and its (B,) relative residual; samples still running are read, not moved."""
        return answer(self.ws, returns, self.some_run)

    def show(self, callback: Callable[[int, SolverState], bool | None]) -> bool:
        """Call ``callback(nfe, self)``, with every iterate it asks for a copy; returns whether it said stop."""
        self._showing = True
        try:
            return bool(callback(self.nfe, self))
        finally:
            self._showing = False

    @compiled.skip
    def evaluated(self) -> Any:
        """A copy of the iterate at which f was last evaluated, structured like z0."""
        ws = self.ws
        return self.layout.unflatten([t.clone() for t in ws.x[1 - ws.cur if self.nfe else ws.cur]])

    def release(self) -> None:
        """Give the history back for the next solve; answers can still be read, steps no longer made."""
        self._running = 0
        self.bound = _Released(self.ws)
        self._outputs.end(self.bound)
        self.ws.release()


class _Released(contract.BoundStep):
    """What is left when the history was given back."""

    def __call__(self, *_: object) -> int:
        raise RuntimeError("this solve has ended and its history was given back")
