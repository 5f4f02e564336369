"""What a recorded f depends on, as a key: a recording serves a call only if all that it would read is where it was."""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import Compiled

_VALUES = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def identity(value: Any) -> Hashable:
    """Equal for two values exactly if a program recorded with the one may run for the other.

    Tensors by address and layout, modules by themselves, their mode and their tensors, functions by their code and what
    they close over, so that a new lambda over the same module is the same; anything else by being the same object.
    Whoever keeps the key keeps the value alive.
    """
    return _identity(value, ())


def _identity(value: Any, above: tuple[int, ...]) -> Hashable:
    if isinstance(value, _VALUES):
        return type(value), value
    if id(value) in above:  # a cycle, already part of the key
        return "above", above.index(id(value))
    above = (*above, id(value))
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, nn.Module):
        return "module", id(value), *(_of_module(part, above) for part in value.modules())
    if isinstance(value, types.FunctionType):
        cells = tuple(_identity(_content(cell), above) for cell in value.__closure__ or ())
        defaults = _identity(value.__defaults__ or (), above), _identity(value.__kwdefaults__ or {}, above)
        return "function", value.__code__, cells, defaults
    if isinstance(value, types.MethodType):
        return "method", _identity(value.__func__, above), _identity(value.__self__, above)
    if isinstance(value, functools.partial):
        return "partial", *(_identity(part, above) for part in (value.func, value.args, value.keywords))
    if isinstance(value, Compiled):
        return "compiled", _identity(value.f, above), id(value.callback)
    if type(value) in (tuple, list):
        return type(value), tuple(_identity(part, above) for part in value)
    if type(value) is dict:
        return "dict", tuple((_identity(k, above), _identity(v, above)) for k, v in value.items())
    return "object", id(value)


def _of_tensor(t: Tensor) -> Hashable:
    return t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad


def _of_module(module: nn.Module, above: tuple[int, ...]) -> Hashable:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    others = [v for v in vars(module).values() if isinstance(v, (*_VALUES, Tensor))]
    return module.training, tuple(_identity(v, above) for v in [*tensors, *others])


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
