"""The joint step of ranks: what its map lacks where each has some numbers of every sample, and where all stop together.

A map on one rank knows the numbers that are there. Norms of blocks, and the cost, are added up by one all-reduce
between the map and the accelerated step, which has its own (``native.spread``). Where the step of x needs a norm
before it can be made, of the gradient (``normalize``) or of the way from a ball's centre, x is stepped here, in plain
torch, with one more all-reduce for each of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..status import Status
from .codes import BLOCKS, Int
from .formulas.joint import gradient_step, project_rows
from .joint import JointWorkspace, store_norms
from .ranks import Ranks


class Spread:
    """The map's sums over ranks. Made before the backend's ends, which are to leave to it what needs such a sum."""

    def __init__(self, ws: JointWorkspace, ranks: Ranks) -> None:
        self.ws, self.ranks, self._options = ws, ranks, ws.options
        self._inputs = [i for i, part in enumerate(ws.parts) if BLOCKS[part.block] == "x"]
        self._steps = bool(self._inputs) and (ws.options.normalize or ws.options.ball == "l2")
        if self._steps:
            ws.options = replace(ws.options, normalize=False, ball=None)

    def step_inputs(self, values: list[Tensor], step_size: float) -> None:
        """X, where its step needs a norm of whole samples: ``mapped`` and the norms of what is here."""
        if not self._steps:
            return
        ws, core, options = self.ws, self.ws.core, self._options
        acc, norms = core.layout.acc, core.block_norms
        assert norms is not None
        parts = [ws.parts[i] for i in self._inputs]
        running = core.int_row(Int.STATUS) == int(Status.RUNNING)
        x = [part.leaf.rows(ws.value(i)).to(acc) for i, part in zip(self._inputs, parts, strict=True)]
        q = [part.leaf.rows(values[i]).to(acc) for i, part in zip(self._inputs, parts, strict=True)]
        stepped = gradient_step(x, q, step_size, options.normalize, norms.dtype, self.ranks.add)
        to = project_rows(options, [part.center for part in parts], stepped, norms.dtype, self.ranks.add)
        for i, part, t in zip(self._inputs, parts, to, strict=True):
            target = part.leaf.rows(ws.mapped[core.cur][i])
            target.copy_(torch.where(running[:, None], t.to(target.dtype), target))
        store_norms(norms, BLOCKS.index("x"), running, [a - b for a, b in zip(to, x, strict=True)], to)

    def add_up(self, cost: Tensor | None) -> Tensor | None:
        """``block_norms`` of running samples become those of whole samples; (B,) the cost over all ranks."""
        core = self.ws.core
        assert core.block_norms is not None
        norms = core.block_norms[:, :, : core.layout.B]
        running = core.int_row(Int.STATUS) == int(Status.RUNNING)
        rows = [norms.square().flatten(0, 1)] + ([] if cost is None else [cost.double()[None]])
        sums = torch.cat(rows)
        self.ranks.add(sums)
        whole = sums[: norms.shape[0] * 2].sqrt().view_as(norms)
        norms.copy_(torch.where(running, whole, norms))
        return None if cost is None else sums[-1].to(cost.dtype)
