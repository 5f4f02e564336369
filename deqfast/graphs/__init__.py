"""Solves recorded as CUDA graphs: ``mode="graph"`` and ``mode="device"``."""

from .kept import ModeWarning, clear, replayed, warn
from .key import identity
from .program import Program, family, forward_program, split
from .recorder import CannotRecord

__all__ = [
    "CannotRecord",
    "ModeWarning",
    "Program",
    "clear",
    "family",
    "forward_program",
    "identity",
    "replayed",
    "split",
    "warn",
]
