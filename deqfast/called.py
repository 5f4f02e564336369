"""f with keyword arguments, and with something beside z in what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class Called:
    """``f(z, *args, **kwargs)``, of which only z goes on.

    Args:
        f: the caller's.
        kwargs: handed to it, or None.
        has_aux: it returns (z, aux).

    Raises:
        TypeError: ``kwargs`` is no mapping with names, or f does not return a pair where it should.

    Attributes:
        f: the caller's.
        newest: aux of the last evaluation before ``hold``.
    """

    def __init__(self, f: Callable[..., Any], kwargs: Mapping[str, Any] | None, has_aux: bool) -> None:
        if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(k, str) for k in kwargs)):
            raise TypeError(f"kwargs must be a mapping from names to values, got {type(kwargs).__name__}")
        self.f, self._kwargs, self._has_aux = f, dict(kwargs or {}), has_aux
        self._held = False
        self.newest: Any = None

    def __call__(self, *args: Any) -> Any:
        """What f returns, without aux."""
        found = self.f(*args, **self._kwargs)
        if not self._has_aux:
            return found
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(f"f must return (z, aux) with has_aux=True, got {type(found).__name__}")
        if not self._held:
            self.newest = found[1]
        return found[0]

    def hold(self) -> None:
        """What follows are evaluations for a derivative."""
        self._held = True
