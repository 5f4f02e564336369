"""From ``module:function`` to the arguments of ``compare``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..naming import did_you_mean

KEYS = ("f", "z0", "args", "params", "loss", "batch_dims")


class LoadError(Exception):
    """What was named is not there, or did not return what it should."""


def load(name: str) -> Any:
    """The function that ``module:function`` or ``path/to/file.py:function`` names."""
    module_name, colon, function_name = name.rpartition(":")
    if not colon or not module_name or not function_name:
        raise LoadError(f"expected module:function, got {name!r}")
    module = _module(module_name)
    try:
        return getattr(module, function_name)
    except AttributeError:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        meant = did_you_mean(function_name, public)
        raise LoadError(f"{module_name} has no {function_name!r}{meant}") from None


def problem(name: str) -> dict[str, Any]:
    """The arguments of ``compare`` that ``name`` returns when it is called."""
    function = load(name)
    if not callable(function):
        raise LoadError(f"{name} must be a function, got {type(function).__name__}")
    found = function()
    if isinstance(found, tuple) and len(found) == 2:
        found = {"f": found[0], "z0": found[1]}
    if not isinstance(found, dict):
        got = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
        raise LoadError(f"{name}() must return (f, z0) or a dict of {', '.join(KEYS)}, got {got}")
    for key in found:
        if key not in KEYS:
            raise LoadError(
                f"{name}() returned an unknown key {key!r}{did_you_mean(str(key), KEYS)}; known: {', '.join(KEYS)}"
            )
    for key in ("f", "z0"):
        if key not in found:
            raise LoadError(f"{name}() must return f and z0, got {', '.join(map(str, found)) or 'an empty dict'}")
    return found


def _module(name: str) -> Any:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise LoadError(f"there is no file {name}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise  # one that the module itself imports
        raise LoadError(
            f"there is no module {name!r} here; a file is named by its path, as in dir/{name}.py:..."
        ) from None


def named_old(name: str, known: tuple[str, ...]) -> str | Callable[..., Any]:
    """The name of an old solver, or the callable that module:function names."""
    return name if name in known or ":" not in name else load(name)
