"""Warnings stand at the line of the user's that led to them."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_BETWEEN = ("deqfast", "torch")  # modules call layers, and autograd backward solves, from frames of torch


def warn(text: str, category: type[Warning]) -> None:
    """Warn at the innermost frame outside of deqfast and torch.

    The outermost frame where there is none: autograd calls a backward on a GPU from a thread of its own.
    """
    frame: FrameType = sys._getframe(1)
    while frame.f_back is not None and (frame.f_globals.get("__name__") or "").split(".")[0] in _BETWEEN:
        frame = frame.f_back
    module, registry = frame.f_globals.get("__name__") or "", frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, module, registry)
