"""States that are saved, restored and copied: in one process, or as the whole that ranks have parts of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .. import compiled
from ..ops import contract, shared
from ..ops.codes import Int
from ..ops.layout import Layout
from ..ops.samples import Samples
from ..ops.shared import Group
from ..ops.shares import Cut, local
from ..status import Status
from . import own_residual, saving
from .origin import Origin
from .resuming import Resuming


class Saved(Resuming):
    """The part of ``SolverState`` for states that outlive their process.

    It is ``Stateful`` in the sense of torch.distributed.checkpoint.
    """

    _asked_for: str

    def _bind(self) -> None:
        raise NotImplementedError

    def evaluated(self) -> Any:
        """A copy of the iterate at which f was last evaluated."""
        raise NotImplementedError

    def _serve_residual(self, backend: contract.Backend) -> None:
        raise NotImplementedError

    @property
    def running(self) -> Tensor:
        """(B,) bool: samples that have not stopped."""
        raise NotImplementedError

    @compiled.skip
    def state_dict(self) -> dict[str, Any]:
        """Copies of everything a later step reads; ``load_state_dict`` of a state of the same shape takes it up.

        Of a solve that ranks share it is this rank's part, and is asked for on every rank: tensors that are cut have
        the shape of the whole, and torch.distributed.checkpoint (``dcp.save({"solve": state}, ...)``) saves that whole.

        Raises:
            ValueError: the parts of ranks are no slices along one dim, on every rank.
        """
        return self.part(self._group)

    def part(self, group: Group | None) -> dict[str, Any]:
        """``state_dict`` as the part that these ranks have of a whole."""
        said = self._standing()
        cut = None if group is None else saving.cut_of(group, self.ws, said)
        if cut is not None:
            said = _of_all(cut)
        tensors = saving.tensors(self.ws, self._outputs, self._origin.largest if self._origin else None)
        self.bound.settle_into(tensors)
        if cut is not None:
            tensors = {name: cut.of(name, t) for name, t in tensors.items()}
        own = saving.description(self.options, self.ws, cut)
        return {**own, **said, "has_products": self.ws.has_products, "tensors": tensors}

    def description(self, group: Group | None) -> dict[str, Any]:
        """What a state has to have in common with one that takes it up; on every rank of a group at once."""
        cut = None if group is None else saving.cut_of(group, self.ws, {})
        return saving.description(self.options, self.ws, cut)

    @property
    def shared(self) -> Group | None:
        """The ranks that share the solve."""
        return self._group

    def _standing(self) -> dict[str, Any]:
        """Where the host stands; no tensor."""
        ws, outputs = self.ws, self._outputs
        return {
            "nfe": self.nfe,
            "before": ws.before,
            "running": (self._running or self.paused) and int((ws.int_row(Int.STATUS) == int(Status.RUNNING)).sum()),
            "wakings": self.wakings,
            "copies_f": outputs.copies_f,
            "copies_z": outputs.copies_z,
            "has_previous": outputs.previous is not None,
            "has_origin": self._origin is not None,
            "has_residual": getattr(ws, "own_residual", None) is not None,
        }

    @compiled.skip
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue where ``saved`` stopped; on every rank, where ranks share the solve.

        ``torch.distributed.checkpoint.load({"solve": state}, ...)`` ends with it, on any number of ranks.

        Raises:
            ValueError: it was saved by a solver with other options or a state of another structure, shape, memory
                format or dtype, or something is missing; this state is as before.
            RankError: that is so on another rank.
        """
        self.take_part(saved, self._group)

    def take_part(self, saved: dict[str, Any], group: Group | None) -> None:
        """``load_state_dict`` of the part that these ranks have of a whole."""
        cut = None
        if group is not None:
            cut = saving.cut_of(group, self.ws, {})
        try:
            taken = self._checked(saved, cut)
        except ValueError as error:
            if group is not None:
                group.ranks.give_up(error)
            raise
        if group is not None:
            group.ranks.agree({"state_dict": "fits"}, (0, 0))
        if taken is not None:
            self._serve_residual(taken)
            ws = own_residual.takes_residual(self.ws)
            assert ws is not None
            ws.set_residual(torch.empty_like(saved["tensors"]["own_residual"], device=self.layout.device))
        saving.load(saved, self.ws, self._outputs, group)
        self.nfe = saved["nfe"]
        self._count_from(saved["before"])
        self._running, self.wakings = self._still_running(saved["running"], group), saved["wakings"]
        self._origin = None
        if saved["has_origin"]:
            self._origin = Origin(self.ws, local(saved["tensors"]["largest"]))
        self._bind()

    def _checked(self, saved: dict[str, Any], cut: Cut | None) -> contract.Backend | None:
        """Raise ValueError unless it can be taken up; the backend that takes its residuals, where it has some."""
        saving.check(saved, saving.description(self.options, self.ws, cut))
        if saved["has_residual"] and "own_residual" not in saved["tensors"]:
            raise ValueError(
                "state_dict was saved with residuals of your own, which are not in it: torch.distributed.checkpoint "
                "reads them where this state has been given one, by a first step"
            )
        taken = None
        if saved["has_residual"] and own_residual.takes_residual(self.ws) is not None:
            taken = own_residual.backend_for(self._backend, self._asked_for, self.ws)
        saving.check_tensors(saved, self.ws, self._outputs, cut)
        return taken

    def _still_running(self, saved: int, group: Group | None) -> int:
        """How many samples run here, of a state that was saved while so many of all did."""
        if self.paused or not saved or group is None or group.spread:
            return 0 if self.paused else saved
        return 1 if self._group is not None else int(self.running.sum())  # 1: of all ranks

    def __reduce__(self) -> Any:
        shared.refuse(self._group, "a copy")
        together = self._together is not None
        settings = {"stopping": self._own_rule(), "backend": self._asked_for, "together": together}
        settings["limit"] = self._limit
        given = self.options, self.evaluated(), self.layout.samples, settings
        return _rebuild, (type(self), *given, self.state_dict())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        function, args = self.__reduce__()
        return function(*args[:1], copy.deepcopy(args[1], memo), *args[2:])


def _of_all(cut: Cut) -> dict[str, Any]:
    """Where all ranks stand together."""
    told = cut.told
    first = dict(told[0])
    for name in ("nfe", "wakings", "copies_f", "copies_z", "has_origin"):
        first[name] = max(said[name] for said in told)
    running = [said["running"] for said in told]
    first["running"] = max(running) if cut.spread else sum(running)
    # A rank none of whose samples runs may have none, and needs none.
    wanted = [said["has_previous"] for said in told if said["running"]]
    first["has_previous"] = bool(wanted) and all(wanted)
    return first


def _rebuild(cls: Any, options: Any, z: Any, samples: Samples, settings: dict[str, Any], saved: dict[str, Any]) -> Any:
    state = cls(options, z, layout=Layout(z, samples=samples), **settings)
    state.load_state_dict(saved)
    return state
