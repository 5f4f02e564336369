"""Named ranges in a profile: the solve, f and the steps, the backward solve and its vjps.

They are ``torch.profiler.record_function`` ranges, and NVTX ranges under ``torch.autograd.profiler.emit_nvtx()``. A
solve looks once whether a profiler runs, and pays nothing more where none does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import record_function

Function = TypeVar("Function", bound=Callable[..., Any])

SOLVE = "deqfast::solve"
F = "deqfast::f"
STEP = "deqfast::step"
BACKWARD = "deqfast::backward"
VJP = "deqfast::vjp"
JOINT = "deqfast::joint"

_NOTHING = contextlib.nullcontext()


def around(name: str, call: Function) -> Function:
    """``call`` within a range of this name; itself where no profiler runs."""
    if not _profiler_enabled():
        return call

    @functools.wraps(call, updated=())
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return call(*args, **kwargs)

    return ranged  # type: ignore[return-value]


def within(name: str) -> contextlib.AbstractContextManager[Any]:
    """The range itself."""
    return record_function(name) if _profiler_enabled() else _NOTHING
