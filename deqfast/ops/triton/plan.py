"""A solver's update by the Triton kernels, whichever solver it is."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ...status import Status
from ..codes import BLOCK, Int
from ..contract import BoundStep, Leaves, Replay, Rows
from ..lag import Lag, capturing
from ..layout import Leaf
from ..workspace import Workspace
from .launch import dense, doubles, load, on, share


class Part:
    """A tensor of the state with numbers in it: its rows in every buffer, and where they lie in the history."""

    def __init__(self, ws: Workspace, index: int, offset: int, first_block: int) -> None:
        self.index, self.offset, self.first_block = index, offset, first_block
        self.leaf: Leaf = ws.layout.leaves[index]
        x = [self.leaf.rows(buffer[index]) for buffer in ws.x]
        saved, iterates = self.leaf.rows(ws.saved[index]), load("arguments").Iterates
        self.iterates = iterates(x[0], x[1], saved), iterates(x[1], x[0], saved)  # by ws.cur


class TritonStep(BoundStep):
    """The update of a workspace's solver: what a solve allocates beside it, and the groups of arguments of launches.

    On a GPU an update is not waited for, and the count it returns is an earlier one.
    """

    def __init__(self, ws: Workspace, evaluations: int) -> None:
        super().__init__(ws)
        layout = ws.layout
        self.shapes, self.arguments = load("shapes"), load("arguments")
        self.device = layout.device
        self.itemsize = layout.acc.itemsize
        self.lag = Lag(layout.B, layout.device, ws.stopping.max_iter, evaluations)
        self.running = (ws.int_row(Int.STATUS) == Status.RUNNING).sum().to(torch.int32).reshape(1)
        self.padded = ws.ints.stride(0)
        numbers = [*ws.stopping[:2], math.sqrt(layout.N), *(number for rule in ws.block_rules for number in rule)]
        self.stopping = self.arguments.Stopping(doubles(numbers, self.device), self.running, ws.block_norms)
        self.rule = self.arguments.Rule(ws.stopping.keep_best, len(ws.block_rules))
        self.statistics = self.arguments.Statistics(ws.ints, ws.reals)
        self.parts = self._parts()
        self.chunks = share([part.leaf.n for part in self.parts])
        self.total = sum(part.own for part in self.chunks)
        if self.device.type == "cuda":
            self.replay = TritonReplay(ws.layout.B, self.running, self.lag)

    def _parts(self) -> list[Part]:
        parts: list[Part] = []
        offset = block = 0
        for i, leaf in enumerate(self.ws.layout.leaves):
            if leaf.n:
                parts.append(Part(self.ws, i, offset, block))
                offset, block = offset + leaf.n, block + math.ceil(leaf.n / BLOCK)
        return parts

    def begin(self, *places: int) -> tuple[int | None, ...]:
        """Where a tensor begins, as arguments: nothing to be added where there is but one."""
        return places if len(self.parts) > 1 else (None,) * len(places)

    def hand_on(self, products: int) -> None:
        """Memory through which the kernels of a step hand results on where several programs share a sample."""
        B, total = self.ws.layout.B, self.total
        self.handed = self.arguments.Handed(
            torch.empty(B, products, total, dtype=torch.float64, device=self.device),
            torch.zeros(B, dtype=torch.int32, device=self.device),
            torch.zeros(B, total, dtype=torch.int32, device=self.device),
        )

    def failed(self) -> int:
        """Samples that stopped without having converged; waits for the device, and knows nothing under capture."""
        if capturing(self.device):
            return 0
        failed = (self.ws.int_row(Int.STATUS) > Status.CONVERGED).sum().to(torch.int32)
        if self.device.type == "cpu":
            return int(failed)
        with on(self.device):
            return Lag(self.ws.layout.B, self.device, 0, 0).report(failed, 0)

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """Launch one update."""
        with on(self.device):
            now = self.outputs(f, f_rows)
            self.launch(now, now if f_prev is None else self.outputs(f_prev, f_prev_rows), f_prev is not None)
            return self.lag.read(self.running)

    def outputs(self, f: Leaves, rows: Rows) -> list[Any]:
        """What f returned, as arguments."""
        return [self.arguments.Output(dense(f[part.index], part.leaf), rows) for part in self.parts]

    @abstractmethod
    def launch(self, f: list[Any], f_prev: list[Any], previous: bool) -> None:
        """The kernels of one update, on ``outputs``."""


class TritonReplay(Replay):
    """Steps that were captured in a graph."""

    def __init__(self, B: int, running: Tensor, lag: Lag) -> None:
        self.running = running
        self._B, self._lag = B, lag

    def renew(self) -> None:
        """Prepare for a new solve in the same memory."""
        self.running.fill_(self._B)
        self._lag.rewind(0)

    def rewind(self, evaluations: int) -> None:
        """The part of ``renew`` that the host keeps."""
        self._lag.rewind(evaluations)

    def report(self, lag: int) -> int:
        """The samples running as of ``lag`` reports before."""
        with on(self.running.device):  # events belong to a stream of the current one
            return self._lag.report(self.running, lag)
