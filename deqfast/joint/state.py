"""One joint solve between two evaluations of f."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ranges
from ..loop.again import warn_again
from ..ops import contract
from ..ops.anderson import AndersonWorkspace
from ..ops.codes import BLOCKS, At, Int
from ..ops.grouped import workspace_of
from ..ops.joint import JointWorkspace, Part
from ..ops.joint_step import JointStep
from ..ops.lag import LAG
from ..ops.layout import Layout
from ..ops.recheck import refuse
from ..ops.workspace import Stopping
from ..status import Status
from .problem import Problem


class JointState:
    """A joint solve in progress, for a callback to look at.

    Attributes:
        z, x, mu: the iterate f is evaluated at next; valid until the next step.
        nfe: evaluations made.
        cost: (B,) loss at the iterate before, of all ranks that samples are spread over; None before the first
            evaluation.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        layout, solver = problem.layout, problem.options.solver
        kinds = [0] * len(problem.z_layout.leaves) + [1] * len(problem.z_layout.leaves)
        kinds += [2] * len(problem.x_leaves)
        chosen = [i for i, kind in enumerate(kinds) if BLOCKS[kind] in problem.accelerate]
        start = problem.start
        accelerated = Layout([start[i] for i in chosen], "z0 and x0")
        accelerated.spread_n = problem.numbers_of(chosen)
        core = workspace_of(
            solver,
            accelerated,
            # With "cost" it is kept here, and a sample that stops must stay where it was measured until it is.
            Stopping(0.0, 0.0, problem.options.max_iter, keep_best=problem.options.returns == "best"),
        )
        assert isinstance(core, AndersonWorkspace)
        core.judge_blocks(problem.rules)
        centers = problem.centers()
        parts = [
            Part(kind, layout.leaves[i], chosen.index(i) if i in chosen else None, centers[i])
            for i, kind in enumerate(kinds)
        ]
        backend = contract.choose(problem.options.backend, layout.device, kind=type(core))
        self.backend = backend.name
        self.ws = JointWorkspace(core, parts, problem.map_options, problem.options.returns, problem.options.safeguard)
        for i, t in enumerate(start):
            self.ws.value(i, 0).copy_(t)
            if self.ws.record.kept is not None:
                self.ws.record.kept[i].copy_(t)
        together = problem.options.stop != "each"
        self._step = JointStep(self.ws, backend, problem.project_leaves, together, problem.group)
        self._evaluate = ranges.around(ranges.F, problem.evaluate)
        self._take = ranges.around(ranges.STEP, self._step)
        self._running = layout.B if layout.total else 0
        if problem.group is not None and not problem.group.spread:
            self._running = 1  # of all ranks
        self.nfe = 0
        self.cost: Tensor | None = None
        self._newest: tuple[list[Tensor], Tensor] = [], torch.empty(0)
        self._warned = False

    def _counted(self, t: Tensor) -> Tensor:
        return self.problem.z_layout.counted(t)

    def _block(self, kind: int) -> list[Tensor]:
        return [self.ws.value(i) for i, part in enumerate(self.ws.parts) if part.block == kind]

    @property
    def z(self) -> Any:
        """The iterate of the state."""
        return self.problem.z_layout.unflatten(self._block(0))

    @property
    def mu(self) -> Any:
        """The iterate of the adjoint."""
        return self.problem.z_layout.unflatten(self._block(1))

    @property
    def x(self) -> Any:
        """The iterate of the input."""
        return self.problem.x_tree(self._block(2))

    @property
    def done(self) -> bool:
        """True when no sample is known to run any more."""
        return self._running == 0

    @property
    def known_running(self) -> int:
        """How many samples still ran when the host last heard."""
        return self._running

    @property
    def status(self) -> Tensor:
        """(B,) int32 of ``Status``."""
        return self._counted(self.ws.core.int_row(Int.STATUS))

    @property
    def steps(self) -> Tensor:
        """(B,) int32: evaluations each sample has used."""
        return self._counted(self.ws.core.int_row(Int.STEPS))

    @property
    def residual(self) -> dict[str, Tensor]:
        """(B,) relative residual of each block at each sample's newest evaluation."""
        assert self.ws.core.block_norms is not None
        return self._by_block(self.ws.core.block_norms)

    @property
    def best_residual(self) -> dict[str, Tensor]:
        """(B,) relative residual of each block at the iterate that would be returned now."""
        return self._by_block(self.ws.record.best_norms)

    @property
    def best_cost(self) -> Tensor:
        """(B,) loss at the iterate that would be returned now, NaN before there is one."""
        return self._counted(self.ws.record.best_cost)

    def _by_block(self, norms: Tensor) -> dict[str, Tensor]:
        moved, size = norms[:, :, : self.problem.layout.B].unbind(1)
        relative = torch.where(moved == 0, 0.0, moved / size)  # beyond all measure where a block has no size
        return {name: self._counted(relative[i]) for i, name in enumerate(self.problem.blocks)}

    def advance(self) -> bool:
        """Evaluate f, loss and their gradients, and step; returns ``done``."""
        at = [self.ws.value(i) for i in range(len(self.ws.parts))]
        values, cost = self._evaluate(at, first=self.nfe == 0)
        self._running = self._take(values, self.problem.step_size(self.nfe), cost)
        self.cost = None if self._step.cost is None else self._counted(self._step.cost)
        if self.problem.options.callback is not None:  # which may end the solve here
            self._newest = values, cost
        if self._step.wakings == 2 and not self._warned:
            self._warned = True
            warn_again(self.ws.core)
        self.nfe += 1
        if self.nfe > LAG or not self._running:  # the host has heard of later things by now
            self.problem.check_late()
        return self._running == 0

    def judge(self) -> None:
        """The solve ends here: whoever converged and is not within tolerance at the newest evaluation has not."""
        if self.problem.layout.B < 2:
            return
        self.ws.core.cur ^= 1
        which = self._step.judge(*self._newest)
        self.ws.core.cur ^= 1
        if which is not None:
            refuse(self.ws.core, which)

    def answer(self) -> list[Tensor]:
        """Every tensor of the returned iterate, in memory of its own."""
        core, ws = self.ws.core, self.ws
        if ws.record.kept is not None:
            return ws.record.kept
        leaves = [ws.value(i) for i in range(len(ws.parts))]
        if not self._running or not self.nfe:
            return [t.clone() for t in leaves]
        # Stopped by a callback: rows that still run have moved on from what was measured.
        running = core.int_row(Int.STATUS) == Status.RUNNING
        saved_best = running & (core.int_row(Int.BEST_AT) == At.SAVED) & core.stopping.keep_best
        found = []
        for i, part in enumerate(ws.parts):
            previous = ws.value(i, 1 - core.cur)
            saved = core.saved[part.index] if part.index is not None else ws.plain_saved[i]
            from_saved = saved_best if part.index is not None else running & core.stopping.keep_best
            assert saved is not None
            shape = (-1, *([1] * (leaves[i].dim() - 1)))
            value = torch.where(running.view(shape), previous, leaves[i])
            found.append(torch.where(from_saved.view(shape), saved, value))
        return found
