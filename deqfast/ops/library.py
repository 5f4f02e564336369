"""The ops as ``torch.ops.deqfast.anderson_step`` and ``broyden_step``: schemas, fakes, and what they may not do.

For programs that torch.compile traces, and for torch.library.opcheck. An op is handed everything it reads and writes,
tensors and plain numbers, and runs the very code that the eager loop runs. It checks and binds all of it at every call,
which takes longer than the step of a small state; the eager loop does so once a solve, and calls the binding itself.
An op writes the next iterate over ``x_prev``: the caller swaps the two afterwards.

Arguments, with B samples of N numbers in leaves, m columns (read off ``history``), tiles of 16 samples:

    f, f_prev              f at x and at x_prev (absent at the first step); leaves (B', ...)
    f_rows, f_prev_rows    (B,) int32, sample -> row of f, -1 for a sample that f no longer sees; absent: all rows
    x, x_prev, saved       leaves (B, ...), mutated: iterate, the one before, an earlier best one
    history                Anderson (2, B, m, N), of tiny samples (2, tiles, m, N, 16); Broyden (B, memory, N); mutated
    scales ... ages        small matrices and norms, as ``AndersonWorkspace`` and ``BroydenWorkspace`` describe them
    ints, reals            per-sample statistics, rows as in ``codes.Int`` and ``codes.Real``, mutated
    rtol ... keep_best     stopping rule; max_iter 0: no limit

Returns: (1,) int64, the samples that are still running.

Gradients are made outside of the ops (``deqfast/gradients/``), so that a tensor which requires them is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from ..status import Status
from .anderson import HISTORY_DTYPES, AndersonMethod, AndersonWorkspace, check_numbers
from .broyden import BroydenMethod, BroydenWorkspace
from .codes import Evict, Int
from .contract import choose
from .layout import Layout
from .workspace import Memory, Stopping, Workspace

M = TypeVar("M", AndersonMethod, BroydenMethod)

__all__ = ["ANDERSON_SCHEMA", "BROYDEN_SCHEMA", "arguments"]

_SOURCES = "Tensor[] f, Tensor[]? f_prev, Tensor? f_rows, Tensor? f_prev_rows"
_ITERATES = "Tensor(a!)[] x, Tensor(b!)[] x_prev, Tensor(c!)[] saved, Tensor(d!) ints, Tensor(e!) reals"
_COLUMNS = (
    "Tensor(f!) history, Tensor(g!) scales, Tensor(h!) matrix, Tensor(i!) gram, Tensor(j!) norms, Tensor(k!) ages"
)
_STEPS = "Tensor(f!) history, Tensor(g!) norms, Tensor(h!) gram"


def _numbers(group: type[tuple[Any, ...]], left_out: int = 0) -> str:
    """The fields of a group of numbers as arguments of a schema; ``left_out`` are read off the memory."""
    fields = list(get_type_hints(group).items())[left_out:]
    return ", ".join(f"{'int' if issubclass(kind, IntEnum) else kind.__name__} {name}" for name, kind in fields)


_STOPPING = _numbers(Stopping)
ANDERSON_SCHEMA = (
    f"anderson_step({_SOURCES}, {_ITERATES}, {_COLUMNS}, {_numbers(AndersonMethod, 1)}, {_STOPPING}) -> Tensor"
)
BROYDEN_SCHEMA = (
    f"broyden_step(Tensor[] f, Tensor? f_rows, {_ITERATES}, {_STEPS}, {_numbers(BroydenMethod, 1)}, {_STOPPING})"
    " -> Tensor"
)


def arguments(
    ws: Workspace,
    f: list[Tensor],
    f_prev: list[Tensor] | None = None,
    f_rows: Tensor | None = None,
    f_prev_rows: Tensor | None = None,
) -> tuple[Any, ...]:
    """What the op of this workspace's solver takes for one step from ``ws.x[ws.cur]``.

    Returns:
        The positional arguments of ``torch.ops.deqfast.anderson_step`` or ``broyden_step``. The op does not flip
        ``ws.cur``.
    """
    state = (list(ws.x[ws.cur]), list(ws.x[1 - ws.cur]), list(ws.saved), ws.ints, ws.reals)
    sources = (f, f_prev, f_rows, f_prev_rows) if ws.uses_previous else (f, f_rows)
    return *sources, *state, *ws.own().values(), *ws.method[1:], *ws.stopping


def _anderson_step(
    f: list[Tensor],
    f_prev: list[Tensor] | None,
    f_rows: Tensor | None,
    f_prev_rows: Tensor | None,
    x: list[Tensor],
    x_prev: list[Tensor],
    saved: list[Tensor],
    *given: Any,
) -> Tensor:
    memory, numbers = Given.of(x, x_prev, saved, AndersonWorkspace, given)
    history, layout = memory.tensors["history"], memory.layout
    if history.dim() not in (4, 5) or history.dtype not in HISTORY_DTYPES:
        raise ValueError(f"history: expected (2, B, m, N) of {HISTORY_DTYPES}, got {_is(history)}")
    if history.dtype == torch.float64 and layout.acc != torch.float64:
        raise ValueError(f"history: torch.float64 needs a float64 state, got {layout.dtype}")
    method, stopping = _split(AndersonMethod, history.shape[2], numbers)
    method = method._replace(evict=Evict(method.evict))
    check_numbers(method)
    return _run(AndersonWorkspace(layout, stopping, method, history.dtype, memory), f, f_prev, f_rows, f_prev_rows)


def _broyden_step(
    f: list[Tensor], f_rows: Tensor | None, x: list[Tensor], x_prev: list[Tensor], saved: list[Tensor], *given: Any
) -> Tensor:
    memory, numbers = Given.of(x, x_prev, saved, BroydenWorkspace, given)
    history = memory.tensors["history"]
    if history.dim() != 3 or history.shape[1] < 2:
        raise ValueError(f"history: expected (B, memory, N) with at least 2 steps of memory, got {_is(history)}")
    method, stopping = _split(BroydenMethod, history.shape[1], numbers)
    return _run(BroydenWorkspace(memory.layout, stopping, method, memory), f, None, f_rows, None)


def _split(method: type[M], columns: int, numbers: tuple[Any, ...]) -> tuple[M, Stopping]:
    at = len(numbers) - len(Stopping._fields)
    return method(columns, *numbers[:at]), Stopping(*numbers[at:])


class Given(Memory):
    """Memory that the caller of an op owns, checked: the kernels see addresses alone."""

    def __init__(self, layout: Layout, leaves: tuple[list[Tensor], ...], tensors: dict[str, Tensor]) -> None:
        super().__init__(layout.device)
        self.layout, self.leaves, self.tensors = layout, leaves, tensors

    @classmethod
    def of(
        cls,
        x: list[Tensor],
        x_prev: list[Tensor],
        saved: list[Tensor],
        workspace: type[Workspace],
        given: tuple[Any, ...],
    ) -> tuple[Given, tuple[Any, ...]]:
        """The iterates and the tensors at the beginning of ``given``, and the numbers after those."""
        names = ("ints", "reals", *workspace.kept)
        tensors = dict(zip(names, given, strict=False))
        return cls(Layout(list(x), "x"), (x, x_prev, saved), tensors), given[len(names) :]

    def iterates(self, layout: Layout) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The three of them."""
        x, x_prev, saved = self.leaves
        for name, leaves in (("x", x), ("x_prev", x_prev), ("saved", saved)):
            if len(leaves) != len(x):
                raise ValueError(f"{name}: expected {len(x)} tensors as in x, got {len(leaves)}")
            for t, leaf in zip(leaves, layout.leaves, strict=True):
                if t.device != layout.device:
                    raise ValueError(f"{name}: expected tensors on {layout.device}, where x is, got one on {t.device}")
                if t.shape != leaf.shape or t.dtype != leaf.dtype or not _same_memory(t, leaf.stride):
                    expected = f"{tuple(leaf.shape)} {leaf.dtype} with strides {tuple(leaf.stride)}"
                    raise ValueError(f"{name}: expected {expected}, got {_is(t)} with strides {t.stride()}")
        return list(x), list(x_prev), list(saved)

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of this name."""
        _expect(name, self.tensors[name], shape, dtype, self.device)
        return self.tensors[name]

    zeros = new

    def history(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The history."""
        return self.new("history", shape, dtype)


def _run(
    ws: Workspace, f: list[Tensor], f_prev: list[Tensor] | None, f_rows: Tensor | None, f_prev_rows: Tensor | None
) -> Tensor:
    layout = ws.layout
    if layout.B and layout.N:
        running_samples = ws.int_row(Int.STATUS) == Status.RUNNING
        _check_sources(layout, f, f_rows, "f", running_samples)
        if f_prev is not None:
            _check_sources(layout, f_prev, f_prev_rows, "f_prev", running_samples)
        backend = choose("auto", layout.device)
        made = int(ws.int_row(Int.STEPS).max()) if backend.counts_on_host else 1
        running = backend.bind(ws, made)(f, f_prev, f_rows, f_prev_rows)
        ws.own()  # what a step keeps elsewhere goes into the caller's memory
        if layout.device.type != "cpu":  # there the step does not wait for the device, and knows less
            return (ws.int_row(Int.STATUS) == Status.RUNNING).sum().view(1)
    else:
        running = 0
    return torch.full((1,), running, dtype=torch.int64, device=layout.device)


def _check_sources(layout: Layout, leaves: list[Tensor], rows: Tensor | None, name: str, needed: Tensor) -> None:
    """``needed``: (B,) bool, samples whose row will be read."""
    if rows is None:
        layout.flatten(leaves, name)
        return
    _expect(f"{name}_rows", rows, (layout.B,), torch.int32, layout.device)
    batch = leaves[0].shape[0] if leaves and leaves[0].dim() else 0
    layout.flatten(leaves, name, batch)
    if int(rows.max()) >= batch or int(rows.min()) < -1:
        raise ValueError(
            f"{name}_rows: expected rows from -1 to {batch - 1}, got {int(rows.min())} to {int(rows.max())}"
        )
    if bool((needed & (rows < 0)).any()):
        raise ValueError(f"{name}_rows: -1 says that a sample was dropped, got it for one that is running")


def _expect(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, where x is, got one on {t.device}")
    if t.shape != shape or t.dtype != dtype or not t.is_contiguous():
        raise ValueError(f"{name}: expected contiguous {shape} {dtype}, got {_is(t)} with strides {t.stride()}")


def _is(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype}"


def _same_memory(t: Tensor, stride: Sequence[int]) -> bool:
    return all(n <= 1 or a == b for n, a, b in zip(t.shape, t.stride(), stride, strict=True))


def _fake(f: list[Tensor], *rest: Any) -> Tensor:
    return f[0].new_empty(1, dtype=torch.int64)


_library = torch.library.Library("deqfast", "DEF")


def _register(schema: str, step: Callable[..., Tensor]) -> None:
    _library.define(schema)
    name = schema[: schema.index("(")]
    op: Any = getattr(torch.ops.deqfast, name).default
    mutated = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def without_gradients(keys: Any, *args: Any) -> Tensor:
        if torch.is_grad_enabled():
            for given, argument in zip(args, op._schema.arguments, strict=True):
                for t in given if isinstance(given, (list, tuple)) else (given,):
                    if isinstance(t, Tensor) and t.requires_grad:
                        raise RuntimeError(
                            f"deqfast::{name} makes no gradients, but {argument.name} requires them: detach it, and "
                            "use dq.fixed_point for gradients of the solution"
                        )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def counting_versions(keys: Any, *args: Any) -> Tensor:
        for i in mutated:
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    for device in ("CPU", "CUDA"):
        _library.impl(name, step, device)
    _library.impl(name, without_gradients, "Autograd", with_keyset=True)
    _library.impl(name, counting_versions, "ADInplaceOrView", with_keyset=True)
    torch.library.register_fake(f"deqfast::{name}", _fake, lib=_library)


_register(ANDERSON_SCHEMA, _anderson_step)
_register(BROYDEN_SCHEMA, _broyden_step)
