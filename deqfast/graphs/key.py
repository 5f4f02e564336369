"""What a recorded f depends on, as a key: a recording serves a call only if all that it would read is where it was."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..compiled import Compiled

_VALUES = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def identity(value: Any, device: torch.device) -> Hashable:
    """Equal for two values if a program for ``device``, recorded with the one, may run for the other.

    Tensors by address and layout, those on other devices also by version and, where they are one number, by that;
    modules by themselves, their mode, hooks, tensors and attributes; functions by their code and what they close over,
    so that a new lambda over the same module is the same; lists, tuples and dicts by what they hold; anything else by
    being the same object. Whoever keeps the key keeps the value alive.
    """
    return _identity(value, device, ())


def _identity(value: Any, device: torch.device, above: tuple[int, ...]) -> Hashable:
    if isinstance(value, _VALUES):
        return type(value), value
    if id(value) in above:  # a cycle, already part of the key
        return "above", above.index(id(value))
    above = (*above, id(value))

    def of(part: Any) -> Hashable:
        return _identity(part, device, above)

    if isinstance(value, Tensor):
        return _of_tensor(value, device)
    if isinstance(value, nn.Module):
        return "module", id(value), *(_of_module(part, of) for part in value.modules())
    if isinstance(value, types.FunctionType):
        cells = tuple(of(cell_content(cell)) for cell in value.__closure__ or ())
        extras = (value.__defaults__ or (), value.__kwdefaults__ or {}, vars(value))
        return "function", value.__code__, cells, *(of(extra) for extra in extras)
    if isinstance(value, types.MethodType):
        return "method", of(value.__func__), of(value.__self__)
    if isinstance(value, functools.partial):
        return "partial", *(of(part) for part in (value.func, value.args, value.keywords))
    if isinstance(value, Compiled):
        return "compiled", of(value.f), id(value.callback)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(of(part) for part in value)
    if isinstance(value, dict):
        return type(value), tuple((of(k), of(v)) for k, v in value.items())
    return "object", id(value)


def _of_tensor(t: Tensor, device: torch.device) -> Hashable:
    if t.layout != torch.strided:
        return "tensor", id(t), t._version
    place = (t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad)
    if t.device == device or t.is_meta:
        return place
    return place, t._version, t.item() if t.numel() == 1 and t.device.type == "cpu" else None


def _of_module(module: nn.Module, of: Callable[[Any], Hashable]) -> Hashable:
    return tuple((name, of(value)) for name, value in vars(module).items() if name != "_modules")


def cell_content(cell: types.CellType) -> Any:
    """What a closure's cell holds, None if nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
