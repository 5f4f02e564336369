"""The loop of torchdeq's solvers: all stop with the worst sample, residuals are recorded, the best is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ... import transforms
from ...loop.images import Kept
from ...loop.state import SolverState
from ...ops.contract import Method
from ...ops.layout import Layout, layout_of
from ...ops.workspace import Stopping
from ._stat import ABS, MODES, Counted, SolverStat, nothing_known, room, statistics
from ._watch import DeviceWatch, HostWatch, Watch

_STALL = 30  # Broyden: near tol, and hardly any progress in so many steps


@dataclass
class Request:
    """One call of a solver, its arguments checked."""

    func: Callable[[Any], Any]
    x0: Any
    max_iter: int
    tol: float
    stop_mode: str
    indexing: Sequence[float]
    final: bool


class Stepper(Protocol):
    """What makes the steps.

    Attributes:
        measured: (2, B) relative and absolute residuals of the newest evaluation, in memory that stays.
    """

    measured: Tensor

    @property
    def z(self) -> Any:
        """The iterate to evaluate f at."""

    def step(self, fz: Any) -> bool:
        """Take f there; whether no sample runs any more."""

    def given(self) -> list[Tensor]:
        """What iterates lie in, if it is used again."""

    def evaluated(self) -> list[Tensor]:
        """Leaves of the iterate that was evaluated last, valid until the next step."""

    def moved(self) -> list[Tensor]:
        """Leaves of the iterate after it, valid until the second step from now."""

    def best(self) -> list[Tensor] | None:
        """Leaves of the iterates with the least ||f(z) - z||, or None where they are not kept."""

    def evaluations(self) -> int:
        """Evaluations until no sample ran any more."""

    def release(self) -> None:
        """No more steps."""


class Kernels:
    """Steps of deqfast's kernels.

    Args:
        solver: which.
        x0: the start.
        layout: of the state.
        rule: stops every sample when all are within it, without the host waiting for it; None: the loop stops them.
    """

    def __init__(self, solver: Method, x0: Any, layout: Layout, rule: Stopping | None) -> None:
        never = Stopping(0.0, -1.0)
        self._state = SolverState(solver, x0, rule or never, layout=layout, together=rule is not None)
        self._ws = self._state.ws
        self.measured = self._ws.reals[:2, : layout.B]

    @property
    def z(self) -> Any:
        """The iterate to evaluate f at."""
        return self._state.z

    def step(self, fz: Any) -> bool:
        """Take f there; whether no sample runs any more."""
        return self._state.step(fz)

    def given(self) -> list[Tensor]:
        """What iterates lie in."""
        return [*self._ws.x[0], *self._ws.x[1]]

    def evaluated(self) -> list[Tensor]:
        """Leaves of the iterate that was evaluated last."""
        return self._ws.x[1 - self._ws.cur]

    def moved(self) -> list[Tensor]:
        """Leaves of the iterate after it."""
        return self._ws.x[self._ws.cur]

    def best(self) -> list[Tensor] | None:
        """Leaves of the iterates with the least ||f(z) - z||."""
        return self._state.answer("best")[0]

    def evaluations(self) -> int:
        """Evaluations until no sample ran any more."""
        return max(1, int(self._state.steps.max()))

    def release(self) -> None:
        """Give the history back."""
        self._state.release()


@dataclass
class Way:
    """How a method's result is made.

    Attributes:
        counted: how it counts.
        image: what it returns: True, f at the best iterate; False, the iterate itself.
        mixed: tau of a plain iteration, whose image is the damped one; 0 for other methods.
        stalls: whether it gives up near ``tol``.
    """

    counted: Counted
    image: bool
    mixed: float = 0.0
    stalls: bool = False


def layout_for(x0: Any) -> Layout:
    """Samples as torchdeq counts them: by dim 0, and a tensor without dims is one."""
    return layout_of(x0, 0 if isinstance(x0, Tensor) and x0.dim() == 0 else 1, name="x0")


def on_host(layout: Layout) -> bool:
    """Whether a look at the residuals waits for nobody."""
    return layout.device.type == "cpu"


Maker = Callable[[Layout, Any, "Stopping | None"], Stepper]


@torch.no_grad()
def solve(request: Request, way: Way, make: Maker) -> tuple[Any, list[Any], SolverStat]:
    """The solution, the states that were asked for, and the statistics; within torch.func on the values alone."""
    if not transforms.active():
        return _solve(request, way, make)
    x0 = transforms.values(request.x0)
    with transforms.Outside() as outside, torch.no_grad():
        return _solve(replace(request, func=outside.inside(request.func), x0=x0), way, make)


def _solve(request: Request, way: Way, make: Maker) -> tuple[Any, list[Any], SolverStat]:
    layout = layout_for(request.x0)
    indices = sorted(request.indexing)
    start = [t.detach() for t in layout.tensors(request.x0)]
    limit = request.max_iter + way.counted.beyond if request.max_iter else 0
    if not limit or not layout.B or not layout.N:
        found = [layout.unflatten([t.clone() for t in start]) for _ in range(len(indices) + 1)]
        like = torch.empty(0, dtype=layout.acc, device=layout.device)
        return found[0], found[1:], nothing_known(way.counted, request.max_iter, layout.B, like)
    return _Solve(request, way, make, layout, start).run(limit, indices)


class _Solve:
    def __init__(self, request: Request, way: Way, make: Maker, layout: Layout, start: list[Tensor]) -> None:
        self._request, self._way, self._layout = request, way, layout
        self._mode = MODES[request.stop_mode]
        self._host = on_host(layout)
        rule = None
        if not self._host and not request.final:
            rule = Stopping(0.0, request.tol) if self._mode == ABS else Stopping(request.tol)
        self._stepper = make(layout, request.x0, rule)
        self._looks = not (request.final or (rule is not None and isinstance(self._stepper, Kernels)))
        self._watch: Watch = (HostWatch if self._host else DeviceWatch)(
            self._stepper.measured, self._mode, room(way.counted, request.max_iter)
        )
        # The kernels keep the best iterate by its absolute residual, while they run.
        kernels = isinstance(self._stepper, Kernels)
        self._keeps = way.image or request.final or not kernels or not self._host or self._mode != ABS
        self._next = bool(way.mixed) and self._host  # the image is the next iterate
        lasting = not way.image or self._next
        self._kept = Kept(layout, start, lasting, self._stepper.given(), self._instead)

    def run(self, limit: int, indices: list[float]) -> tuple[Any, list[Any], SolverStat]:
        request, watch, stepper, keeps = self._request, self._watch, self._stepper, self._keeps
        func, states, pending = request.func, [], indices[::-1]
        looks, tol, stalls = self._looks, request.tol, self._way.stalls
        made = 0
        while made < limit:
            fz = func(stepper.z)
            ended = stepper.step(fz)
            watch.take()
            made += 1
            if keeps:
                self._keep(fz, request.final or watch.better())
            while pending and pending[-1] <= made:
                pending.pop()
                states.append(self._best())
            if ended or (looks and (watch.within(tol) or (stalls and watch.stalled(tol, _STALL)))):
                break
        result = self._best()
        states += [self._best() for _ in pending]
        if not self._host:
            made = stepper.evaluations()
        stepper.release()
        found = statistics(watch, made, self._way.counted, request.max_iter, request.final)
        return result, states, found

    def _keep(self, fz: Any, better: Any) -> None:
        way, stepper = self._way, self._stepper
        if self._next:
            leaves = stepper.moved()
        elif way.image:
            leaves = self._layout.tensors(fz)
            if way.mixed not in (0.0, 1.0):
                pairs = zip(stepper.evaluated(), leaves, strict=True)
                leaves = [torch.lerp(x, t.to(x.dtype), way.mixed) for x, t in pairs]
        else:
            leaves = [t.clone() for t in stepper.evaluated()] if better is True else stepper.evaluated()
        self._kept.take(leaves, better)

    def _instead(self) -> list[Tensor]:
        return self._stepper.best() or [t.clone() for t in self._stepper.evaluated()]

    def _best(self) -> Any:
        if self._keeps:
            return self._kept.copy()
        stepper = self._stepper
        # Where every sample is at its best, no mask has to say which one is.
        leaves = stepper.evaluated() if self._watch.better() is True else stepper.best() or []
        return self._layout.unflatten([t.clone() for t in leaves])
