"""The ops: one complete solver update each, on a workspace, by whichever backend serves the device.

Solvers ``choose`` a backend, ``bind`` a workspace to it once a solve, and never ask which one answered. The folders of
the backends register themselves, in the order in which "auto" asks them.
"""

from . import native, triton, plain  # noqa: I001  the order is that of "auto"
from .contract import Backend, BoundStep, JointEnds, backends, choose, names, register, unregister, why_not

__all__ = [
    "Backend",
    "BoundStep",
    "JointEnds",
    "backends",
    "choose",
    "names",
    "native",
    "plain",
    "register",
    "triton",
    "unregister",
    "why_not",
]
