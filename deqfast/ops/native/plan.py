"""C++ kernels on CPU tensors and CUDA kernels on CUDA tensors, called through the extension module ``deqfast._C``.

A plan holds the workspace's addresses for one solve; a step passes only where f's output lies. The module never sees
a tensor, so one wheel serves every torch version; addresses are taken in this folder and in the quick way of
``loop/outputs.py`` only, always of tensors that somebody keeps alive.

A step on a GPU is launched on torch's current stream and not waited for. What it returns is the count of running
samples ``LAG`` steps before, which the device has left in host memory by then or will in a moment: the host stays ahead
of the device by that many evaluations of f, and makes up to that many more than the samples need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...status import Status
from .. import recheck
from ..anderson import AndersonWorkspace
from ..broyden import BroydenWorkspace
from ..codes import Int
from ..contract import BoundStep, Leaves, Loop, Replay, Rows
from ..lag import LAG, capturing
from ..workspace import Workspace
from .extension import _C, CODES, EMULATED, array, stream_of
from .source import place

EMULATED_LAG = 0  # the same for kernels that are emulated on the CPU; tests set it
HUGE_PAGE_MIN_BYTES = 4 << 20


class NativeStep(BoundStep):
    """The update of a workspace's solver; after so many ``evaluations``."""

    counts_writes = False

    def __init__(self, ws: Workspace, evaluations: int) -> None:
        super().__init__(ws)
        _C.cpu_isa()  # a wrong DEQFAST_CPU_ISA is said here, before f is evaluated
        self.plan, memory = make_plan(ws, evaluations)
        layout = ws.layout
        leaf = layout.leaves[0]
        self._dtype = leaf.dtype
        stream = stream_of(layout.device)
        dense = self.plan.step_dense if stream is None else _streamed(self.plan, stream)
        if stream is not None:
            assert memory is not None
            self.replay = NativeReplay(self.plan, ws, memory, stream)
        self.exact = stream is None and not EMULATED
        self.quick = dense if len(layout.leaves) == 1 and leaf.plain else None

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """One update, launched and not waited for on a GPU."""
        if self.ws.own_residual is not None:
            self._hand_over_own()
        if self.quick is not None and self._is_plain(f, f_rows) and self._is_plain(f_prev, f_prev_rows):
            return self.quick(self.ws.cur, f[0].data_ptr(), 0 if f_prev is None else f_prev[0].data_ptr())
        return general_step(self.plan, self.ws, f, f_prev, f_rows, f_prev_rows)

    def _hand_over_own(self) -> None:
        ws = self.ws
        assert isinstance(ws, AndersonWorkspace) and ws.own_residual is not None and ws.own_columns is not None
        before = 0 if ws.own_previous is None else ws.own_previous.data_ptr()
        self.plan.own(residual=array(ws.own_residual), before=before, columns=array(ws.own_columns))

    def _is_plain(self, leaves: Leaves | None, rows: Rows) -> bool:
        if leaves is None:
            return True
        t = leaves[0]
        return rows is None and t.dtype is self._dtype and t.is_contiguous() and not t.is_neg()

    def outside(self, f: Leaves, f_rows: Rows, made: int | Tensor) -> Tensor | None:
        """Samples that converged earlier and are not within tolerance; on a CPU a kernel says whether any."""
        if isinstance(made, int) and self.replay is None and not EMULATED:
            alive = [
                place(functools.partial(self.plan.source, i, 0), t, leaf)
                for i, (t, leaf) in enumerate(zip(f, self.ws.layout.leaves, strict=True))
            ]
            count = self.plan.recheck(
                cur=self.ws.cur,
                f_rows=0 if f_rows is None else f_rows.data_ptr(),
                made=made,
                slack=recheck.SLACK,
                noise=recheck.noise(self.ws),
                same=recheck.SAME,
            )
            del alive
            if not count:
                return None
        return super().outside(f, f_rows, made)

    def failed(self) -> int:
        """Samples that stopped without having converged, known once none runs."""
        if self.replay is None:
            return super().failed()
        count = self.plan.failed()
        if count < 0 and not capturing(self.ws.layout.device):  # resumed, and no step made since
            count = super().failed()
        return max(0, int(count))


def _streamed(plan: Any, stream: Callable[[], int]) -> Callable[[int, int, int], int]:
    def dense(cur: int, f: int, f_prev: int, /) -> int:
        return int(plan.step_dense(cur, f, f_prev, stream()))

    return dense


class NativeReplay(Replay):
    """Steps that were captured in a graph."""

    def __init__(self, plan: Any, ws: Workspace, memory: Tensor, stream: Callable[[], int]) -> None:
        self._plan, self._B, self._memory, self._stream = plan, ws.layout.B, memory, stream
        self._index = ws.layout.device.index
        self.running = memory[:4].view(torch.int32)

    def renew(self) -> None:
        """Prepare for a new solve in the same memory."""
        self._memory.zero_()
        self.running.fill_(self._B)
        self._plan.rewind(0)

    def rewind(self, evaluations: int) -> None:
        """The part of ``renew`` that the host keeps."""
        self._plan.rewind(evaluations)

    def report(self, lag: int) -> int:
        """The samples running as of ``lag`` reports before."""
        return int(self._plan.report(self._stream(), lag))

    def why_no_loop(self) -> str | None:
        """What the driver lacks, if anything."""
        return _C.why_no_device_loop() or None

    def loop(self, pass_: Any, rest: Any, steps: int, made: Tensor, limit: int) -> Loop:
        """A graph with a WHILE node; see csrc/cuda/graph_loop.cu."""
        raw = [0 if part is None else part.raw_cuda_graph() for part in (pass_, rest)]
        for graph in raw:
            found = _C.node_not_allowed(graph) if graph else ""
            if found:
                raise ValueError(f"f launches {found}, which cannot stand in a loop on the device")
        pass_address, rest_address = raw
        return _C.DeviceLoop(
            device=self._index,
            pass_=pass_address,
            rest=rest_address,
            steps=steps,
            running=self.running.data_ptr(),
            made=made.data_ptr(),
            limit=limit,
        )


def general_step(
    plan: Any,
    ws: Workspace,
    f: Leaves,
    f_prev: Leaves | None,
    f_rows: Rows,
    f_prev_rows: Rows,
    phase: int | None = None,
) -> int:
    """A step, or the half of it that ``phase`` names, on sources of any layout."""
    alive = []
    for which, leaves in enumerate((f, f_prev or [])):
        for i, t in enumerate(leaves):
            alive.append(place(functools.partial(plan.source, i, which), t, ws.layout.leaves[i]))
    stream = stream_of(ws.layout.device)
    running: int = plan.step(
        cur=ws.cur,
        has_previous=f_prev is not None,
        f_rows=0 if f_rows is None else f_rows.data_ptr(),
        f_prev_rows=0 if f_prev_rows is None else f_prev_rows.data_ptr(),
        phase=_C.STEP if phase is None else phase,
        stream=0 if stream is None else stream(),
    )
    return running


def make_plan(ws: Workspace, evaluations: int = 0, halves: bool = False) -> tuple[Any, Tensor | None]:
    """The plan of a workspace, and the device memory it works in beside that; ``halves``: not for whole steps only."""
    layout, own = ws.layout, ws.own()
    on_device = EMULATED or layout.device.type == "cuda"
    memory = DeviceMemory(ws, evaluations) if on_device else None
    if own["history"].nbytes >= HUGE_PAGE_MIN_BYTES and not on_device:
        advise(own)
    # Written out, without helpers: a small solve is felt to take as long as what is paid for it once.
    plan = _PLANS[type(ws)](
        B=layout.B,
        dtype=CODES[layout.dtype],
        numbers=[leaf.n for leaf in layout.leaves],
        x=[(t.data_ptr(), t.nbytes) for t in ws.x[0]],
        x_prev=[(t.data_ptr(), t.nbytes) for t in ws.x[1]],
        saved=[(t.data_ptr(), t.nbytes) for t in ws.saved],
        ints=(ws.ints.data_ptr(), ws.ints.nbytes),
        reals=(ws.reals.data_ptr(), ws.reals.nbytes),
        stride=ws.ints.stride(0),
        stopping=ws.stopping,
        threads=torch.get_num_threads(),
        blocks=None if ws.block_norms is None else _C.Blocks(norms=array(ws.block_norms), rules=ws.block_rules),
        place=None if memory is None else memory.place(halves),
        method=ws.method,
        history_dtype=CODES[ws.history.dtype],
        **{name: (t.data_ptr(), t.nbytes) for name, t in own.items()},
    )
    return plan, None if memory is None else memory.tensor


_PLANS: dict[type[Workspace], Any] = {}
if _C is not None:
    _PLANS = {AndersonWorkspace: _C.AndersonPlan, BroydenWorkspace: _C.BroydenPlan}


class DeviceMemory:
    """What a plan works in on a device beside its workspace, allocated when the plan says how much."""

    def __init__(self, ws: Workspace, evaluations: int) -> None:
        self.ws, self.evaluations = ws, evaluations
        self.tensor: Tensor | None = None

    def place(self, halves: bool) -> Any:
        """Where the solve runs, for the plan."""
        return _C.Place(
            index=self.ws.layout.device.index or 0,
            evaluations=self.evaluations,
            lag=EMULATED_LAG if EMULATED else LAG,
            halves=halves,
            allocate=self.allocate,
        )

    def allocate(self, size: int) -> int:
        """The address of zeroed bytes in which the counts of running and of failed samples are set."""
        ws = self.ws
        memory = torch.zeros(size, dtype=torch.uint8, device=ws.layout.device)
        running = memory[:4].view(torch.int32)
        if self.evaluations:
            running.copy_((ws.int_row(Int.STATUS) == Status.RUNNING).sum())
            memory[8:12].view(torch.int32).copy_((ws.int_row(Int.STATUS) > Status.CONVERGED).sum())
        else:
            running.fill_(ws.layout.B)
        self.tensor = memory
        return memory.data_ptr()


def advise(tensors: Mapping[str, Tensor]) -> None:
    """Ask for huge pages where that pays: faulting in a large history takes less time then."""
    for name in ("history", "matrix", "gram"):
        t = tensors.get(name)
        if t is not None and t.nbytes >= HUGE_PAGE_MIN_BYTES:
            _C.advise_huge_pages(t.data_ptr(), t.nbytes)
