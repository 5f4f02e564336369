"""The convergence suite: about forty families of fixed points that people do solve.

The number of evaluations of f decides what a user waits for, and on easy problems every accelerated method ties.  The
suite therefore spans what the field meets: trained equilibrium networks at several spectral scales and their adjoints,
linear maps (normal, non-normal, complex, indefinite), discretised PDEs, first-order optimisation maps, joint
fixed-point/gradient maps, value iteration, and the same maps badly scaled or with noise in f.  No family is here
because a method does well on it: several are ones on which plain iteration is the better choice.

    from bench.problems import names, make
    problem = make("mlp/1")                      # float32
    oracle = make("mlp/1", dtype=torch.float64)  # the same numbers, more digits
"""

from __future__ import annotations

from fnmatch import fnmatch

import torch

from bench.families import linear, models, optimisation, pde, scaling, systems
from bench.families.base import REGISTRY, Problem

__all__ = ["QUICK", "Problem", "make", "names", "suite"]

_MODULES = (models, linear, pde, optimisation, systems, scaling)  # imported for their registrations, in this order

QUICK = (
    "mlp/1",
    "mlp-adjoint/2",
    "conv/1",
    "attention-adjoint/1",
    "linear/normal .99",
    "linear/non-normal .9",
    "pde/bratu Jacobi",
    "optimisation/lasso",
    "joint/linear",
    "decision/value iteration .9",
    "scaling/blocks 1e-3 to 1e3",
)


def names(pattern: str = "*", quick: bool = False) -> list[str]:
    """Names in registration order, of those that match a shell pattern."""
    pool = [name for name in REGISTRY if name in QUICK] if quick else list(REGISTRY)
    return [name for name in pool if fnmatch(name, pattern)]


def make(name: str, dtype: torch.dtype = torch.float32) -> Problem:
    """Build one problem; numbers are drawn in float64 and rounded once, so two dtypes give the same problem."""
    if name not in REGISTRY:
        raise ValueError(f"name must be one of {list(REGISTRY)}, got {name!r}")
    entry = REGISTRY[name]
    f, z0 = entry.build(dtype)
    if z0.dtype != dtype:
        raise TypeError(f"{name}: z0 must be {dtype}, got {z0.dtype}")
    return Problem(name, entry.family, f, z0, entry.notes, entry.cheap, entry.tightest)


def suite(dtype: torch.dtype = torch.float32, pattern: str = "*", quick: bool = False) -> list[Problem]:
    return [make(name, dtype) for name in names(pattern, quick)]
