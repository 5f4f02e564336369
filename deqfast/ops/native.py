"""C++ kernels on CPU tensors and CUDA kernels on CUDA tensors, called through the extension module ``deqfast._C``.

A plan holds the workspace's addresses for one solve; a step passes only where f's output lies. The module never sees
a tensor, so one wheel serves every torch version; addresses are taken here and in the state's short step only, always
of tensors that somebody keeps alive.

A step on a GPU is launched on torch's current stream and not waited for. What it returns is the count of running
samples ``LAG`` steps before, which the device has left in host memory by then or will in a moment: the host stays ahead
of the device by that many evaluations of f, and makes up to that many more than the samples need.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..status import Status
from .lag import capturing
from .layout import Layout, Leaf
from .workspace import AndersonWorkspace, BroydenWorkspace, Int, Workspace

_IMPORT_ERROR = ""
_C: Any = None
try:
    _C = importlib.import_module("deqfast._C")
except ImportError as error:  # a pure-Python install, or a module built for another Python
    _IMPORT_ERROR = str(error)

# A build for tests runs the CUDA kernels on CPU tensors, block after block.
EMULATED = _C is not None and _C.build_info()["cuda"] == "emulated"
LAG = 2  # steps
HUGE_PAGE_MIN_BYTES = 4 << 20
MAX_DIMS = 16  # that the kernels walk through; outputs of more are copied


def why_not(device: torch.device) -> str | None:
    """Why the native kernels cannot serve ``device``, or None when they can."""
    if _C is None:
        return f"the extension module deqfast._C is not built ({_IMPORT_ERROR})"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"deqfast._C has no kernels for device type {device.type!r}"
    if torch.version.hip is not None:
        return "deqfast._C has no kernels for AMD GPUs"
    if EMULATED or _C.build_info()["cuda"] is None:
        return "deqfast._C was built without CUDA kernels; build it where nvcc is, with DEQFAST_CUDA=on"
    return _why_not_cuda(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _why_not_cuda(index: int) -> str | None:
    return _C.cuda_why_not(index) or None


def bind(
    ws: Workspace, evaluations: int = 0
) -> Callable[[list[Tensor], list[Tensor] | None, Tensor | None, Tensor | None], int]:
    """The update of this workspace's solver; the closure keeps the workspace alive for the plan.

    ``evaluations`` is how many the solve has made.

    The update has an attribute ``failed``: () -> samples that stopped without having converged, known once none runs.
    For a state of one contiguous real tensor it has an attribute ``dense`` too, the same for outputs of f that are such
    tensors: (cur, address of f's output, address of the previous one or 0) -> samples still running.

    On a GPU it has attributes for steps that were captured in a graph: ``renew()``, for a new solve in the same memory;
    ``rewind(evaluations)``, the part of that the host keeps; ``report(lag)``, the samples running as of ``lag`` reports
    before; ``running``, the device's own count.
    """
    _C.cpu_isa()  # a wrong DEQFAST_CPU_ISA is said here, before f is evaluated
    plan, memory = _plan(ws, evaluations)
    layout = ws.layout
    leaf = layout.leaves[0]
    plain = len(layout.leaves) == 1 and leaf.plain
    stream = _stream_of(layout.device)

    def is_plain(leaves: list[Tensor] | None, rows: Tensor | None) -> bool:
        if leaves is None:
            return True
        t = leaves[0]
        return rows is None and t.dtype is leaf.dtype and t.is_contiguous() and not t.is_neg()

    def update(f: list[Tensor], f_prev: list[Tensor] | None, f_rows: Tensor | None, f_prev_rows: Tensor | None) -> int:
        if plain and is_plain(f, f_rows) and is_plain(f_prev, f_prev_rows):
            return dense(ws.cur, f[0].data_ptr(), 0 if f_prev is None else f_prev[0].data_ptr())
        return _general_step(plan, ws, f, f_prev, f_rows, f_prev_rows)

    if stream is None:
        dense = plan.step_dense
        update.failed = lambda: int((ws.int_row(Int.STATUS) > Status.CONVERGED).sum())  # type: ignore[attr-defined]
    else:

        def dense(cur: int, f: int, f_prev: int) -> int:
            return plan.step_dense(cur, f, f_prev, stream())

        assert memory is not None
        running = memory[:4].view(torch.int32)

        def renew() -> None:
            memory.zero_()
            running.fill_(layout.B)
            plan.rewind(0)

        def failed() -> int:
            count = plan.failed()
            if count < 0 and not capturing(layout.device):  # resumed, and no step made since
                count = int((ws.int_row(Int.STATUS) > Status.CONVERGED).sum())
            return max(0, count)

        attributes = {
            "failed": failed,
            "renew": renew,
            "rewind": plan.rewind,
            "report": lambda lag: plan.report(stream(), lag),
            "running": running,
        }
        vars(update).update(attributes)
    if plain:
        update.dense = dense  # type: ignore[attr-defined]
    return update


def _stream_of(device: torch.device) -> Callable[[], int] | None:
    """What gives torch's current stream on ``device`` as a number; None on a CPU."""
    if device.type != "cuda":
        return (lambda: 0) if EMULATED else None
    return functools.partial(torch._C._cuda_getCurrentRawStream, device.index)


def _general_step(
    plan: Any,
    ws: Workspace,
    f: list[Tensor],
    f_prev: list[Tensor] | None,
    f_rows: Tensor | None,
    f_prev_rows: Tensor | None,
    phase: int | None = None,
) -> int:
    alive = []
    for which, leaves in enumerate((f, f_prev or [])):
        for i, t in enumerate(leaves):
            alive.append(_place(functools.partial(plan.source, i, which), t, ws.layout.leaves[i]))
    rows = 0 if f_rows is None else f_rows.data_ptr()
    previous_rows = 0 if f_prev_rows is None else f_prev_rows.data_ptr()
    stream = _stream_of(ws.layout.device)
    return plan.step(
        ws.cur,
        f_prev is not None,
        rows,
        previous_rows,
        _C.STEP if phase is None else phase,
        0 if stream is None else stream(),
    )


def _place(source: Callable[..., None], t: Tensor, leaf: Leaf) -> Tensor:
    """Tell a plan where f's output for a leaf lies; returns the tensor to keep alive until the step is launched."""
    if leaf.plain and t.is_contiguous() and not t.is_neg():
        source(t.data_ptr(), CODES[t.dtype], leaf.n, True, [leaf.n], [1])
        return t
    view = _real_view(t, leaf)
    sizes, strides = _coalesce(view.shape[1:], view.stride()[1:])
    if len(sizes) > MAX_DIMS:
        view = view.contiguous()
        sizes, strides = [view[0].numel()], [1]
    dense = len(sizes) == 0 or (len(sizes) == 1 and strides[0] == 1)
    source(view.data_ptr(), CODES[view.dtype], view.stride(0), dense, sizes, strides)
    return view


def _real_view(t: Tensor, leaf: Leaf) -> Tensor:
    """``t`` with its inner dimensions in the leaf's memory order, complex numbers as pairs."""
    t = t.permute(leaf.order)
    return torch.view_as_real(t.resolve_conj()) if leaf.complex else t.resolve_neg()


def _coalesce(shape: Any, stride: Any) -> tuple[list[int], list[int]]:
    """Merge neighbouring dimensions that one stride walks through."""
    sizes: list[int] = []
    strides: list[int] = []
    for n, step in zip(shape, stride, strict=True):
        if n == 1:
            continue
        if sizes and strides[-1] == n * step:
            sizes[-1] *= n
            strides[-1] = step
        else:
            sizes.append(n)
            strides.append(step)
    return sizes, strides


CODES: dict[torch.dtype, Any] = {}
if _C is not None:
    CODES = {
        torch.float64: _C.DType.f64,
        torch.float32: _C.DType.f32,
        torch.bfloat16: _C.DType.bf16,
        torch.float16: _C.DType.f16,
        torch.int8: _C.DType.i8,
    }


def _plan(ws: Workspace, evaluations: int = 0, halves: bool = False) -> tuple[Any, Tensor | None]:
    """The plan of a workspace, and the device memory it works in beside that; ``halves``: not for whole steps only."""
    layout = ws.layout
    on_device = EMULATED or layout.device.type == "cuda"
    plan = _C.AndersonPlan() if isinstance(ws, AndersonWorkspace) else _C.BroydenPlan()
    plan.bind(
        B=layout.B,
        dtype=CODES[layout.dtype],
        leaves=_leaves(ws, layout),
        ints=ws.ints.data_ptr(),
        reals=ws.reals.data_ptr(),
        padded=ws.ints.shape[1],
        rtol=ws.rtol,
        atol=ws.atol,
        max_iter=ws.max_iter,
        keep_best=ws.keep_best,
        threads=torch.get_num_threads(),
    )
    if ws.block_norms is not None:
        plan.blocks(ws.block_norms.data_ptr(), ws.block_rules)
    if on_device:
        plan.on_device(layout.device.index or 0, layout.B, evaluations, 0 if EMULATED else LAG)
    if isinstance(ws, AndersonWorkspace):
        for large in (ws.history, ws.matrix, ws.gram):
            _advise(large)
        plan.method(
            ws.m,
            ws.test_space,
            ws.mixing,
            ws.ridge,
            ws.evict_least_useful,
            CODES[ws.history.dtype],
            ws.history.data_ptr(),
            ws.scales.data_ptr(),
            ws.matrix.data_ptr(),
            ws.gram.data_ptr(),
            ws.norms.data_ptr(),
            ws.ages.data_ptr(),
        )
    else:
        assert isinstance(ws, BroydenWorkspace)
        _advise(ws.history)
        plan.method(ws.memory, ws.scale_first, ws.history.data_ptr(), ws.norms.data_ptr(), ws.gram.data_ptr())
    return plan, _device_memory(plan, ws, evaluations, halves) if on_device else None


def _device_memory(plan: Any, ws: Workspace, evaluations: int, halves: bool) -> Tensor:
    memory = torch.zeros(plan.device_bytes(halves), dtype=torch.uint8, device=ws.layout.device)
    running = memory[:4].view(torch.int32)
    if evaluations:
        running.copy_((ws.int_row(Int.STATUS) == Status.RUNNING).sum())
        memory[8:12].view(torch.int32).copy_((ws.int_row(Int.STATUS) > Status.CONVERGED).sum())
    else:
        running.fill_(ws.layout.B)
    plan.use(memory.data_ptr(), halves)
    return memory


def _leaves(ws: Workspace, layout: Layout) -> list[tuple[int, int, int, int]]:
    return [
        (leaf.n, x.data_ptr(), y.data_ptr(), saved.data_ptr())
        for leaf, x, y, saved in zip(layout.leaves, ws.x[0], ws.x[1], ws.saved, strict=True)
    ]


def _advise(t: Tensor) -> None:
    size = t.numel() * t.element_size()
    if size >= HUGE_PAGE_MIN_BYTES and t.device.type == "cpu":
        _C.advise_huge_pages(t.data_ptr(), size)
