"""What every solver's options are."""

from __future__ import annotations

from typing import Any

from .. import compiled
from ..loop.state import SolverState
from ..ops.layout import Layout
from ..ops.workspace import Stopping, Workspace
from ..options import stopping


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
        backend: str = "auto",
    ) -> SolverState:
        """A state for a loop of your own, starting at a copy of ``z0``; see ``SolverState``.

        Args:
            z0: tensor (B, ...) or a tree of tensors that share dim 0.
            rtol: a sample stops at ||f(z) - z|| <= atol + rtol ||f(z)||. Default by dtype: 1e-8 float64, 1e-4 float32,
                4e-3 float16, 2e-2 bfloat16.
            atol: absolute part of the same, default 0.
            max_iter: evaluations at most; None: no limit.
            backend: "auto", "native", "triton", "torch" or "reference".
        """
        layout = Layout(z0)
        return SolverState(self, z0, stopping(rtol, atol, max_iter, layout.dtype), backend=backend, layout=layout)
