"""deqfast's solvers in torchdeq's own registry, under their own names."""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ...options import check_flag
from ...warning import warn
from . import _faithful, _gradients, _solvers
from ._config import SOLVERS

KNOWN_VERSION = "0.1.0"
_FAITHFUL: dict[str, Callable[..., Any]] = {
    **SOLVERS,
    "anderson": _faithful.anderson_solver,
    "broyden": _faithful.broyden_solver,
    "fixed_point_iter": _faithful.fixed_point_iter,
}
_FACTORIES = ("core", "grad")  # the modules of torchdeq that name backward_factory


class InstallWarning(UserWarning):
    """torchdeq's solvers were replaced too late for some modules, by another version, or not at all."""


@dataclass
class _Installed:
    """What stands in torchdeq now, and what stood there."""

    solvers: dict[str, Any]
    theirs: dict[str, Any]
    factories: dict[str, Any]
    faithful: bool


_now: _Installed | None = None
_lock = threading.RLock()
_said: set[str] = set()


def install(*, faithful: bool = False) -> None:
    """Put deqfast's solvers into torchdeq's registry, in place of its own and under their names.

    Both passes then run on them, and with them ``ift=True`` and ``hook_ift=True`` are made by ``dq.Implicit``.
    torchdeq looks a solver up when a module is built: install before ``get_deq``. Modules that are there already keep
    what they have, which is said in an ``InstallWarning``. Modules that were built while it was installed keep
    deqfast's solvers, pickle, and load where torchdeq and deqfast are there, installed or not.

    A second call changes nothing, but for ``faithful``. Threads may call it; which solvers a module gets that another
    thread builds meanwhile is open. Solvers that somebody else registers afterwards stay.

    Args:
        faithful: keep torchdeq's own recurrences (absolute ridge, tau, no better than they are) and its backward pass;
            what is recorded and refused is deqfast's.

    Raises:
        ImportError: torchdeq is not installed.
    """
    check_flag("faithful", faithful)
    global _now
    with _lock:
        solver, modules = _torchdeq()
        if _now is not None and _now.faithful == faithful:
            return
        if _now is not None:
            _take_out(_now, solver, modules)
        chosen = _FAITHFUL if faithful else SOLVERS
        theirs = {name: _registered(solver, name) for name in chosen}
        _warn_of_built(modules, theirs)
        for name, function in chosen.items():
            solver.register_solver(name, function)
        factories = {}
        if not faithful:
            factories = {name: module.backward_factory for name, module in modules.items() if name in _FACTORIES}
            for name, factory in factories.items():
                modules[name].backward_factory = _Factory(factory)
        _now = _Installed(dict(chosen), theirs, factories, faithful)


def uninstall() -> None:
    """Give torchdeq its own solvers back; says so, and does nothing, where nothing was installed."""
    global _now
    with _lock:
        if _now is None:
            warn("deqfast.compat.torchdeq is not installed: there is nothing to uninstall", InstallWarning)
            return
        solver, modules = _torchdeq()
        _take_out(_now, solver, modules)
        _now = None


@contextlib.contextmanager
def installed(*, faithful: bool = False) -> Iterator[None]:
    """``install`` for the length of a block; afterwards it is as it was before."""
    with _lock:
        before = _now.faithful if _now is not None else None
        install(faithful=faithful)
    try:
        yield
    finally:
        with _lock:
            if before is not None:
                install(faithful=before)
            elif _now is not None:
                uninstall()


class _Factory:
    """torchdeq's backward_factory, where the backward solver is none of deqfast's."""

    def __init__(self, theirs: Callable[..., Any]) -> None:
        self.theirs = theirs

    def __call__(self, grad_type: Any = "ift", *args: Any, **kwargs: Any) -> Any:
        """A functor that makes gradients."""
        solver = kwargs.get("b_solver", args[1] if len(args) > 1 else None)
        if grad_type == "ift" and (solver is None or _solvers.linear_solver(solver, 1) is None):
            return self.theirs(grad_type, *args, **kwargs)  # somebody's own solver
        return _gradients.backward_factory(grad_type, *args, **kwargs)


def _torchdeq() -> tuple[Any, dict[str, Any]]:
    """torchdeq.solver, and the modules whose names are replaced."""
    try:
        solver = importlib.import_module("torchdeq.solver")
        modules = {name: importlib.import_module(f"torchdeq.{name}") for name in _FACTORIES}
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("torchdeq"):
            raise
        raise ImportError(
            "there is no torchdeq to install deqfast's solvers into: pip install torchdeq, or use "
            "deqfast.compat.torchdeq.get_deq, which needs none"
        ) from error
    try:
        found = version("torchdeq")
    except PackageNotFoundError:
        found = "without a version"
    if found != KNOWN_VERSION and found not in _said:
        _said.add(found)
        warn(
            f"deqfast.compat.torchdeq was written for torchdeq {KNOWN_VERSION}, this is {found}: its solvers are "
            "replaced by what that version documents",
            InstallWarning,
        )
    return solver, {name: module for name, module in modules.items() if hasattr(module, "backward_factory")}


def _registered(solver: Any, name: str) -> Any:
    try:
        return solver.get_solver(name)
    except (AssertionError, KeyError, ValueError):  # a version without it
        return None


def _take_out(what: _Installed, solver: Any, modules: dict[str, Any]) -> None:
    for name, theirs in what.theirs.items():
        if theirs is not None and _registered(solver, name) is what.solvers[name]:
            solver.register_solver(name, theirs)
    for name, factory in what.factories.items():
        if name in modules and isinstance(modules[name].backward_factory, _Factory):
            modules[name].backward_factory = factory


def _warn_of_built(modules: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Say how many modules were built with what is about to be replaced."""
    base = getattr(modules.get("core"), "DEQBase", None)
    if base is None:
        return
    old = [function for function in theirs.values() if function is not None]
    late = 0
    for thing in gc.get_objects():
        if issubclass(type(thing), base):
            solvers = getattr(thing, "f_solver", None), getattr(thing, "b_solver", None)
            late += any(function in old for function in solvers)
    if late:
        warn(
            f"install() comes too late for {late} module{'s' * (late > 1)} of torchdeq, which took "
            f"{'their solvers' if late > 1 else 'its solvers'} when built: call it before get_deq",
            InstallWarning,
        )
