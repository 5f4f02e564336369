"""Checkpoints of torch.distributed.checkpoint: of each rank's own solve as a part of one batch, and looked at first."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch.distributed as dist

from ..ops.ranks import Ranks
from ..ops.shared import Group
from .saving import SAME, check_same
from .state import SolverState


class BatchShard:
    """A solve of this rank alone, as the part of a batch that its samples are: ranks in turn have its first ones.

    ``Stateful`` in the sense of torch.distributed.checkpoint, for ranks that each solve for samples of their own,
    without ``group=``: ``dcp.save({"solve": dq.BatchShard(state)}, ...)`` on every rank saves one solve of all samples,
    and ``dcp.load`` of other numbers of ranks, with other numbers of samples each, takes it up. Afterwards ``nfe`` is
    on every rank the most that one had made.

    Args:
        state: not one with ``group=``, which knows its ranks.
        group: the ranks; default all.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: the state is none, or is shared already.
    """

    def __init__(self, state: SolverState, group: Any = None) -> None:
        if not isinstance(state, SolverState):
            raise TypeError(f"state must be a SolverState, got {type(state).__name__}")
        if state.shared is not None:
            raise ValueError("state must be of this rank alone; one with group= is saved as it is")
        self.state = state
        self.shared = Group(Ranks(group), spread=False)

    def state_dict(self) -> dict[str, Any]:
        """As of the state, with tensors of the shape of the whole batch; on every rank at once."""
        return self.state.part(self.shared)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """As of the state; on every rank at once."""
        self.state.take_part(saved, self.shared)

    def description(self, group: Group | None) -> dict[str, Any]:
        """As of the state."""
        return self.state.description(group)


def restore(
    state: SolverState | BatchShard,
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    key: str = "solve",
    storage_reader: Any = None,
    process_group: Any = None,
) -> None:
    """Continue where ``torch.distributed.checkpoint.save({key: other}, ...)`` has found another state.

    It is ``torch.distributed.checkpoint.load({key: state}, ...)``, with what does not fit told in words before a tensor
    is read; ``load`` itself raises its ``CheckpointException`` about sizes. The two states may be of different numbers
    of ranks. Call it on every rank.

    Args:
        state: a state, or ``BatchShard``, of the same solver and z0, made with the same options, of one process or
            with ``group=``.
        checkpoint_id: where the checkpoint is, a folder, as of ``load``.
        key: under which it was saved.
        storage_reader: as of ``load``.
        process_group: the ranks that read; default those that share the state, else all.

    Raises:
        ValueError: there is no such solve in the checkpoint, or one of other options or of a state of another
            structure, shape or dtype; on every rank, with the state as before.
        RankError: it fits on some ranks alone.
    """
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415 - for checkpoints alone

    group = state.shared
    own = state.description(group)
    if process_group is None and group is not None:
        process_group = group.ranks.group
    settings = {"checkpoint_id": checkpoint_id, "storage_reader": storage_reader, "process_group": process_group}
    found: dict[str, Any] = {key: dict.fromkeys(SAME, "")}
    with warnings.catch_warnings():
        if not (dist.is_available() and dist.is_initialized()):
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            dcp.load(found, **settings)
        except dcp.CheckpointException as error:
            raise ValueError(f"no solve can be read under {key!r} of checkpoint {checkpoint_id!s}: {error}") from error
        check_same(found[key], own)
        dcp.load({key: state}, **settings)
