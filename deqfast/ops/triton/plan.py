"""Triton kernels: what serves a GPU where the extension module has no kernels for it, and CPU tensors in tests.

Triton is imported when a solve first asks for it. CUDA builds of torch bring it along; on a CPU its interpreter runs
the same kernels, if ``TRITON_INTERPRET=1`` is set before they are loaded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import re
import sys
from typing import Any

import torch
from torch import Tensor

from ...status import Status
from ..anderson import SCALED_DTYPES, AndersonWorkspace
from ..broyden import BroydenWorkspace
from ..codes import Evict, Int
from ..contract import BoundStep, Leaves, Replay, Rows
from ..lag import Lag, capturing
from ..layout import Leaf
from ..workspace import Workspace

OLDEST = (3, 6)
OLDEST_CAPABILITY = (8, 0)
ALIGNMENT = 16  # bytes; how a kernel reads may depend on it, and the order of its sums with that

COMPILER = {"enable_fp_fusion": True}  # said outright: Triton's default differs between versions


def why_not(device: torch.device) -> str | None:
    """Why the Triton kernels cannot serve ``device``, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        if not _interpreted():
            return "Triton needs a GPU; for its interpreter set TRITON_INTERPRET=1 before the first solve"
    elif device.type != "cuda":
        return f"there are no Triton kernels for device type {device.type!r}"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        return f"triton {'.'.join(map(str, OLDEST))} or newer is needed, found {version}"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"compute capability 8.0 or newer is needed, found {capability[0]}.{capability[1]}"
    return None


def _interpreted() -> bool:
    """Whether the kernels run, or would run if loaded now, in Triton's interpreter."""
    kernels = sys.modules.get("deqfast.kernels.measure")
    if kernels is not None:
        return type(kernels.judge).__name__ == "InterpretedFunction"
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


class TritonStep(BoundStep):
    """The update of a workspace's solver; on a GPU it does not wait, and the count it returns is an earlier one."""

    plan: _Plan

    def __init__(self, ws: Workspace, plan: _Plan) -> None:
        super().__init__(ws)
        self.plan = plan
        if ws.layout.device.type == "cuda":
            self.replay = TritonReplay(plan)

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """Launch one update."""
        return self.plan.step(f, f_prev, f_rows, f_prev_rows)

    def failed(self) -> int:
        """Samples that stopped without having converged; waits for the device, and knows nothing under capture."""
        return self.plan.failed()


def anderson_step(ws: AndersonWorkspace, evaluations: int) -> BoundStep:
    """Anderson's step on this workspace."""
    return TritonStep(ws, _AndersonPlan(ws, evaluations))


def broyden_step(ws: BroydenWorkspace, evaluations: int) -> BoundStep:
    """Broyden's step on this workspace."""
    return TritonStep(ws, _BroydenPlan(ws, evaluations))


class TritonReplay(Replay):
    """Steps that were captured in a graph."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self.running = plan.running

    def renew(self) -> None:
        """Prepare for a new solve in the same memory."""
        self._plan.renew()

    def rewind(self, evaluations: int) -> None:
        """The part of ``renew`` that the host keeps."""
        self._plan.lag.rewind(evaluations)

    def report(self, lag: int) -> int:
        """The samples running as of ``lag`` reports before."""
        return self._plan.report(lag)


class _Part:
    """A tensor of the state with numbers in it: its rows in every buffer, and where they lie in the history."""

    def __init__(self, ws: Workspace, index: int, offset: int, first_block: int, first_chunk: int, chunk: int) -> None:
        self.index = index
        self.leaf: Leaf = ws.layout.leaves[index]
        self.n = self.leaf.n
        self.offset, self.first_block, self.first_chunk = offset, first_block, first_chunk
        self.chunks = math.ceil(self.n / chunk)
        self.x = tuple(self.leaf.rows(buffer[index]) for buffer in ws.x)
        self.saved = self.leaf.rows(ws.saved[index])


class _Plan:
    """What a solve allocates beside its workspace, once: settings, counter, partial sums."""

    def __init__(self, ws: Workspace, evaluations: int, mixing: float = 1.0, ridge: float = 0.0) -> None:
        self.ws = ws
        layout = ws.layout
        self.shapes: Any = importlib.import_module("deqfast.kernels.shapes")
        self.device = layout.device
        self.itemsize = layout.acc.itemsize
        self.lag = Lag(layout.B, layout.device, ws.stopping.max_iter, evaluations)
        numbers = [*ws.stopping[:2], math.sqrt(layout.N), mixing, ridge]
        numbers += [number for rule in ws.block_rules for number in rule]
        self.settings = torch.empty(len(numbers), dtype=torch.float64, device=self.device)
        for setting, value in zip(self.settings.unbind(), numbers, strict=True):
            setting.fill_(value)  # a copy of host memory would wait for the device
        self.running = (ws.int_row(Int.STATUS) == Status.RUNNING).sum().to(torch.int32).reshape(1)
        self.padded = ws.ints.shape[1]
        self.chunk = self.shapes.chunk_size([leaf.n for leaf in layout.leaves])
        self.parts = self._parts()
        self.chunks = sum(part.chunks for part in self.parts)

    def _parts(self) -> list[_Part]:
        parts: list[_Part] = []
        offset = block = chunk = 0
        for i, leaf in enumerate(self.ws.layout.leaves):
            if not leaf.n:
                continue
            part = _Part(self.ws, i, offset, block, chunk, self.chunk)
            parts.append(part)
            offset, block, chunk = offset + leaf.n, block + math.ceil(leaf.n / 1024), chunk + part.chunks
        return parts

    def split_memory(self, products: int) -> None:
        """Memory through which the kernels of a step hand results on where several programs share a sample."""
        B = self.ws.layout.B
        self.partials = torch.empty(B, products, self.chunks, dtype=torch.float64, device=self.device)
        self.flags = torch.zeros(B, self.chunks, dtype=torch.int32, device=self.device)
        self.outcomes = torch.zeros(B, dtype=torch.int32, device=self.device)

    def failed(self) -> int:
        """Samples that stopped without having converged; waits for the device, and knows nothing under capture."""
        if capturing(self.device):
            return 0
        failed = (self.ws.int_row(Int.STATUS) > Status.CONVERGED).sum().to(torch.int32)
        if self.device.type == "cpu":
            return int(failed)
        with torch.cuda.device(self.device):
            return Lag(self.ws.layout.B, self.device, 0, 0).report(failed, 0)

    def report(self, lag: int) -> int:
        """The samples running as of ``lag`` reports before."""
        with torch.cuda.device(self.device):  # events belong to a stream of the current one
            return self.lag.report(self.running, lag)

    def renew(self) -> None:
        """For a new solve in the same memory."""
        self.running.fill_(self.ws.layout.B)
        self.lag.rewind(0)

    def step(self, f: list[Tensor], f_prev: list[Tensor] | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """Launch one update."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            now = [_dense(f[part.index], part.leaf) for part in self.parts]
            before = now if f_prev is None else [_dense(f_prev[part.index], part.leaf) for part in self.parts]
            self.launch(now, f_rows, before, f_prev_rows, f_prev is not None)
            return self.lag.read(self.running)

    def launch(self, f: list[Tensor], f_rows: Rows, f_prev: list[Tensor], f_prev_rows: Rows, previous: bool) -> None:
        """The kernels of one update, on dense rows of f."""
        raise NotImplementedError


def _dense(t: Tensor, leaf: Leaf) -> Tensor:
    """``t`` as dense, aligned rows: a copy where it is not stored like that."""
    rows = leaf.rows(t.resolve_neg()).resolve_neg()
    if not rows.is_contiguous():
        return rows.contiguous()
    return rows.clone() if rows.data_ptr() % ALIGNMENT else rows


class _AndersonPlan(_Plan):
    def __init__(self, ws: AndersonWorkspace, evaluations: int) -> None:
        super().__init__(ws, evaluations, ws.method.mixing, ws.method.ridge)
        kernels: Any = importlib.import_module("deqfast.kernels.anderson")
        self.ws: AndersonWorkspace = ws
        m, B = ws.method.m, ws.layout.B
        self.tiled = m > 0 and not ws.keeps_products
        shape = self.shapes.streaming(m, ws.layout.N, self.itemsize, self.tiled)
        method = {"m": m, "M": shape.M}
        space = {"C": ws.method.test_space}
        solve = {
            "USEFUL": ws.method.evict == Evict.LEAST_USEFUL,
            "KEEP_BEST": ws.stopping.keep_best,
            "BLOCKS": len(ws.block_rules),
        }
        self.block_norms = ws.reals if ws.block_norms is None else ws.block_norms
        stored = {"SCALED": ws.history.dtype in SCALED_DTYPES}
        mixed = {"MIXED": ws.method.mixing != 1}
        streamed = {"BLOCK": shape.BLOCK, "num_warps": shape.warps, **COMPILER}
        self.blocks = ws.scales.shape[3]
        self.alone = (
            len(self.parts) == 1
            and ws.layout.N <= self.shapes.SAMPLE_MAX_N
            and shape.M <= self.shapes.SAMPLE_MAX_COLUMNS
        )
        if self.alone:
            self.sample = functools.partial(
                kernels.sample_kernel[(B,)],
                **method, **space, **solve, **stored, **mixed, **streamed, TILED=self.tiled,
            )  # fmt: skip
            return
        self.split_memory(7 + 4 * m)
        self.gammas = torch.empty(B, m, dtype=ws.layout.acc, device=self.device)
        small = self.shapes.small(m)
        grids = [(B * part.chunks,) for part in self.parts]
        self.reduce = [
            functools.partial(kernels.reduce_kernel[grid], **method, **space, **stored, **streamed) for grid in grids
        ]
        self.decide = functools.partial(
            kernels.decide_kernel[(B,)], **method, **space, **solve, num_warps=small.warps,
            CHUNKS=self.shapes.chunk_tile(self.chunks, m), **COMPILER,
        )  # fmt: skip
        self.mix = [
            functools.partial(kernels.mix_kernel[grid], **method, **mixed, **stored, **streamed) for grid in grids
        ]
        self.finish = functools.partial(kernels.finish_kernel[(B,)], **method, BLOCK=256, num_warps=4, **COMPILER)

    def launch(self, f: list[Tensor], f_rows: Rows, f_prev: list[Tensor], f_prev_rows: Rows, previous: bool) -> None:
        if self.alone:
            self._launch_alone(f[0], f_rows, f_prev[0], f_prev_rows, previous)
        else:
            self._launch_split(f, f_rows, f_prev, f_prev_rows, previous)

    def _launch_alone(self, f: Tensor, f_rows: Rows, f_prev: Tensor, f_prev_rows: Rows, previous: bool) -> None:
        ws, part = self.ws, self.parts[0]
        self.sample(
            f, f_prev, _or(f_rows, ws.ints), _or(f_prev_rows, ws.ints),
            part.x[ws.cur], part.x[1 - ws.cur], part.saved,
            ws.history, ws.scales, ws.matrix, ws.gram, ws.norms, ws.ages, ws.ints, ws.reals, self.settings,
            self.block_norms, self.running, part.n, self.blocks, ws.layout.B, ws.tiles, self.padded,
            ws.stopping.max_iter, int(previous),
            F_ROWS=f_rows is not None, F_PREV_ROWS=f_prev_rows is not None,
        )  # fmt: skip

    def _launch_split(
        self, f: list[Tensor], f_rows: Rows, f_prev: list[Tensor], f_prev_rows: Rows, previous: bool
    ) -> None:
        ws, N, B = self.ws, self.ws.layout.N, self.ws.layout.B
        rows, rows_prev = _or(f_rows, ws.ints), _or(f_prev_rows, ws.ints)
        has_rows = {"F_ROWS": f_rows is not None}
        for part, launch, now, before in zip(self.parts, self.reduce, f, f_prev, strict=True):
            launch(
                now, before, rows, rows_prev, part.x[ws.cur], part.x[1 - ws.cur], ws.history, ws.scales, ws.norms,
                ws.ints, ws.reals, self.partials, part.n, part.offset, N, part.first_block, self.blocks,
                part.first_chunk, part.chunks, self.chunks, self.chunk, B, self.padded, int(previous),
                **has_rows, F_PREV_ROWS=f_prev_rows is not None,
            )  # fmt: skip
        self.decide(
            self.partials, self.outcomes, self.gammas, ws.matrix, ws.gram, ws.norms, ws.ages, ws.ints, ws.reals,
            self.settings, self.block_norms, self.running, self.chunks, self.padded, ws.stopping.max_iter,
            int(previous),
        )  # fmt: skip
        for part, launch, now in zip(self.parts, self.mix, f, strict=True):
            launch(
                now, rows, part.x[ws.cur], part.x[1 - ws.cur], part.saved, ws.history, ws.scales, self.gammas,
                self.outcomes, self.settings, self.flags, part.n, part.offset, N, part.first_block, self.blocks,
                part.first_chunk, part.chunks, self.chunks, self.chunk, B, **has_rows,
            )  # fmt: skip
        for part, now in zip(self.parts, f, strict=True):
            self.finish(
                now, rows, part.x[1 - ws.cur], ws.norms, self.outcomes, self.flags, ws.ints, part.n, self.chunks,
                self.padded, **has_rows, LAST=part is self.parts[-1],
            )  # fmt: skip


class _BroydenPlan(_Plan):
    def __init__(self, ws: BroydenWorkspace, evaluations: int) -> None:
        super().__init__(ws, evaluations)
        kernels: Any = importlib.import_module("deqfast.kernels.broyden")
        self.ws: BroydenWorkspace = ws
        B, N, acc = ws.layout.B, ws.layout.N, ws.layout.acc
        memory = {"memory": ws.method.memory}
        solve = {"SCALE_FIRST": ws.method.scale_first, "KEEP_BEST": ws.stopping.keep_best}
        self.gram = ws.gram.shape[1] > 0
        limit = self.shapes.SAMPLE_MAX_N * 4 // self.itemsize
        self.alone = len(self.parts) == 1 and limit >= N and not self.gram
        if self.alone:
            shape = self.shapes.chain(N, self.itemsize)
            self.sample = functools.partial(
                kernels.sample_kernel[(B,)], **memory, **solve, BLOCK=shape.BLOCK, num_warps=shape.warps, **COMPILER
            )
            return
        self.split_memory(2 + ws.method.memory)
        self.z = torch.empty(B, N, dtype=acc, device=self.device)
        self.weights = torch.empty(B, ws.method.memory, dtype=acc, device=self.device)
        self.starts = torch.empty(B, 3, dtype=acc, device=self.device)
        form = {"GRAM": self.gram}
        streamed = {"BLOCK": 1024, "PRODUCTS_BLOCK": 256 * 4 // self.itemsize, "num_warps": 4, **COMPILER}
        M, CHUNKS = self.shapes.power_of_two(ws.method.memory), self.shapes.chunk_tile(self.chunks, ws.method.memory)
        grids = [(B * part.chunks,) for part in self.parts]
        self.gather = [functools.partial(kernels.gather_kernel[grid], **memory, **form, **streamed) for grid in grids]
        self.chain = functools.partial(
            kernels.chain_kernel[(B,)], **memory, **solve, CHUNKS=CHUNKS, BLOCK=2048, num_warps=8, **COMPILER
        )
        self.recur = functools.partial(
            kernels.recur_kernel[(B,)], **memory, **solve, M=M, CHUNKS=CHUNKS, num_warps=1, **COMPILER
        )
        self.apply = [functools.partial(kernels.apply_kernel[grid], **memory, **form, **streamed) for grid in grids]
        self.finish = functools.partial(
            kernels.finish_kernel[(B,)], **memory, **form, M=M, CHUNKS=CHUNKS, BLOCK=256, num_warps=4, **COMPILER
        )

    def launch(self, f: list[Tensor], f_rows: Rows, f_prev: list[Tensor], f_prev_rows: Rows, previous: bool) -> None:
        ws, N = self.ws, self.ws.layout.N
        rows, has_rows = _or(f_rows, ws.ints), {"F_ROWS": f_rows is not None}
        if self.alone:
            part = self.parts[0]
            self.sample(
                f[0], rows, part.x[ws.cur], part.x[1 - ws.cur], part.saved, ws.history, ws.norms, ws.ints, ws.reals,
                self.settings, self.running, N, self.padded, ws.stopping.max_iter, **has_rows,
            )  # fmt: skip
            return
        for part, launch, now in zip(self.parts, self.gather, f, strict=True):
            launch(
                now, rows, part.x[ws.cur], self.z, ws.history, ws.ints, ws.reals, self.partials, part.n, part.offset,
                N, part.first_chunk, part.chunks, self.chunks, self.chunk, self.padded, **has_rows,
            )  # fmt: skip
        if self.gram:
            self.recur(
                ws.norms, ws.gram, self.weights, self.partials, self.outcomes, self.starts, ws.ints, ws.reals,
                self.settings, self.running, self.chunks, self.padded, ws.stopping.max_iter,
            )  # fmt: skip
        else:
            self.chain(
                self.z, ws.history, ws.norms, self.partials, self.outcomes, self.starts, ws.ints, ws.reals,
                self.settings, self.running, N, self.chunks, self.padded, ws.stopping.max_iter,
            )  # fmt: skip
        for part, launch, now in zip(self.parts, self.apply, f, strict=True):
            launch(
                now, rows, part.x[ws.cur], part.x[1 - ws.cur], part.saved, self.z, ws.history, self.weights,
                self.starts, self.outcomes, self.partials, self.flags, ws.reals, part.n, part.offset, N,
                part.first_chunk, part.chunks, self.chunks, self.chunk, self.padded, **has_rows,
            )  # fmt: skip
        for part, now in zip(self.parts, f, strict=True):
            self.finish(
                now, rows, part.x[1 - ws.cur], ws.norms, ws.gram, self.starts, self.outcomes, self.partials,
                self.flags, ws.ints, part.n, self.chunks, self.padded, **has_rows, LAST=part is self.parts[-1],
            )  # fmt: skip


def _or(rows: Rows, otherwise: Tensor) -> Tensor:
    return otherwise if rows is None else rows
