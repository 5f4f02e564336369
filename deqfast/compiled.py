"""torch.compile around a solve: one graph break, f's evaluations compiled, deqfast's own frames left alone.

The loop looks at data, so no graph can hold it: a graph ends at the call, and the next one begins after it. When the
call is then made, torch.compile would look at every Python frame below it and make many small graphs, again for every
solver and shape. It does so through a callback of the thread, which ``entry`` takes away for the length of the call and
gives back for the evaluations of f alone. So f is compiled as a plain call of it would be: with the backend, mode and
options of the surrounding torch.compile, and kept with its code, so that a new lambda at every call is compiled once.

The C functions below are those behind ``torch.compiler.disable``, which would import the compiler with this package.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, TypeVar

from torch import nn

from .called import Called
from .naming import check_names

try:
    from torch._C._dynamo.eval_frame import (
        _FrameAction,
        _FrameExecStrategy,
        get_eval_frame_callback,
        set_code_exec_strategy,
        set_eval_frame,
    )
except ImportError:  # a torch that renamed them: solves work, compiled models break their graphs more often
    get_eval_frame_callback = set_eval_frame = lambda *_: None  # type: ignore[assignment]
    set_code_exec_strategy = None  # type: ignore[assignment]

Function = TypeVar("Function", bound=Callable[..., Any])

_REASON = (
    "deqfast looks at data between evaluations of f, so that a graph ends at each call of it: "
    "leave out fullgraph=True, or make a dq.DEQ one operation with dq.nn.FullGraph"
)


def entry(*callables: str) -> Callable[[Function], Function]:
    """Mark a function below which torch.compile compiles nothing but the arguments named ``callables``.

    It also refuses keywords that the function does not have, with what was meant (``naming``).
    Outside of torch.compile it costs one look at the thread's callback, a few hundred nanoseconds in all.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function).parameters
        parameters = list(signature)
        # One with **kwargs looks through them itself.
        known = None if any(p.kind is p.VAR_KEYWORD for p in signature.values()) else dict.fromkeys(parameters)
        places = [(name, parameters.index(name)) for name in callables]

        @skip
        @functools.wraps(function)
        def enter(*args: Any, **kwargs: Any) -> Any:
            if known is not None:
                check_names(function.__name__, kwargs, known)
            callback = get_eval_frame_callback()
            if callback is None:
                return function(*args, **kwargs)
            given = list(args)
            for name, i in places:
                if name in kwargs:
                    kwargs[name] = _compiled(kwargs[name], callback)
                elif i < len(given):
                    given[i] = _compiled(given[i], callback)
            set_eval_frame(None)
            try:
                return function(*given, **kwargs)
            finally:
                set_eval_frame(callback)

        return enter  # type: ignore[return-value]

    return decorate


def skip(function: Function) -> Function:
    """Mark a function that torch.compile must neither trace nor compile, but whose calls it may; costs nothing."""
    _skip_code(function.__code__)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]
    return function


class Compiled:
    """A callable whose frames torch.compile sees, for a caller whose own it does not see."""

    def __init__(self, f: Callable[..., Any], callback: Any) -> None:
        self.f = f
        self.callback = callback

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``f(*args, **kwargs)``."""
        before = set_eval_frame(self.callback)
        try:
            return self.f(*args, **kwargs)
        finally:
            set_eval_frame(before)


def _compiled(f: Any, callback: Any) -> Any:
    return Compiled(f, callback) if callable(f) else f  # what is not gets its error message as usual


def through(way: Callable[..., Any], f: Callable[..., Any]) -> Callable[..., Any]:
    """``way(f, ...)`` as a function of the rest; ``way`` is a function with ``skip``."""
    return Compiled(functools.partial(way, f.f), f.callback) if isinstance(f, Compiled) else functools.partial(way, f)


def eager(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` without the surrounding compiler, nor its own where it came out of torch.compile itself.

    For what a compiled graph cannot do: be differentiated twice, or inside of torch.func. And for what it does badly:
    its backward makes the gradients of all its inputs, parameters included, where a backward solve asks for that of z
    alone, many times. (A cell of two 256 x 256 layers, batch 64, one thread of an EPYC, inductor, torch 2.13: 2.7 ms a
    backward, 1.1 ms eager. At 64 x 64 and 1024 x 1024 there was no difference.)
    """
    if isinstance(f, Called):
        f.f = eager(f.f)
    if isinstance(f, Compiled):
        f = f.f
    wrapped = getattr(f, "_orig_mod", None)  # of torch.compile(module)
    if isinstance(f, nn.Module) and isinstance(wrapped, nn.Module):
        return f if f._forward_hooks or f._forward_pre_hooks else wrapped
    # torch.compile(function) says who it is, since functools.wraps copies its attributes to others.
    if getattr(f, "_torchdynamo_wrapper_id", None) == id(f):
        return f._torchdynamo_orig_callable  # type: ignore[attr-defined]
    return f


def skip_frames_of(package: str) -> None:
    """Let torch.compile compile no frame of the imported modules of ``package``, wherever it meets one.

    It meets them without an ``entry`` in a compiled loop over a state of one's own.
    """
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            for code in _codes(vars(module), name):
                _skip_code(code)


def _skip_code(code: CodeType) -> None:
    if set_code_exec_strategy is None:
        return
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))


def _codes(namespace: Mapping[str, Any], module: str) -> Iterator[CodeType]:
    """The code of every function that was written in ``module``, methods and inner functions included."""
    for value in namespace.values():
        for part in (value.fget, value.fset) if isinstance(value, property) else (value,):
            function = getattr(part, "__func__", part)  # of a classmethod or staticmethod
            if getattr(function, "__module__", None) != module:
                continue
            if isinstance(function, FunctionType):
                yield from _with_inner(inspect.unwrap(function).__code__)
            elif isinstance(function, type):
                yield from _codes(vars(function), module)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)
