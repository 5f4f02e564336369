"""What every solver's options are."""

from __future__ import annotations

from typing import Any

from .. import compiled
from ..loop.state import SolverState
from ..ops import grouped
from ..ops.layout import Layout, layout_of
from ..ops.shared import group_of, refuse, tell
from ..ops.workspace import Stopping, Workspace
from ..options import STOPS, check_choice, check_flag, check_samples, stopping


class Solver:
    """Options of a solver: an immutable value, shared freely between solves and threads."""

    @property
    def uses_previous(self) -> bool:
        """Whether a step reads f at the previous iterate."""
        return False

    def workspace(self, layout: Layout, stopping: Stopping) -> Workspace:
        """The memory this solver needs for states of ``layout``."""
        raise NotImplementedError

    @compiled.skip
    def init(
        self,
        z0: Any,
        *,
        rtol: float | None = None,
        atol: float = 0.0,
        max_iter: int | None = None,
        stop: str = "each",
        group: Any = None,
        batch_dims: int = 1,
        segments: Any = None,
        backend: str = "auto",
        history: SolverState | None = None,
        resumable: bool = False,
    ) -> SolverState:
        """A state for a loop of your own, starting at a copy of ``z0``; see ``SolverState``.

        Args:
            z0: tensor (B, ...) or a tree of tensors that share dim 0.
            rtol: a sample stops at ||f(z) - z|| <= atol + rtol ||f(z)||. Default by dtype: 1e-8 float64, 1e-4 float32,
                4e-3 float16, 2e-2 bfloat16.
            atol: absolute part of the same, default 0.
            max_iter: evaluations at most; None: no limit.
            stop: "each", "all" or "consensus", as in ``fixed_point``.
            group: ranks that share the solve, as there.
            batch_dims: leading dims that count samples, as there.
            segments: samples of unequal length, as there.
            backend: "auto", "native", "triton", "torch" or "reference".
            history: an earlier solve with the same solver and a state of the same structure, shape and dtype, whose
                columns are copied: of an f that has changed a little they save evaluations from the first one on.
                ``dq.Anderson`` with ``mix_every=1`` alone. The earlier state keeps its memory as long as you keep it.
            resumable: ``max_iter`` is where the state pauses and not where it ends: ``done`` is True then, samples that
                were still running stay so, ``solution()`` has their answers, and ``extend`` goes on. ``dq.Broyden()``
                keeps up to 100 steps then, whatever the limit.
        """
        try:
            check_choice("stop", stop, STOPS)
            check_samples(batch_dims, segments)
            layout = layout_of(z0, batch_dims, segments, pads=segments is not None and grouped.pads(backend, z0))
            rule = stopping(rtol, atol, max_iter, layout.dtype)
            limit = rule.max_iter if check_flag("resumable", resumable) and rule.max_iter else None
        except (TypeError, ValueError) as error:
            tell(group, stop, error)
            raise
        ranks = group_of(group, stop, overlapped=False)
        if ranks is not None:
            refuse(ranks if segments is not None or history is not None else None, "segments or history")
            ranks.settle(layout, self, rule, {"stop": stop})
        if limit:
            rule = rule._replace(max_iter=0)  # the kernels step on
        together = stop != "each"
        state = SolverState(self, z0, rule, backend=backend, layout=layout, together=together, limit=limit, group=ranks)
        if history is not None:
            state.take_over(history)
        return state
