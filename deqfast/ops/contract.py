"""What a solver asks of a backend, and what a backend may offer besides.

A backend is one folder (or module) that makes a ``Backend`` and ``register``s it; the package's own are in ``native/``,
``triton/`` and ``plain/``, and one from outside is registered the same way. Solvers ``choose`` one by name and device
and ``bind`` a workspace to it once a solve; from then on they call the ``BoundStep`` and never ask whose it is.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..naming import did_you_mean
from ..status import Status
from . import recheck
from .codes import Int
from .joint import JointWorkspace
from .layout import Layout
from .ranks import Ranks
from .workspace import Stopping, Workspace

Leaves = list[Tensor]
Rows = Tensor | None  # (B,) int32, sample -> row of f's output, -1: it is not in there; None: all rows in order


class Method(Protocol):
    """What a solve asks of a solver's options."""

    @property
    def uses_previous(self) -> bool:
        """Whether a step reads f at the previous iterate."""

    def workspace(self, layout: Layout, stopping: Stopping) -> Workspace:
        """The memory that a solve of states of ``layout`` needs."""


class QuickStep(Protocol):
    """The step of a state of one contiguous real tensor, for outputs of f that are such tensors of its dtype."""

    def __call__(self, cur: int, f: int, f_prev: int, /) -> int:
        """From ``x[cur]``, with the addresses of f's output and of the one before (0: none); samples still running."""


class BoundStep(ABC):
    """A solver's update, bound to a workspace for one solve; it keeps the workspace alive.

    An update measures every sample that runs, keeps its rows of ``ints`` and ``reals`` (``codes``; judged by
    ``block_norms`` where there are such), and stops it by ``ws.stopping``: converged, not finite, or at ``max_iter``
    with a label; the loop relies on that limit. Of one that stops the answer lies in both iterates afterwards; one that
    goes on has its next iterate in ``x[1 - cur]``, and an earlier best one in ``saved`` before it is overwritten. One
    that had stopped is left as it is. What a backend keeps elsewhere between steps it gives back in ``ws.settle``,
    which comes before another one is bound. ``ops/formulas`` has all of this in plain torch.

    Attributes:
        quick: the same in fewer words, or None where the backend or the state has no such way.
        replay: for steps that are captured in a graph and replayed, or None where steps cannot be.
        exact: whether the count that a step returns is its own, and not an earlier one.
        counts_writes: whether torch sees what a step writes, so that the versions of the iterates change.
    """

    quick: QuickStep | None = None
    replay: Replay | None = None
    exact: bool = False
    counts_writes: ClassVar[bool] = True

    def __init__(self, ws: Workspace) -> None:
        self.ws = ws

    @abstractmethod
    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """One update from ``x[cur]``, where f was evaluated, over ``x[1 - cur]``, which the caller then makes current.

        Args:
            f: f's output, read in place.
            f_prev: f at the iterate before, None when there is none; solvers that do not use it are given None.
            f_rows: where the samples are in ``f``.
            f_prev_rows: where they are in ``f_prev``.

        Returns:
            How many samples still run, as far as the host knows: on a device the count may be an earlier one.
        """

    def outside(self, f: Leaves, f_rows: Rows, made: int | Tensor) -> Tensor | None:
        """Samples that converged before evaluation ``made`` and are not within tolerance at its output ``f``.

        The residuals of those that are become those of this evaluation (``recheck.outside``). None where the backend
        knows on the host that there is no such sample. Called after the step, with ``cur`` as it was in it.
        """
        ws = self.ws
        if ws.layout.device.type == "cpu":
            earlier = (ws.int_row(Int.STATUS) == int(Status.CONVERGED)) & (ws.int_row(Int.STEPS) < made)
            if not bool(earlier.any()):
                return None
        return recheck.outside(ws, f, f_rows, made)

    def settle_into(self, saved: dict[str, Tensor]) -> None:  # noqa: B027
        """Write what is left for the next step beside the workspace, if anything, into a copy (``canonical``)."""

    def failed(self) -> int:
        """Samples that stopped without having converged; may wait for the device, and knows nothing under capture."""
        return int((self.ws.int_row(Int.STATUS) > Status.CONVERGED).sum())


class Replay(ABC):
    """What graphs need of a step whose launches were captured.

    Attributes:
        running: (1,) int32 on the device, its own count of running samples.
    """

    running: Tensor

    @abstractmethod
    def renew(self) -> None:
        """Prepare for a new solve in the same memory; its operations may be captured."""

    @abstractmethod
    def rewind(self, evaluations: int) -> None:
        """The part of ``renew`` that the host keeps, for a solve that has made so many evaluations."""

    @abstractmethod
    def report(self, lag: int) -> int:
        """The samples running as of ``lag`` reports before."""

    def why_no_loop(self) -> str | None:
        """Why the device cannot run the whole loop by itself, or None if it can."""
        return "the backend has no loop on the device"

    def loop(self, pass_: Any, rest: Any, steps: int, made: Tensor, limit: int) -> Loop:
        """A loop over captured graphs: ``pass_`` of ``steps`` evaluations while samples run, then the rest.

        Args:
            pass_: a ``torch.cuda.CUDAGraph`` kept open, or None.
            rest: another one, or None.
            steps: evaluations in a pass.
            made: (1,) int32 on the device, evaluations made.
            limit: evaluations at most.

        Raises:
            ValueError: what a graph holds cannot stand in a loop.
        """
        raise NotImplementedError(self.why_no_loop())


class Loop(Protocol):
    """A loop that the device runs by itself."""

    def launch(self, stream: int) -> None:
        """Start it on this stream; does not wait."""


class JointEnds(ABC):
    """What comes before and after the accelerated step of a joint solve."""

    def __init__(self, ws: JointWorkspace) -> None:
        self.ws = ws

    @abstractmethod
    def map(self, values: Leaves, step_size: float, cost: Tensor | None) -> None:
        """The map of the joint solve: writes ``mapped`` and the norms of each block.

        Args:
            values: f, p and q, a tensor for each of the workspace's parts.
            step_size: a_x.
            cost: (B,), or None; where it is no number it makes the norm of the adjoint none.
        """

    @abstractmethod
    def finish(self, cost: Tensor | None, made: int) -> None:
        """After the accelerated step of evaluation number ``made``: the record, and what is not accelerated."""


Binder = Callable[[Any, int], BoundStep]


class Backend(ABC):
    """One way to run the ops.

    Attributes:
        name: what users call it.
        counts_on_host: whether ``bind`` must be told exactly how many evaluations the workspace has seen.
        pads: whether segments of unequal length are padded to others of about theirs, because a step of its costs much
            however few the samples; else a step is made for each length.
        steps: for each kind of workspace it serves, what binds one: (workspace, evaluations made so far) -> the step.
    """

    name: str
    counts_on_host: bool = False
    pads: bool = False
    steps: Mapping[type[Workspace], Binder]

    @abstractmethod
    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot serve ``device`` here, or None when it can."""

    def automatic(self, device: torch.device) -> bool:
        """Whether backend="auto" may take it for ``device``; else it serves those who name it."""
        return True

    def takes_residual(self, ws: Workspace) -> bool:
        """Whether its step takes a residual of the caller's own, ``ws.own_residual`` (Anderson, Type II, no mixing)."""
        return False

    def bind(self, ws: Workspace, evaluations: int = 0) -> BoundStep:
        """The update of this workspace's solver, after so many evaluations."""
        ws.settle()
        binder = self.steps.get(type(ws))
        if binder is None:
            raise ValueError(f"backend {self.name!r} has no step for a {type(ws).__name__}")
        return binder(ws, evaluations)

    def spread(self, ws: Workspace, ranks: Ranks) -> BoundStep:
        """The update of a workspace whose samples are spread over ranks.

        Raises:
            ValueError: it has none.
        """
        raise ValueError(f"group needs a backend whose steps can be spread over ranks, backend {self.name!r} has none")

    @abstractmethod
    def joint(self, ws: JointWorkspace) -> JointEnds:
        """The ends of a joint step on this workspace."""


_backends: dict[str, Backend] = {}


def register(backend: Backend, before: str | None = None) -> None:
    """Make a backend known by its name; ``before``: "auto" asks it before that one, else after all others.

    Raises:
        TypeError: it is no ``Backend``, or its name or steps are missing or none.
        ValueError: the name is taken, or ``before`` names none.
    """
    global _backends  # replaced, not changed: another thread may be looking through it
    _check(backend)
    if backend.name in _backends or backend.name == "auto":
        raise ValueError(f"a backend named {backend.name!r} is registered already")
    if before is not None:
        _known("before", before)
    others = list(_backends.items())
    at = len(others) if before is None else list(_backends).index(before)
    _backends = dict([*others[:at], (backend.name, backend), *others[at:]])


def _check(backend: object) -> None:
    if not isinstance(backend, Backend):
        got = f"the class {backend.__name__}" if isinstance(backend, type) else type(backend).__name__
        raise TypeError(f"backend must be an instance of a Backend, got {got}")
    made, name, steps = type(backend).__name__, getattr(backend, "name", None), getattr(backend, "steps", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f"{made}.name must be what users call it by, a str, got {name!r}")
    if not isinstance(steps, Mapping) or not steps:
        raise TypeError(f"{made}.steps must map kinds of workspaces to what binds one, got {steps!r}")
    for kind, binder in steps.items():
        if not (isinstance(kind, type) and issubclass(kind, Workspace)):
            raise TypeError(f"{made}.steps must have kinds of workspaces for keys, got {kind!r}")
        if not callable(binder):
            raise TypeError(f"{made}.steps[{kind.__name__}] must be callable, got {binder!r}")


def _known(what: str, name: str) -> Backend:
    """The backend of that name; ValueError, with the known names, where there is none."""
    if name not in _backends:
        meant = did_you_mean(name, _backends) if isinstance(name, str) else ""
        raise ValueError(f"{what} must be one of {', '.join(map(repr, _backends))}, got {name!r}{meant}")
    return _backends[name]


def unregister(name: str) -> None:
    """Forget a backend; solves that it serves go on.

    Raises:
        ValueError: no backend has that name.
    """
    global _backends
    _known("name", name)
    _backends = {known: backend for known, backend in _backends.items() if known != name}


def backends() -> Iterator[Backend]:
    """Every registered backend, in the order in which "auto" asks them."""
    return iter(list(_backends.values()))


def names() -> tuple[str, ...]:
    """Their names, in that order."""
    return tuple(_backends)


def why_not(name: str, device: torch.device) -> str | None:
    """Why the backend cannot serve ``device`` here, or None when it can; ValueError: no backend has that name."""
    return _known("name", name).why_not(device)


def wish(backend: str) -> str:
    """What is asked for: ``DEQFAST_BACKEND`` may say what "auto" means."""
    return (os.environ.get("DEQFAST_BACKEND") or backend) if backend == "auto" else backend


def choose(
    backend: str, device: torch.device, kind: type[Workspace] | None = None, residual_for: Workspace | None = None
) -> Backend:
    """The backend that serves: ``DEQFAST_BACKEND`` or the first available one for "auto", else the one asked for.

    Args:
        backend: a name or "auto".
        device: that it serves.
        kind: of the workspace that "auto" takes one with a step for.
        residual_for: a workspace for which "auto" takes one that takes a residual of the caller's own.

    Raises:
        ValueError: unknown backend, or none that can serve this, with the reason.
    """
    asked = wish(backend)
    if asked == "auto":
        reasons = []
        for candidate in _backends.values():
            reason = _why_not_automatic(candidate, device, kind, residual_for)
            if reason is None:
                return candidate
            reasons.append(f"{candidate.name!r}: {reason}")
        raise ValueError(f"backend='auto' found none that serves device {device}; {'; '.join(reasons) or 'none known'}")
    source = "backend" if asked == backend else "DEQFAST_BACKEND"
    if asked not in _backends:
        raise ValueError(f"{source} must be one of 'auto', {', '.join(map(repr, _backends))}, got {asked!r}")
    if kind is not None and kind.asked_by and kind not in _backends[asked].steps:
        able = ", ".join(repr(name) for name, backend in _backends.items() if kind in backend.steps)
        raise ValueError(f"{kind.asked_by} needs backend='auto' or {able}, got {source}={asked!r}")
    reason = _backends[asked].why_not(device)
    if reason is not None:
        raise ValueError(f"{source}={asked!r} cannot serve device {device}: {reason}")
    return _backends[asked]


def _why_not_automatic(
    backend: Backend, device: torch.device, kind: type[Workspace] | None, residual_for: Workspace | None
) -> str | None:
    if residual_for is not None and not backend.takes_residual(residual_for):
        return "it takes no residual of the caller's own"
    if kind is not None and kind not in backend.steps:
        return f"it has no step for {kind.asked_by or kind.__name__}"
    if not backend.automatic(device):
        return "it serves those who name it"
    return backend.why_not(device)
