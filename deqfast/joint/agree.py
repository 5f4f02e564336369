"""What ranks that share a joint solve have to agree on before it begins."""

from __future__ import annotations

from typing import Any

from ..ops.shared import group_of
from ..ops.workspace import Stopping
from ..project import Projection
from .problem import Problem


def share(problem: Problem) -> None:
    """Where ranks share the solve: find them, that what they were given fits together, and how large samples are.

    Raises:
        RankError: on every rank, naming what differs.
    """
    options = problem.options
    group = problem.group = group_of(options.group, options.stop, overlapped=False)
    if group is None:
        return
    more: dict[str, object] = {
        "blocks": problem.blocks,
        "rtol": [rule[0] for rule in problem.rules],
        "atol": [rule[1] for rule in problem.rules],
        "accelerate": problem.accelerate,
        "damping": options.damping,
        "normalize": options.normalize,
        "safeguard": options.safeguard,
        "project": _set(problem.projection),
        "stop": options.stop,
        "returns": options.returns,
        "backward": options.backward,
        "backend": options.backend,
    }
    if group.spread:
        more["step_size"] = _step(problem.given_step)
        more["structure of x0"] = None if problem.x_layout is None else problem.x_layout.spec
    group.settle(problem.layout, options.solver, Stopping(0.0, 0.0, options.max_iter), more)
    if group.spread:
        numbers = tuple(leaf.n for leaf in problem.layout.leaves)
        rows = group.ranks.agree({"structure of z0": problem.z_layout.spec}, numbers)
        problem.leaf_numbers = [sum(column) for column in zip(*rows, strict=True)]
        problem.z_layout.spread_n = problem.numbers_of(list(range(len(problem.z_layout.leaves))))


def _set(projection: Any) -> str:
    """A projection in words; of its centre each rank has a part of its own."""
    if not isinstance(projection, Projection):
        return "nothing" if projection is None else "a function"
    p, center = projection, "" if projection.center is None else " around a centre"
    return f"ball {p.ball} of radius {p.radius:g}{center}, box [{p.low:g}, {p.high:g}]"


def _step(step_size: Any) -> object:
    """A step size in words; of tensors each rank has a part of its own."""
    if callable(step_size):
        return "a function"
    return step_size if step_size is None or isinstance(step_size, (int, float)) else "tensors"
