"""Anderson's update by the Triton kernels; see kernels/anderson.py for its schedules."""

from __future__ import annotations

from typing import Any

import torch

from ..anderson import SCALED_DTYPES, AndersonWorkspace
from .launch import bound, doubles, load
from .plan import TritonStep


class AndersonStep(TritonStep):
    """Anderson's update."""

    def __init__(self, ws: AndersonWorkspace, evaluations: int) -> None:
        super().__init__(ws, evaluations)
        kernels, columns, small = load("anderson"), load("columns"), load("small")
        self.ws: AndersonWorkspace = ws
        method, numbers = kernels.method_of(ws.method)
        self.numbers = doubles(numbers, self.device)
        B, N, m = ws.layout.B, ws.layout.N, method.m
        tiled = m > 0 and not ws.keeps_products
        shape = self.shapes.streaming(m, N, self.itemsize, tiled)
        form = columns.Form(shape.M, shape.BLOCK, ws.history.dtype in SCALED_DTYPES, tiled)
        self.history = [
            columns.History(ws.history, ws.scales, N, ws.scales.shape[3], *self.begin(part.offset, part.first_block))
            for part in self.parts
        ]
        self.small = small.Small(ws.matrix, ws.gram, ws.norms, ws.ages)
        self.alone = (
            len(self.parts) == 1 and N <= self.shapes.SAMPLE_MAX_N and shape.M <= self.shapes.SAMPLE_MAX_COLUMNS
        )
        if self.alone:
            self.sample = bound(kernels.sample_kernel, B, shape.warps, method=method, rule=self.rule, form=form)
            return
        self.hand_on(kernels.HEAD.value + 4 * m)
        self.gammas = torch.empty(B, m, dtype=ws.layout.acc, device=self.device)
        walk = {"method": method, "form": form}
        self.reduce = [bound(kernels.reduce_kernel, B * part.own, shape.warps, **walk) for part in self.chunks]
        self.decide = bound(
            kernels.decide_kernel, B, self.shapes.small(m).warps, method=method, rule=self.rule,
            M=shape.M, CHUNKS=self.shapes.chunk_tile(self.total, m),
        )  # fmt: skip
        self.mix = [bound(kernels.mix_kernel, B * part.own, shape.warps, **walk) for part in self.chunks]
        self.finish = bound(kernels.finish_kernel, B, 4, method=method, M=shape.M, BLOCK=256)

    def launch(self, f: list[Any], f_prev: list[Any], previous: bool) -> None:
        """The kernels of one update."""
        B, padded, max_iter, has_previous = self.ws.layout.B, self.padded, self.ws.stopping.max_iter, int(previous)
        iterates = [part.iterates[self.ws.cur] for part in self.parts]
        if self.alone:
            self.sample(
                f[0], f_prev[0], iterates[0], self.history[0], self.small, self.statistics, self.stopping,
                self.numbers, B, padded, max_iter, has_previous,
            )  # fmt: skip
            return
        for i, launch in enumerate(self.reduce):
            launch(
                f[i], f_prev[i], iterates[i], self.history[i], self.small, self.statistics, self.handed,
                self.chunks[i], B, padded, has_previous,
            )  # fmt: skip
        self.decide(
            self.small, self.statistics, self.stopping, self.numbers, self.handed, self.gammas, self.total, padded,
            max_iter, has_previous,
        )  # fmt: skip
        for i, launch in enumerate(self.mix):
            launch(
                f[i], iterates[i], self.history[i], self.numbers, self.handed, self.gammas, self.chunks[i], B, padded
            )
        for i in range(len(f)):
            last = i == len(f) - 1
            self.finish(f[i], iterates[i], self.small, self.statistics, self.handed, self.chunks[i], padded, LAST=last)
