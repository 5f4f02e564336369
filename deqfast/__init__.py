"""deqfast: fast, trustworthy fixed-point solvers for PyTorch.

>>> import deqfast as dq
>>> sol = dq.fixed_point(f, z0, args=(x,))
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import compiled as _compiled
from . import project
from .gradients.implicit import Implicit
from .gradients.linear import GradientWarning
from .gradients.phantom import OneStep, Phantom
from .gradients.unroll import Unroll
from .jacobian import jacobian_penalty, spectral_radius
from .joint.gradient import Envelope
from .joint.solution import JointSolution
from .joint.solve import joint_solve
from .joint.step_size import joint_step_size
from .loop.again import CouplingWarning
from .loop.restoring import BatchShard, restore
from .loop.state import SolverState
from .metrics import Metrics
from .nn import DEQ, ConvergenceWarning
from .ops import library as _library  # noqa: F401  registers torch.ops.deqfast
from .ops.ranks import RankError
from .roots import root
from .rows import RowCount
from .solution import BackwardReport, ConvergenceError, Solution
from .solve import fixed_point
from .solvers.anderson import Anderson
from .solvers.broyden import Broyden
from .solvers.picard import Picard
from .states import RandomStates, States
from .status import Status
from .unrolled import unroll

try:
    __version__ = version("deqfast")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0+unknown"

_compiled.skip_frames_of(__name__)


if TYPE_CHECKING:
    from .compare import compare as compare

    compat: ModuleType
else:

    def __getattr__(name: str) -> Any:
        if name in ("compare", "compat"):  # imported when they are first asked for
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DEQ",
    "Anderson",
    "BackwardReport",
    "BatchShard",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "CouplingWarning",
    "Envelope",
    "GradientWarning",
    "Implicit",
    "JointSolution",
    "Metrics",
    "OneStep",
    "Phantom",
    "Picard",
    "RandomStates",
    "RankError",
    "RowCount",
    "Solution",
    "SolverState",
    "States",
    "Status",
    "Unroll",
    "fixed_point",
    "jacobian_penalty",
    "joint_solve",
    "joint_step_size",
    "project",
    "restore",
    "root",
    "spectral_radius",
    "unroll",
]
