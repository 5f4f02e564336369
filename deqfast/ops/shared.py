"""Solves that ranks share: samples that are spread over them, or samples of each that stop together."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

from . import contract
from .layout import Layout
from .ranks import RankError, Ranks
from .workspace import Stopping


class Group(NamedTuple):
    """Ranks and what they have in common.

    ``spread``: every sample, each rank has some of its numbers; else each has its own, and all stop together.
    ``overlapped``: while ranks tell one another f is evaluated once more, which may be in vain.
    """

    ranks: Ranks
    spread: bool
    overlapped: bool = True

    def settle(self, layout: Layout, solver: contract.Method, rule: Stopping, more: dict[str, object]) -> None:
        """Before a solve: what the ranks were given must fit together; the layout then knows the whole sample.

        Raises:
            RankError: on every rank, naming what differs.
        """
        said: dict[str, object] = {
            "solver": solver,
            "rtol": rule.rtol,
            "atol": rule.atol,
            "max_iter": rule.max_iter or "no limit",
            "dtype of z0": layout.dtype,
            **more,
        }
        if self.spread:
            said |= {"samples": layout.batch_shape, "structure of z0": layout.spec}
        rows = self.ranks.agree(said, (layout.N, layout.B))
        if self.spread:
            layout.spread_n = sum(row[0] for row in rows)


def group_of(group: Any, stop: str, overlapped: bool = True) -> Group | None:
    """What ``group`` and ``stop`` mean together; None: nothing is shared."""
    if group is None and stop != "consensus":
        return None
    return Group(Ranks(group), stop != "consensus", overlapped)


def tell(group: Any, stop: str, error: Exception) -> None:
    """To the other ranks, which wait before their solves, what this one has found."""
    if (group is None and stop != "consensus") or isinstance(error, RankError):
        return
    with contextlib.suppress(Exception):
        Ranks(group).give_up(error)


def refuse(group: Group | None, what: str) -> None:
    """Raise ValueError where ranks share the solve."""
    if group is not None:
        raise ValueError(f"{what} of a solve that ranks share cannot be made on one of them")
