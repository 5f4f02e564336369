"""Broyden's update by the Triton kernels; see kernels/broyden.py for its schedules."""

from __future__ import annotations

from typing import Any

import torch

from ..broyden import BroydenWorkspace
from .launch import bound, load
from .plan import TritonStep


class BroydenStep(TritonStep):
    """Broyden's update."""

    def __init__(self, ws: BroydenWorkspace, evaluations: int) -> None:
        super().__init__(ws, evaluations)
        kernels, steps = load("broyden"), load("steps")
        self.ws: BroydenWorkspace = ws
        method, _ = kernels.method_of(ws.method)
        B, N, acc = ws.layout.B, ws.layout.N, ws.layout.acc
        gram = ws.gram.shape[1] > 0
        self.steps = [steps.Steps(ws.history, ws.norms, ws.gram, N, *self.begin(part.offset)) for part in self.parts]
        solve = {"method": method, "rule": self.rule}
        limit = self.shapes.SAMPLE_MAX_N * 4 // self.itemsize
        self.alone = len(self.parts) == 1 and limit >= N and not gram
        if self.alone:
            shape = self.shapes.chain(N, self.itemsize)
            self.sample = bound(kernels.sample_kernel, B, shape.warps, **solve, BLOCK=shape.BLOCK)
            return
        self.hand_on(2 + method.memory)
        self.scratch = steps.Scratch(
            torch.empty(B, N, dtype=acc, device=self.device),
            torch.empty(B, method.memory, dtype=acc, device=self.device),
            torch.empty(B, 3, dtype=acc, device=self.device),
        )
        M, tile = self.shapes.power_of_two(method.memory), self.shapes.chunk_tile(self.total, method.memory)
        walk = {"method": method, "form": kernels.Form(gram, 1024, 256 * 4 // self.itemsize)}
        self.gather = [bound(kernels.gather_kernel, B * part.own, 4, **walk) for part in self.chunks]
        self.decide = bound(
            kernels.decide_kernel, B, 1 if gram else 8, **solve, GRAM=gram, M=M, CHUNKS=tile, BLOCK=2048
        )
        self.apply = [bound(kernels.apply_kernel, B * part.own, 4, **walk) for part in self.chunks]
        self.finish = bound(kernels.finish_kernel, B, 4, method=method, GRAM=gram, M=M, CHUNKS=tile, BLOCK=256)

    def launch(self, f: list[Any], f_prev: list[Any], previous: bool) -> None:
        """The kernels of one update."""
        ws, padded = self.ws, self.padded
        iterates = [part.iterates[ws.cur] for part in self.parts]
        if self.alone:
            self.sample(f[0], iterates[0], self.steps[0], self.statistics, self.stopping, padded, ws.stopping.max_iter)
            return
        shared = self.statistics, self.handed, self.scratch
        for i, launch in enumerate(self.gather):
            launch(f[i], iterates[i], self.steps[i], *shared, self.chunks[i], padded)
        self.decide(
            self.steps[0], self.statistics, self.stopping, self.handed, self.scratch, self.total, padded,
            ws.stopping.max_iter,
        )  # fmt: skip
        for i, launch in enumerate(self.apply):
            launch(f[i], iterates[i], self.steps[i], *shared, self.chunks[i], padded)
        for i in range(len(f)):
            last = i == len(f) - 1
            self.finish(f[i], iterates[i], self.steps[i], *shared, self.chunks[i], padded, LAST=last)
