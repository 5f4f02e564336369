"""From what a user names to the way gradients are made."""

from __future__ import annotations

from typing import Any

from .base import Gradient
from .implicit import Implicit

_MODES = "an Implicit, Phantom, OneStep or Unroll, None for Implicit(), or 'none' for no gradient"

_DEFAULT = Implicit()


def choose_gradient(backward: Any) -> Gradient | None:
    """The way that ``backward`` asks for; None: no gradient.

    Raises:
        ValueError, TypeError: neither a known name nor gradient options.
    """
    if backward is None:
        return _DEFAULT
    if isinstance(backward, Gradient):
        return backward
    if isinstance(backward, str):
        if backward == "none":
            return None
        raise ValueError(f"backward must be {_MODES}, got {backward!r}")
    got = f"the class {backward.__name__}" if isinstance(backward, type) else type(backward).__name__
    raise TypeError(f"backward must be {_MODES}, got {got}")
