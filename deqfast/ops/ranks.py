"""The ranks of a process group: what they add up, and what they have to agree on before they begin.

The engine is torch.distributed, with whatever its groups run on (gloo, NCCL). An error that is found on one rank is
raised on all of them, in the same words, so that none waits for another that has given up.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankError(RuntimeError):
    """What one rank was given cannot be, or ranks were given what does not fit together; raised on every rank."""


class Ranks:
    """A process group.

    Args:
        group: a ``ProcessGroup``, a ``DeviceMesh`` of one dim, or None for the default group.

    Attributes:
        size, rank: how many, and which this is.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: it is no group, or this rank is not in it.
    """

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "ranks need a process group: call torch.distributed.init_process_group first, under torchrun"
            )
        if hasattr(group, "get_group") and hasattr(group, "ndim"):  # a DeviceMesh
            if group.ndim != 1:
                raise ValueError(f"group must be a mesh of one dim, got one of {group.ndim}: take a dim, mesh['name']")
            group = group.get_group()
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must hold this rank, got one that it is not in")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
        self.group = dist.group.WORLD if group is None else group
        if dist.get_rank(self.group) < 0:
            raise ValueError("group must hold this rank, got one that it is not in")
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)

    def __repr__(self) -> str:
        return f"Ranks({self.rank} of {self.size})"

    def __reduce__(self) -> Any:
        raise TypeError("a process group cannot be copied or pickled; make the solve anew on every rank")

    def add(self, t: Tensor) -> None:
        """``t`` becomes the sum over all ranks, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(t, group=self.group)

    def begin(self, t: Tensor) -> Callable[[], object]:
        """The same, not waited for; the result is called to wait."""
        if self.size == 1:
            return _nothing
        work = dist.all_reduce(t, group=self.group, async_op=True)
        assert work is not None
        return work.wait

    def gather(self, said: Any) -> list[Any]:
        """What every rank says, in the order of ranks; anything that can be pickled."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, said, group=self.group)
        return every

    def agree(self, said: Mapping[str, object], numbers: tuple[int, ...] = ()) -> list[list[int]]:
        """What every rank says must be the same; of each rank its ``numbers``.

        One small gather; where ranks differ a second one tells everybody what about.

        Raises:
            RankError: on every rank, naming what differs.
        """
        words = {name: str(value) for name, value in said.items()}
        mark = zlib.crc32(repr(words).encode())
        mine = torch.tensor([mark, *numbers], dtype=torch.int64, device=self._device())
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self.group)
        rows: list[list[int]] = torch.stack(every).tolist()
        if any(row[0] != mark for row in rows):
            self._tell(words)
        return [row[1:] for row in rows]

    def give_up(self, error: Exception) -> None:
        """Instead of ``agree``: its call on the other ranks raises what this one has found."""
        with contextlib.suppress(RankError):
            self.agree({"error": f"on rank {self.rank}: {type(error).__name__}: {error}"}, (0, 0))

    def _tell(self, words: dict[str, str]) -> None:
        """Raise RankError with what ranks say differently."""
        every = self.gather(words)
        errors = [said["error"] for said in every if "error" in said]
        if errors:
            raise RankError(errors[0])
        for name in words:
            values = [said.get(name, "nothing") for said in every]
            if any(value != values[0] for value in values):
                shown = "; ".join(f"rank {r}: {value}" for r, value in enumerate(values))
                raise RankError(f"ranks must agree on {name}, got {shown}")
        raise RankError("ranks were given different arguments")

    def _device(self) -> torch.device:
        nccl = "nccl" in str(dist.get_backend(self.group))
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _nothing() -> None:
    """There is nothing to wait for."""
