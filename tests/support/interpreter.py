"""Triton's interpreter, made bearable."""

from __future__ import annotations

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Calls inside a kernel no longer patch triton.language: launches do so, and searching it took half of the time."""

    def call(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang(tl.sum.fn)  # what Triton's own functions name otherwise than kernels do
    interpreter.InterpretedFunction.__call__ = call
