"""Solves that go on: beyond their limit, under a map that has changed, or where f is seen to couple samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import compiled
from ..ops import grouped, recheck
from ..ops.codes import Int, Real
from ..ops.shared import refuse
from ..options import check_choice, check_limit
from ..solution import Solution
from ..status import Status
from . import again
from .keeping import Keeping
from .together import Together


class Resuming(Keeping):
    """The part of ``SolverState`` for solves that go on after something has happened."""

    wakings: int
    _own_residual: bool

    @property
    def done(self) -> bool:
        """True when no sample is known to run any more."""
        raise NotImplementedError

    def step(self, fz: Any, residual: Any = None) -> bool:
        """Take f at ``z``, move to the next iterate."""
        raise NotImplementedError

    @compiled.skip
    def solution(self, returns: str = "best") -> Solution:
        """How things stand, in copies; the state goes on as if nobody had asked.

        Samples that run are ``STOPPED``, or labelled as at the end of a solve where a resumable state is at its limit.

        Args:
            returns: which z: "best" or "last" as in ``fixed_point``, or "next", where the solver would step from the
                newest; a converged sample stays where it is, for f there is not kept.
        """
        check_choice("returns", returns, ("best", "last", "next"))
        with torch.no_grad():
            return self._found(None, self.layout, returns)

    @compiled.skip
    def extend(self, max_iter: int | None) -> None:
        """Go on to another limit, with the bits of a solve that was never interrupted. Waits for the device.

        Args:
            max_iter: evaluations in all, those made included; None: no limit.

        Raises:
            RuntimeError: the state was not made with ``init(..., resumable=True)``: what the next step needs is gone.
            TypeError, ValueError: ``max_iter`` is no int above the evaluations made.
        """
        if self._limit is None:
            raise RuntimeError("extend needs a state with a max_iter that was made with init(..., resumable=True)")
        limit = None if max_iter is None else check_limit(max_iter)
        if limit is not None and limit <= self.nfe:
            raise ValueError(f"max_iter must be above the {self.nfe} evaluations made, got {limit}")
        if self.paused:
            self._running = int((self.ws.int_row(Int.STATUS) == int(Status.RUNNING)).sum()) if self.layout.total else 0
        self._limit = 2**31 if limit is None else limit

    @compiled.skip
    def repair(self, fz: Any) -> bool:
        """Put f of another map in place of f at the newest evaluation, and go on with what was learned of the old one.

        ::

            state = dq.Broyden().init(z0)
            state.step(block(state.z, x))
            state.repair(block(state.evaluated(), x + 0.1))  # then step(block(state.z, x + 0.1)) as before

        Without it, the first difference after a change is that of two maps, and says nothing of either. The columns and
        steps that there are stay, and no new one is made of this evaluation: of a map that has changed a little they
        still say how it bends. The step from the newest iterate is made once more, and every sample runs again, those
        that had converged or failed too. It counts as an evaluation; ``max_iter`` stays, and what comes after it ends.
        Broyden's samples of 65,536 numbers and more (on a GPU 8,193) forget what they had, as do Anderson's that had
        stopped where ``mix_every`` is above 1.

        Args:
            fz: the new f at ``state.evaluated()``, structured like z0; copied.

        Returns:
            ``done``.

        Raises:
            TypeError, ValueError: ``fz`` has another structure, shape, dtype or device, or the state was given
                residuals of your own; the state is as before.
            RuntimeError: nothing has been evaluated yet, or a ``callback`` of ``fixed_point`` calls.
        """
        if self._showing:
            raise RuntimeError("a callback of fixed_point cannot repair: the map that it solves is that of its f")
        refuse(self._group, "a repair")
        if self._own_residual:
            raise ValueError("repair needs a state whose residual is f(z) - z, not one of your own")
        leaves = self.layout.flatten(fz, "fz")
        if self.nfe == 0:
            raise RuntimeError("repair replaces the newest evaluation, and none has been made: give fz to step")
        if self.layout.N and self.layout.B:
            with torch.inference_mode(False), torch.no_grad():
                self._redo([t.detach().clone() for t in leaves])
        return self.done

    def _redo(self, leaves: list[Tensor]) -> None:
        """The step of the newest evaluation once more with this output of another f, for all samples."""
        ws = self.ws
        self.nfe += 1
        limit = ws.stopping.max_iter
        made = min(self.made, limit) if limit else self.made  # a kernel ends what comes at its limit
        stopped = ws.int_row(Int.STATUS) != int(Status.RUNNING)
        ws.changed()
        recheck.wake(ws, torch.ones_like(stopped), made, stopped)
        ws.real_row(Real.NORM).fill_(math.inf)  # nothing has grown
        self._origin = None
        ws.cur ^= 1
        self.bound = grouped.bind(self._backend, ws, made - 1)
        running = self.bound(leaves, None, None, None)  # nothing moved, which is no column
        recheck.begin(ws)
        ws.cur ^= 1
        self._outputs.bind(self.bound)
        self._outputs.hold(leaves if self.options.uses_previous else None, settled=False)
        self._outputs.newest = leaves
        if self._together is not None:
            self._together = Together(ws, self._stopping, made - 1)
            running = self._together.look(running)
        self._running = 0 if self.paused else running

    @compiled.skip
    def verify(self, fz: Any) -> bool:
        """Take f at ``z`` once more after the solve has ended, and judge every converged sample by it.

        Those that are not within tolerance go on; beyond ``max_iter`` they end as MAX_ITER. ``step`` has looked at the
        samples that f saw; this is for an f that did not see all of them, or that has changed since. Counts as an
        evaluation. Returns ``done``.

        Raises:
            ValueError: the state was given residuals of your own, which say what f(z) - z does not.
            RuntimeError: a resumable state is at its limit.
        """
        if self._running:
            return self.step(fz)
        if self._own_residual:
            raise ValueError("verify needs a state whose residual is f(z) - z, not one of your own")
        if self.some_run:
            raise RuntimeError("verify judges a solve that has ended, and this one is at its limit: call extend first")
        self.ws.cur ^= 1  # both iterates of a sample that has stopped are the same
        self.nfe += 1
        leaves = self.layout.flatten(fz, "f(z)")
        if self.options.uses_previous:
            self._outputs.hold([t.clone() for t in leaves], settled=False)
        self._running = self._again(leaves, None, said_so=True)
        return self._running == 0

    def _again(self, leaves: list[Tensor], rows: Tensor | None, said_so: bool = False) -> int:
        """The last sample has stopped: how many that had converged before go on; ``said_so``: even a sample alone."""
        ws = self.ws
        if self.layout.B < 2 and not said_so:
            return 0
        which = again.judge(self.bound, ws, leaves, rows, self.made, self._stopping)
        if which is None:
            return 0
        if self._together is not None:
            which = ws.int_row(Int.STATUS) == int(Status.CONVERGED)  # who stopped together goes on together
        recheck.wake(ws, which, self.made)
        ws.cur ^= 1  # the same step once more, for them
        if self._group is None or not self._group.spread:
            self.bound = grouped.bind(self._backend, ws, self.made - 1)
        running = self.bound(leaves, None, rows, None)  # they did not move, which is no column
        recheck.begin(ws, which)
        ws.cur ^= 1
        self._outputs.bind(self.bound)
        self.wakings += 1
        if self.wakings == 2:
            again.warn_again(ws)
        return running

    @compiled.skip
    def judge(self, rows: Tensor | None = None) -> None:
        """After ``advance``: converged samples that are not within tolerance at the newest f end as MAX_ITER."""
        if self._together is None:
            again.refuse(self.bound, self.ws, self._outputs.newest, rows, self.made)
