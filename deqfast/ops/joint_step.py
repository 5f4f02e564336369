"""The whole step of a joint solve: the map, the accelerated step, the finish."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..status import Status
from . import grouped, recheck
from .codes import BLOCKS, Int
from .contract import Backend, BoundStep
from .joint import JointWorkspace, measure_block, note
from .joint_ranks import Spread
from .lag import capturing
from .shared import Group

Project = Callable[[list[Tensor]], list[Tensor]]


class JointStep:
    """One joint solve's step on a backend; flips ``core.cur``.

    ``project``: a projection of the caller's own, of the mapped x's tensors; without the projection of ``options``.
    ``together``: nobody stops before an evaluation at which everybody is within his rules, or the last one.
    ``group``: ranks that share the solve; the running of any is then that of all.

    Attributes:
        cost: (B,) of the newest evaluation, of all ranks that samples are spread over; None: there is none.
    """

    def __init__(
        self,
        ws: JointWorkspace,
        backend: Backend,
        project: Project | None = None,
        together: bool = False,
        group: Group | None = None,
    ) -> None:
        self.ws, self.project, self.backend, self.group = ws, project, backend, group
        self._spread = Spread(ws, group.ranks) if group is not None and group.spread else None
        self.cost: Tensor | None = None
        self.rules = ws.core.block_rules
        self._never = [(0.0, -1.0, weight) for _, _, weight in self.rules] if together else None
        if self._never is not None:
            ws.core.block_rules = self._never
        self.ends, self.bound = backend.joint(ws), self._bind()
        self.inputs = [i for i, part in enumerate(ws.parts) if BLOCKS[part.block] == "x"]
        self.accelerated = tuple(ws.accelerated(mapped) for mapped in ws.mapped)
        self.made = self.wakings = 0
        self._least_step = math.inf

    def _bind(self, evaluations: int = 0) -> BoundStep:
        return grouped.bind(self.backend, self.ws.core, evaluations, self.group)

    def __call__(self, values: list[Tensor], step_size: float, cost: Tensor | None = None) -> int:
        """One step; how many samples still run.

        Args:
            values: f, p and q as one list in the order of the workspace's parts.
            step_size: a_x.
            cost: (B,), if there is one; a sample stops where it is no number.
        """
        core, shared = self.ws.core, self.group is not None and not self.group.spread
        if core.layout.B == 0 and not shared:
            return 0
        cost = None if cost is None else cost.resolve_neg().contiguous()  # kernels read its memory
        with torch.no_grad():
            self._map(values, step_size, cost)
            stops = self._never is not None and self._time_to_stop()
            if self._never is not None:
                self._judge_by(self.rules if stops else self._never)
            previous = self.accelerated[1 - core.cur] if self.made else None
            running = self.bound(self.accelerated[core.cur], previous, None, None)
            self.made += 1
            self.ends.finish(self.cost, self.made)
            if shared:
                running = 0 if stops else 1
            elif not running and core.layout.B > 1:
                running = self._again(values, cost)
        core.cur ^= 1
        return running

    def _time_to_stop(self) -> bool:
        """Whether everybody who runs is within his rules at this evaluation, or it is the last; waits for a device."""
        core = self.ws.core
        if self.made + 1 == core.stopping.max_iter:
            return True
        if capturing(core.layout.device):
            return False
        within, finite = self._within(0.0, 0.0)
        short = (core.int_row(Int.STATUS) == int(Status.RUNNING)) & finite & ~within
        if self.group is None or self.group.spread:
            return not bool(short.any())
        count = short.any().to(torch.int32)
        self.group.ranks.add(count)
        return not bool(count)

    def _judge_by(self, rules: list[tuple[float, float, float]]) -> None:
        core = self.ws.core
        if core.block_rules is not rules:
            core.block_rules = rules
            self.bound = self._bind(self.made)

    def _within(self, slack: float, noise: float) -> tuple[Tensor, Tensor]:
        """(B,) bool: samples all of whose blocks are within their rules, and those whose norms are finite."""
        norms = self.ws.core.block_norms
        assert norms is not None
        moved, size = norms[:, :, : self.ws.core.layout.B].unbind(1)
        rtol, atol, _ = norms.new_tensor(self.rules)[:, :, None].unbind(1)
        within = recheck.still_within(moved, size, rtol, atol, noise, slack)
        return within.all(0), torch.isfinite(moved + size).all(0)

    def _map(self, values: list[Tensor], step_size: float, cost: Tensor | None) -> None:
        self._least_step = min(self._least_step, step_size)
        self.ends.map(values, step_size, cost)
        if self._spread is not None:
            self._spread.step_inputs(values, step_size)
        if self.project is not None:
            mapped = self.ws.mapped[self.ws.core.cur]
            for i, t in zip(self.inputs, self.project([mapped[i] for i in self.inputs]), strict=True):
                mapped[i].copy_(t)
            measure_block(self.ws, self.inputs)
        self.cost = cost if self._spread is None else self._spread.add_up(cost)

    def judge(self, values: list[Tensor], cost: Tensor | None) -> Tensor | None:
        """Which of the samples that converged before the newest evaluation are not within tolerance at it.

        What is recorded of the others becomes that of this evaluation. None: nobody, as the host knows. With ``cur`` as
        it was in the step. The x block is measured by the least step that was made: a schedule that grows would find
        everybody outside.
        """
        core, record = self.ws.core, self.ws.record
        status = core.int_row(Int.STATUS)
        earlier = (status == int(Status.CONVERGED)) & (core.int_row(Int.STEPS) < self.made)
        if core.layout.device.type == "cpu" and not bool(earlier.any()):
            return None
        norms = core.block_norms
        assert norms is not None
        status.masked_fill_(earlier, int(Status.RUNNING))
        self._map(values, self._least_step, cost)
        status.masked_fill_(earlier, int(Status.CONVERGED))
        within, _ = self._within(recheck.SLACK, recheck.noise(core))
        note(record.best_cost, record.best_norms, earlier & within, self.cost, norms)
        return earlier & ~within

    def _again(self, values: list[Tensor], cost: Tensor | None) -> int:
        """The last sample has stopped: how many of those that had converged before go on from this evaluation."""
        core = self.ws.core
        which = self.judge(values, cost)
        if which is None:
            return 0
        if capturing(core.layout.device):
            recheck.refuse(core, which)
            return 0
        if not bool(which.any()):
            return 0
        if self._never is not None:  # who stopped together goes on together
            which = core.int_row(Int.STATUS) == int(Status.CONVERGED)
            core.block_rules = self._never
        recheck.wake(core, which, self.made)
        self.bound = self._bind(self.made - 1)
        running = self.bound(self.accelerated[core.cur], None, None, None)
        self.ends.finish(self.cost, self.made)
        self.wakings += 1
        return running
