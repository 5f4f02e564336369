"""What is recorded: a program, made of a solve and all that it depends on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..called import Called
from ..compiled import Compiled
from ..ops.contract import Method
from ..ops.layout import Layout
from ..ops.workspace import Stopping
from ..problem import Problem
from .key import cell_content, identity
from .recorder import CannotRecord


@dataclass
class Program:
    """What is recorded.

    ``prepare``: called once a solve with the static inputs, before the first evaluation; returns the f of the solve.
    """

    prepare: Callable[[list[Tensor]], Callable[[Any], Any]]
    inputs: list[Tensor]  # copied into static memory at every solve, and handed to ``prepare``
    key: Hashable  # beside the inputs' layout
    family: Hashable  # of programs that differ only in what f closes over
    layout: Layout
    solver: Method
    stopping: Stopping
    backend: str
    mode: str
    alive: Any = None  # whatever the key speaks of


def autocast_mode(device: torch.device) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for ``device``, and its dtype."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


@contextlib.contextmanager
def without_cast_cache(device: torch.device) -> Iterator[None]:
    """Autocast as it is, but with parameters cast anew at every use: a cast made once is not part of a graph."""
    enabled, dtype = autocast_mode(device)
    with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False) if enabled else _NOTHING:
        yield


_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def forward_program(problem: Problem) -> Program:
    """The program of a solve of z = f(z, *args)."""
    if problem.transformed:
        raise CannotRecord("a torch.func transform or forward mode surrounds the call")
    options = problem.options
    if isinstance(problem.f, Called):
        raise CannotRecord("kwargs and has_aux make another f of every call; hand tensors over through args")
    if options.stop == "all":
        raise CannotRecord('with stop="all" every evaluation is looked at')
    if options.returns in ("image", "next"):
        raise CannotRecord(f"returns={options.returns!r} looks at every evaluation")
    f, device = problem.f, problem.layout.device
    tensors, rebuild, rest, others = split(problem.args, device)

    def prepare(inputs: list[Tensor]) -> Callable[[Any], Any]:
        given = rebuild(inputs)

        def evaluate(z: Any) -> Any:
            with without_cast_cache(device):
                return f(z, *given)

        return evaluate

    return Program(
        prepare=prepare,
        inputs=tensors,
        key=("forward", identity(f, device), rest, autocast_mode(device)),
        family=family(f),
        layout=problem.layout,
        solver=problem.options.solver,
        stopping=problem.stopping,
        backend=problem.options.backend,
        mode=problem.options.mode,
        alive=(f, others),
    )


def split(
    args: tuple[Any, ...], device: torch.device
) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Any, ...]], Hashable, Any]:
    """The tensors of args, what puts others in their places, the identity of everything else, and that itself.

    Raises:
        CannotRecord: a tensor that a graph cannot read anew.
    """
    leaves, spec = pytree.tree_flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not _is_number(leaf, device)]
    tensors = [leaves[i] for i in places]
    for t in tensors:
        if t.device != device:
            raise CannotRecord(
                f"args holds a tensor on {t.device}, which a graph does not read again; move it to {device}"
            )
        if t.layout != torch.strided:
            raise CannotRecord(f"args holds a tensor of layout {t.layout}, which has no memory of its own to copy to")
    differentiated = tuple(t.requires_grad for t in tensors)
    others = [None if i in places else leaf for i, leaf in enumerate(leaves)]

    def rebuild(tensors: list[Tensor]) -> tuple[Any, ...]:
        filled = list(others)
        for i, t, wanted in zip(places, tensors, differentiated, strict=True):
            filled[i] = t.detach().requires_grad_(wanted)  # f may take derivatives of its own
        return pytree.tree_unflatten(filled, spec)

    key = (str(spec), tuple(places), differentiated, tuple(identity(leaf, device) for leaf in others))
    return [t.detach() for t in tensors], rebuild, key, others


def _is_number(t: Tensor, device: torch.device) -> bool:
    """Whether operations on ``device`` take ``t`` as a number: it is then part of the key."""
    return t.dim() == 0 and t.device.type == "cpu" and device.type != "cpu"


def family(f: Any) -> Hashable:
    """The same for functions that differ only in which tensors they close over."""
    while isinstance(f, (functools.partial, Compiled)):
        f = f.func if isinstance(f, functools.partial) else f.f
    function = getattr(f, "__func__", f)
    code = getattr(function, "__code__", None)
    if code is None:
        return id(f)
    cells = [cell_content(cell) for cell in function.__closure__ or ()]
    owners = [getattr(f, "__self__", None), *(value for value in cells if isinstance(value, nn.Module))]
    return code, tuple(id(owner) for owner in owners)
