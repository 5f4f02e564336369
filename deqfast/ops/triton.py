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
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..status import Status
from .lag import Lag, capturing
from .layout import Leaf
from .workspace import BLOCK, SCALED_DTYPES, AndersonWorkspace, BroydenWorkspace, Int, Workspace

OLDEST = (3, 6)
OLDEST_CAPABILITY = (8, 0)
ALIGNMENT = 16  # bytes; how a kernel reads may depend on it, and the order of its sums with that

COMPILER = {"enable_fp_fusion": True}  # said outright: Triton's default differs between versions

Rows = Tensor | None


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


def bind(ws: Workspace, evaluations: int = 0) -> Callable[[list[Tensor], list[Tensor] | None, Rows, Rows], int]:
    """The update of this workspace's solver, after so many evaluations.

    On a GPU it does not wait, and the count it returns is an earlier one. There it has the attributes for captured
    steps that ``native.bind`` describes.
    """
    plan: _Plan
    if isinstance(ws, AndersonWorkspace):
        plan = _AndersonPlan(ws, evaluations)
    else:
        assert isinstance(ws, BroydenWorkspace)
        plan = _BroydenPlan(ws, evaluations)

    def update(f: list[Tensor], f_prev: list[Tensor] | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        return plan.step(f, f_prev, f_rows, f_prev_rows)

    attributes: dict[str, Any] = {"failed": plan.failed}
    if ws.layout.device.type == "cuda":
        attributes |= {
            "renew": plan.renew,
            "rewind": plan.lag.rewind,
            "report": plan.report,
            "running": plan.running,
        }
    vars(update).update(attributes)
    return update


def load(name: str) -> Any:
    """A module of the kernels; importing the first one imports Triton."""
    return importlib.import_module(f"deqfast.kernels.{name}")


def bound(kernel: Any, grid: int, warps: int, **options: Any) -> Callable[..., None]:
    """The launches of a kernel by so many programs: what is compiled in is said here, the arguments at each launch."""
    return functools.partial(kernel[(grid,)], **options, num_warps=warps, **COMPILER)


def doubles(numbers: list[float], device: torch.device) -> Tensor:
    """Numbers for kernels to read, in float64: as arguments they would be rounded to float32."""
    there = torch.empty(len(numbers), dtype=torch.float64, device=device)
    for place, value in zip(there.unbind(), numbers, strict=True):
        place.fill_(value)  # a copy of host memory would wait for the device
    return there


class _Part:
    """A tensor of the state with numbers in it: its rows in every buffer, and where they lie in the history."""

    def __init__(self, ws: Workspace, index: int, offset: int, first_block: int) -> None:
        self.index, self.offset, self.first_block = index, offset, first_block
        self.leaf: Leaf = ws.layout.leaves[index]
        x = [self.leaf.rows(buffer[index]) for buffer in ws.x]
        saved, iterates = self.leaf.rows(ws.saved[index]), load("arguments").Iterates
        self.iterates = iterates(x[0], x[1], saved), iterates(x[1], x[0], saved)  # by ws.cur


class _Plan:
    """What a solve allocates beside its workspace, once, and the groups of arguments that its launches share."""

    def __init__(self, ws: Workspace, evaluations: int) -> None:
        self.ws = ws
        layout = ws.layout
        self.shapes, self.arguments = load("shapes"), load("arguments")
        self.device = layout.device
        self.itemsize = layout.acc.itemsize
        self.lag = Lag(layout.B, layout.device, ws.max_iter, evaluations)
        self.running = (ws.int_row(Int.STATUS) == Status.RUNNING).sum().to(torch.int32).reshape(1)
        self.padded = ws.ints.shape[1]
        numbers = [ws.rtol, ws.atol, math.sqrt(layout.N), *(number for rule in ws.block_rules for number in rule)]
        self.stopping = self.arguments.Stopping(doubles(numbers, self.device), self.running, ws.block_norms)
        self.rule = self.arguments.Rule(ws.keep_best, len(ws.block_rules))
        self.statistics = self.arguments.Statistics(ws.ints, ws.reals)
        self.parts = self._parts()
        self.chunks = share([part.leaf.n for part in self.parts])
        self.total = sum(part.own for part in self.chunks)

    def _parts(self) -> list[_Part]:
        parts: list[_Part] = []
        offset = block = 0
        for i, leaf in enumerate(self.ws.layout.leaves):
            if leaf.n:
                parts.append(_Part(self.ws, i, offset, block))
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
            now = self.outputs(f, f_rows)
            self.launch(now, now if f_prev is None else self.outputs(f_prev, f_prev_rows), f_prev is not None)
            return self.lag.read(self.running)

    def outputs(self, f: list[Tensor], rows: Rows) -> list[Any]:
        """What f returned, as arguments."""
        return [self.arguments.Output(_dense(f[part.index], part.leaf), rows) for part in self.parts]

    def launch(self, f: list[Any], f_prev: list[Any], previous: bool) -> None:
        """The kernels of one update."""
        raise NotImplementedError


def share(sizes: list[int]) -> list[Any]:
    """How programs share samples with tensors of these sizes: the ``Chunks`` of each."""
    size = load("shapes").chunk_size(sizes)
    own = [math.ceil(n / size) for n in sizes]
    return [load("arguments").Chunks(n, size, sum(own[:i]), own[i], sum(own)) for i, n in enumerate(sizes)]


def _dense(t: Tensor, leaf: Leaf) -> Tensor:
    """``t`` as dense, aligned rows: a copy where it is not stored like that."""
    rows = leaf.rows(t.resolve_neg()).resolve_neg()
    if not rows.is_contiguous():
        return rows.contiguous()
    return rows.clone() if rows.data_ptr() % ALIGNMENT else rows


class _AndersonPlan(_Plan):
    def __init__(self, ws: AndersonWorkspace, evaluations: int) -> None:
        super().__init__(ws, evaluations)
        kernels, columns, small = load("anderson"), load("columns"), load("small")
        self.ws: AndersonWorkspace = ws
        method, numbers = kernels.method_of(_method(ws))
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
        self.hand_on(int(kernels.HEAD) + 4 * m)
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
        ws, B, padded, max_iter, has_previous = self.ws, self.ws.layout.B, self.padded, self.ws.max_iter, int(previous)
        iterates = [part.iterates[ws.cur] for part in self.parts]
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
            self.finish(
                f[i], iterates[i], self.small, self.statistics, self.handed, self.chunks[i], padded, LAST=last
            )


class _BroydenPlan(_Plan):
    def __init__(self, ws: BroydenWorkspace, evaluations: int) -> None:
        super().__init__(ws, evaluations)
        kernels = load("broyden")
        self.ws: BroydenWorkspace = ws
        method, _ = kernels.method_of(ws)
        B, N, acc = ws.layout.B, ws.layout.N, ws.layout.acc
        gram = ws.gram.shape[1] > 0
        self.steps = [kernels.Steps(ws.history, ws.norms, ws.gram, N, *self.begin(part.offset)) for part in self.parts]
        solve = {"method": method, "rule": self.rule}
        limit = self.shapes.SAMPLE_MAX_N * 4 // self.itemsize
        self.alone = len(self.parts) == 1 and limit >= N and not gram
        if self.alone:
            shape = self.shapes.chain(N, self.itemsize)
            self.sample = bound(kernels.sample_kernel, B, shape.warps, **solve, BLOCK=shape.BLOCK)
            return
        self.hand_on(2 + ws.memory)
        self.scratch = kernels.Scratch(
            torch.empty(B, N, dtype=acc, device=self.device),
            torch.empty(B, ws.memory, dtype=acc, device=self.device),
            torch.empty(B, 3, dtype=acc, device=self.device),
        )
        M, tile = self.shapes.power_of_two(ws.memory), self.shapes.chunk_tile(self.total, ws.memory)
        walk = {"method": method, "GRAM": gram, "BLOCK": 1024, "PRODUCTS_BLOCK": 256 * 4 // self.itemsize}
        self.gather = [bound(kernels.gather_kernel, B * part.own, 4, **walk) for part in self.chunks]
        if gram:
            self.judge = bound(kernels.recur_kernel, B, 1, **solve, M=M, CHUNKS=tile)
        else:
            self.judge = bound(kernels.chain_kernel, B, 8, **solve, CHUNKS=tile, BLOCK=2048)
        self.apply = [bound(kernels.apply_kernel, B * part.own, 4, **walk) for part in self.chunks]
        self.finish = bound(kernels.finish_kernel, B, 4, method=method, GRAM=gram, M=M, CHUNKS=tile, BLOCK=256)

    def launch(self, f: list[Any], f_prev: list[Any], previous: bool) -> None:
        ws, padded = self.ws, self.padded
        iterates = [part.iterates[ws.cur] for part in self.parts]
        if self.alone:
            self.sample(
                f[0], iterates[0], self.steps[0], self.statistics, self.stopping, padded, ws.max_iter
            )
            return
        shared = self.statistics, self.handed, self.scratch
        for i, launch in enumerate(self.gather):
            launch(f[i], iterates[i], self.steps[i], *shared, self.chunks[i], padded)
        self.judge(
            self.steps[0], self.statistics, self.stopping, self.handed, self.scratch, self.total, padded, ws.max_iter
        )
        for i, launch in enumerate(self.apply):
            launch(f[i], iterates[i], self.steps[i], *shared, self.chunks[i], padded)
        for i in range(len(f)):
            last = i == len(f) - 1
            self.finish(f[i], iterates[i], self.steps[i], *shared, self.chunks[i], padded, LAST=last)


def _method(ws: AndersonWorkspace) -> Any:
    return SimpleNamespace(
        m=ws.m, test_space=ws.test_space, mixing=ws.mixing, ridge=ws.ridge, evict=ws.evict_least_useful
    )
