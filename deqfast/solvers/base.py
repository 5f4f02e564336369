"""What every solver's options are."""

from __future__ import annotations

from typing import Any

from .. import compiled
from ..loop.state import SolverState
from ..ops import grouped
from ..ops.layout import Layout, layout_of
from ..ops.workspace import Stopping, Workspace
from ..options import check_choice, check_samples, stopping


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
        batch_dims: int = 1,
        segments: Any = None,
        backend: str = "auto",
        history: SolverState | None = None,
    ) -> SolverState:
        """A state for a loop of your own, starting at a copy of ``z0``; see ``SolverState``.

        Args:
            z0: tensor (B, ...) or a tree of tensors that share dim 0.
            rtol: a sample stops at ||f(z) - z|| <= atol + rtol ||f(z)||. Default by dtype: 1e-8 float64, 1e-4 float32,
                4e-3 float16, 2e-2 bfloat16.
            atol: absolute part of the same, default 0.
            max_iter: evaluations at most; None: no limit.
            stop: "each" or "all", as in ``fixed_point``.
            batch_dims: leading dims that count samples, as there.
            segments: samples of unequal length, as there.
            backend: "auto", "native", "triton", "torch" or "reference".
            history: an earlier solve with the same solver and a state of the same structure, shape and dtype, whose
                columns are copied: of an f that has changed a little they save evaluations from the first one on.
                ``dq.Anderson`` with ``mix_every=1`` alone. The earlier state keeps its memory as long as you keep it.
        """
        check_choice("stop", stop, ("each", "all"))
        check_samples(batch_dims, segments)
        layout = layout_of(z0, batch_dims, segments, pads=segments is not None and grouped.pads(backend, z0))
        rule = stopping(rtol, atol, max_iter, layout.dtype)
        state = SolverState(self, z0, rule, backend=backend, layout=layout, together=stop == "all")
        if history is not None:
            state.take_over(history)
        return state
