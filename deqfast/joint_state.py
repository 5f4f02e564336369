"""One joint solve between two evaluations of f."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import ops
from .joint_problem import Problem
from .ops.joint import BLOCKS, JointWorkspace, Part, bind_joint
from .ops.layout import Layout
from .ops.workspace import AndersonWorkspace, At, Int, Real
from .status import Status

COST_SLACK = 1.3  # a lower cost is taken at a residual up to this times the best one
SAFEGUARD = 2.0  # a residual this far above the best one since the last restart forgets the history


class JointState:
    """A joint solve in progress, for a callback to look at.

    Attributes:
        z, x, mu: the iterate f is evaluated at next; valid until the next step.
        nfe: evaluations made.
        cost: (B,) loss at the iterate before, None before the first evaluation.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        layout, solver = problem.layout, problem.solver
        kinds = [0] * len(problem.z_layout.leaves) + [1] * len(problem.z_layout.leaves)
        kinds += [2] * len(problem.x_leaves)
        chosen = [i for i, kind in enumerate(kinds) if BLOCKS[kind] in problem.accelerate]
        start = problem.start
        core = solver.workspace(
            Layout([start[i] for i in chosen], "z0 and x0"),
            rtol=0.0,
            atol=0.0,
            max_iter=problem.max_iter,
            keep_best=problem.returns != "last",
        )
        assert isinstance(core, AndersonWorkspace)
        core.judge_blocks(problem.rules)
        centers = problem.centers()
        parts = [
            Part(kind, layout.leaves[i], chosen.index(i) if i in chosen else None, centers[i])
            for i, kind in enumerate(kinds)
        ]
        self.backend = ops.choose(problem.backend, layout.device)
        self.ws = JointWorkspace(core, parts, problem.map_options)
        for i, t in enumerate(start):
            self.ws.value(i, 0).copy_(t)
        self._step = bind_joint(self.ws, self.backend, problem.project_leaves)
        self._running = layout.B if layout.N else 0
        self.nfe = 0
        self.cost: Tensor | None = None
        B, acc, device = layout.B, layout.acc, layout.device
        self._best_blocks = torch.full((len(problem.rules), B), math.inf, dtype=torch.float64, device=device)
        self._best_cost = torch.full((B,), math.nan, dtype=acc, device=device)
        self._least = torch.full((B,), math.inf, dtype=core.real_row(Real.BEST).dtype, device=device)
        self._kept: list[Tensor] | None = None  # with returns="cost": the iterate that was accepted last

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
        return self.ws.core.int_row(Int.STATUS)

    @property
    def steps(self) -> Tensor:
        """(B,) int32: evaluations each sample has used."""
        return self.ws.core.int_row(Int.STEPS)

    @property
    def residual(self) -> dict[str, Tensor]:
        """(B,) relative residual of each block at each sample's newest evaluation."""
        return {name: self._residuals()[i] for i, name in enumerate(self.problem.blocks)}

    def _residuals(self) -> Tensor:
        norms = self.ws.core.block_norms
        assert norms is not None
        moved, size = norms[:, :, : self.problem.layout.B].unbind(1)
        return torch.where(size > 0, moved / size, torch.where(moved > 0, math.inf, 0.0))

    def advance(self) -> bool:
        """Evaluate f, loss and their gradients, and step; returns ``done``."""
        problem, core = self.problem, self.ws.core
        values, cost = problem.evaluate(self.z, self.mu, self.x, first=self.nfe == 0)
        before = core.int_row(Int.STATUS) == Status.RUNNING
        if problem.returns == "cost":
            best = core.real_row(Real.BEST).clone()
            at = [self.ws.value(i).clone() for i in range(len(self.ws.parts))]
        self._running = self._step(values, problem.step_size(self.nfe))
        self.nfe += 1
        self.cost = cost
        status = core.int_row(Int.STATUS)
        measured = before & (status != Status.NON_FINITE)
        now = core.real_row(Real.RESIDUAL)
        better = measured & (core.int_row(Int.BEST_STEP) == core.int_row(Int.STEPS))
        take = measured if problem.returns == "last" else better
        if problem.returns == "cost":
            lower = (cost < self._best_cost) & (now < COST_SLACK * best)
            take = better | (measured & lower)
            self._keep(at, take)
        self._best_blocks = torch.where(take, self._residuals(), self._best_blocks)
        self._best_cost = torch.where(take, cost, self._best_cost)
        if problem.safeguard:
            # Against the best since the last restart: against the best of all, a sample whose plain steps climb would
            # restart at each of them and never be accelerated again.
            grown = measured & (now > SAFEGUARD * self._least)
            self._least = torch.where(measured, torch.where(grown, now, torch.minimum(self._least, now)), self._least)
            self._forget(grown)
        return self._running == 0

    def _keep(self, at: list[Tensor], take: Tensor) -> None:
        if self._kept is None:
            self._kept = at
            return
        self._kept = [
            torch.where(take.view(-1, *([1] * (t.dim() - 1))), t, kept) for t, kept in zip(at, self._kept, strict=True)
        ]

    def _forget(self, which: Tensor) -> None:
        """Plain damped steps from here: the columns of these samples no longer count."""
        core = self.ws.core
        if core.m == 0:
            return
        padded = core.tiles * core.norms.shape[-1]
        mask = torch.zeros(padded, dtype=torch.bool, device=which.device)
        mask[: which.shape[0]] = which
        core.norms.masked_fill_(mask.view(core.tiles, 1, 1, -1), 0)

    def answer(self) -> list[Tensor]:
        """Every tensor of the returned iterate, in memory of its own."""
        core, ws = self.ws.core, self.ws
        if self._kept is not None:
            return self._kept
        leaves = [ws.value(i) for i in range(len(ws.parts))]
        if not self._running or not self.nfe:
            return [t.clone() for t in leaves]
        # Stopped by a callback: rows that still run have moved on from what was measured.
        running = core.int_row(Int.STATUS) == Status.RUNNING
        saved_best = running & (core.int_row(Int.BEST_AT) == At.SAVED) & core.keep_best
        found = []
        for i, part in enumerate(ws.parts):
            previous = ws.value(i, 1 - core.cur)
            saved = core.saved[part.index] if part.index is not None else ws.plain_saved[i]
            from_saved = saved_best if part.index is not None else running & core.keep_best
            assert saved is not None
            shape = (-1, *([1] * (leaves[i].dim() - 1)))
            value = torch.where(running.view(shape), previous, leaves[i])
            found.append(torch.where(from_saved.view(shape), saved, value))
        return found
