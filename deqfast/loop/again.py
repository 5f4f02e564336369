"""The end of a solve: every sample that converged earlier is judged at the newest evaluation, and may have to go on."""

from __future__ import annotations

from torch import Tensor

from ..ops import recheck
from ..ops.codes import Int
from ..ops.contract import BoundStep, Leaves, Rows
from ..ops.lag import capturing
from ..ops.workspace import Stopping, Workspace
from ..warning import warn


class CouplingWarning(RuntimeWarning):
    """f gives a sample another value when other samples move, so that samples which had converged had to go on."""


_MESSAGE = (
    "f couples samples: {count} of {B} were within tolerance, and no longer once others had moved, and that twice. "
    "They went on, which takes more evaluations than to solve for all of them as one sample: give batch_dims=0 if dim "
    "0 does not count independent samples (nodes of a graph, unknowns of a vector), segments= for several graphs in "
    'one tensor, or stop="all" where samples are to stop together'
)


def _outside(bound: BoundStep, ws: Workspace, f: Leaves, f_rows: Rows, made: int, rule: Stopping) -> Tensor | None:
    ws.cur ^= 1  # as it was in the step
    which = bound.outside(f, f_rows, made) if rule == ws.stopping else recheck.outside(ws, f, f_rows, made, rule)
    ws.cur ^= 1
    return which


def judge(bound: BoundStep, ws: Workspace, f: Leaves, f_rows: Rows, made: int, rule: Stopping) -> Tensor | None:
    """Which samples have to go on by this rule; None: no sample, as is known on the host. Waits for a device."""
    which = _outside(bound, ws, f, f_rows, made, rule)
    if which is None:
        return None
    limit = ws.stopping.max_iter
    if capturing(ws.layout.device) or (limit and made > limit):
        recheck.refuse(ws, which)
        return None
    return which if bool(which.any()) else None


def refuse(bound: BoundStep, ws: Workspace, f: Leaves, f_rows: Rows, made: int) -> None:
    """Those who would have to go on, and cannot, have not converged."""
    if ws.layout.B < 2:  # a sample alone was judged at the newest evaluation
        return
    which = _outside(bound, ws, f, f_rows, made, ws.stopping)
    if which is not None:
        recheck.refuse(ws, which)


def warn_again(ws: Workspace) -> None:
    """Say what to do about an f that couples samples, at the second time that some had to go on."""
    count = int((ws.int_row(Int.WOKEN) > 0).sum())
    warn(_MESSAGE.format(count=count, B=ws.layout.B), CouplingWarning)


def warn_if_refused(which: Tensor, mode: str) -> None:
    """The same, where samples cannot go on: their solve ran as a graph."""
    count = int(which.sum())
    if count:
        warn(
            f"f couples samples: {count} of {which.shape[0]} were within tolerance, and no longer once others had "
            f"moved. They end as MAX_ITER, for mode={mode!r} cannot let them go on; use mode='loop', batch_dims=0 or "
            "segments=",
            CouplingWarning,
        )
