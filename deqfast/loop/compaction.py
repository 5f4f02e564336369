"""Dropping converged samples from what f sees, where f treats samples independently.

The cost of a solve becomes the sum of the samples' own evaluations instead of B times the slowest. The batch shrinks
along a ladder of sizes (``rows.Schedule``); a shrunk batch is filled up with finished samples, whose rows the ops
ignore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..following import Following
from ..ops import recheck
from ..rows import RowCount, Schedule, trial_stride
from ..status import Status
from .state import SolverState


class Rowwise(Protocol):
    """A map of the state that can be made for some of its rows alone."""

    def whole(self, z: Any) -> Any:
        """The map at all rows."""

    def part(self, rows: Tensor, samples: Tensor) -> Callable[[Any], Any]:
        """The map at these rows of dim 0, as a function of their z; ``samples``: those that lie in them."""


class WithArguments:
    """``f(z, *args)``, of which some arguments follow the batch."""

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...], following: Following) -> None:
        self._f, self._args, self._following = f, args, following

    def whole(self, z: Any) -> Any:
        """``f(z, *args)``."""
        return self._f(z, *self._args)

    def part(self, rows: Tensor, samples: Tensor) -> Callable[[Any], Any]:
        """F with the arguments of these rows."""
        f, args = self._f, self._following.gather(self._args, rows)
        return lambda z: f(z, *args)


class Compactor:
    """Evaluates a map at the rows that still run, and feeds its smaller output back.

    Args:
        state: the solve, at its start.
        f: what it solves.
        following: how far it is believed that f treats samples independently.
        price: evaluations of a smaller batch that making the map for it costs.
        judged: ``state.judge`` may have to look at what was evaluated last.

    Attributes:
        following: as given.
        whole: why nobody is left out, or nobody any more; None: nothing speaks against it.
    """

    def __init__(
        self, state: SolverState, f: Rowwise, following: Following, *, price: float = 0.0, judged: bool = False
    ) -> None:
        self._state, self._f, self._judged = state, f, judged
        self.following = following
        self._tries, self._confirms = following.tries, following.confirms
        self._all = self._size = state.layout.batch_shape[0]  # rows of dim 0, and how many f sees
        self._inner = state.layout.B // max(1, self._all)  # samples a row
        self._schedule: Schedule | None = Schedule(self._all, confirms=self._confirms, price=price)
        self._chosen: Tensor | None = None  # samples that f sees, None: all
        self._places: Tensor | None = None  # sample -> row of what f sees, -1: dropped
        self._part: Callable[[Any], Any] = f.whole
        self._newest: list[Tensor] = []  # what f gave last of all rows, until the trial
        self._partial = False  # f has not seen every sample at the newest evaluation
        self._seen = self._looks = 0
        self.whole: str | None = None

    @property
    def unsure(self) -> bool:
        """Every sample has stopped, f did not see all of them when the last one did, and nobody said it need not."""
        return self._confirms and self._partial and self._state.done

    @property
    def count(self) -> RowCount:
        """Rows so far."""
        return RowCount(self._seen, self._all * (self._state.nfe - self._looks), self.whole)

    def evaluate(self) -> tuple[list[Tensor], Tensor | None]:
        """Evaluate f at the running samples and step; its leaves, and where the samples are in them (None: all)."""
        if self._state.known_running == self._state.layout.B:  # in a hurry: nobody has stopped
            return self._evaluate_whole(), None
        if self.unsure:
            return self._look()
        if self._schedule is not None:
            size = self._schedule.next(self._alive())
            if size < self._size:
                self._try(size) if self._tries else self._shrink(size)
        if self._chosen is None:
            return self._evaluate_whole(), None
        leaves = self._evaluate_part(self._state.z)
        self._state.advance(leaves, self._places)
        self._partial = True
        return leaves, self._places

    def _evaluate_whole(self) -> list[Tensor]:
        state = self._state
        fz = self._f.whole(state.z)
        self._seen += self._all
        if self._judged:
            leaves = state.layout.flatten(fz, "f(z)")
            state.advance(leaves, None)
        else:
            state.step(fz)
            leaves = state.layout.tensors(fz)
        if self._tries:
            self._newest = leaves
        return leaves

    def _look(self) -> tuple[list[Tensor], None]:
        """F at all samples, once all have stopped. Where that wakes one, f is none that treats them independently."""
        state = self._state
        converged = self._converged()
        fz = self._f.whole(state.z)
        self._seen += self._all
        self._looks += 1
        self._stay_whole(None)
        state.verify(fz)
        if self._converged() < converged:
            self.whole = "at an evaluation of all of it samples that had converged were not within tolerance"
        return state.layout.flatten(fz, "f(z)"), None

    def _converged(self) -> int:
        return int((self._state.status == int(Status.CONVERGED)).sum())

    def _try(self, size: int) -> None:
        """Shrink, if f of the smaller batch, where f of the whole one was taken last, is the same."""
        state = self._state
        self._tries, newest, self._newest = False, self._newest, []
        why = None
        try:
            self._shrink(size, every=trial_stride(size))
            chosen = self._chosen
            assert chosen is not None
            whole = [t.index_select(0, chosen) for t in newest]  # f may use one buffer for all of its outputs
            part = self._evaluate_part(state.evaluated())
            runs = state.running.flatten().index_select(0, chosen)  # the iterates of others may have been replaced
            apart = recheck.apart(state.ws, part, whole, runs)
            if apart is not None:
                why = f"f of a part of it came out otherwise, by {apart:.1e} relative"
            else:
                self._shrink(size)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            why = f"f of a part of it raised {type(error).__name__}: {first}"
        if why is not None:
            self._stay_whole(why)

    def _stay_whole(self, why: str | None) -> None:
        self._schedule, self.whole = None, why
        self._size, self._chosen, self._places, self._partial = self._all, None, None, False
        self._part = self._f.whole

    def _alive(self) -> int:
        """Rows that hold a sample which runs, as far as the host knows."""
        alive = self._state.known_running
        if self._inner == 1 or alive == self._state.layout.B:
            return alive // self._inner
        return int(self._running_rows().sum())

    def _running_rows(self) -> Tensor:
        """Which rows of dim 0 hold a sample that runs."""
        return self._state.running.reshape(self._all, self._inner).any(1)

    def _evaluate_part(self, z: Any) -> list[Tensor]:
        layout = self._state.layout
        assert self._chosen is not None
        some = layout.select(layout.tensors(z), self._chosen)
        self._seen += self._size
        return layout.flatten(self._part(layout.unflatten(some)), "f(z)", self._size)

    def _shrink(self, size: int, every: int = 1) -> None:
        """Choose so many rows, all that run among them; ``every``: of those one in so many, for a trial."""
        self._part = self._f.whole  # the part before may hold a graph
        order = torch.argsort(self._running_rows().int(), descending=True, stable=True)
        rows = order[:size].sort().values[::every]
        self._size = size = rows.numel()
        B, inner, device = self._state.layout.B, self._inner, rows.device
        self._chosen = (rows[:, None] * inner + torch.arange(inner, device=device)).flatten()
        self._places = torch.full((B,), -1, dtype=torch.int32, device=device)
        self._places[self._chosen] = torch.arange(size * inner, dtype=torch.int32, device=device)
        self._part = self._f.part(rows, self._chosen)
