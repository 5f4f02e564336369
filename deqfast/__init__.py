"""deqfast: fast, trustworthy fixed-point solvers for PyTorch.

>>> import deqfast as dq
>>> sol = dq.fixed_point(f, z0, args=(x,))
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import compiled as _compiled
from . import project
from .anderson import Anderson
from .broyden import Broyden
from .implicit import Implicit, OneStep, Phantom
from .jacobian import jacobian_penalty, spectral_radius
from .joint import JointSolution, joint_solve
from .joint_gradient import Envelope
from .joint_step_size import joint_step_size
from .linear import GradientWarning
from .nn import DEQ
from .ops import library as _library  # noqa: F401  registers torch.ops.deqfast
from .picard import Picard
from .solution import ConvergenceError, Solution
from .solve import fixed_point, root
from .state import SolverState
from .status import Status
from .unroll import Unroll

try:
    __version__ = version("deqfast")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0+unknown"

_compiled.skip_frames_of(__name__)

__all__ = [
    "DEQ",
    "Anderson",
    "Broyden",
    "ConvergenceError",
    "Envelope",
    "GradientWarning",
    "Implicit",
    "JointSolution",
    "OneStep",
    "Phantom",
    "Picard",
    "Solution",
    "SolverState",
    "Status",
    "Unroll",
    "fixed_point",
    "jacobian_penalty",
    "joint_solve",
    "joint_step_size",
    "project",
    "root",
    "spectral_radius",
]
