"""What ranks that share a joint solve have to agree on before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..ops.shared import Group
from ..ops.workspace import Stopping
from ..project import Projection

if TYPE_CHECKING:
    from .problem import Problem


def agree(group: Group, problem: Problem) -> None:
    """Raise RankError, on every rank, unless what they were given fits together."""
    options = problem.options
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
