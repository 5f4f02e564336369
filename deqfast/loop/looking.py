"""The loop of a solve that somebody looks at: residuals, images and states between evaluations, callbacks, progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..following import following
from ..ops.codes import Int
from ..options import Options
from ..status import Status
from .compaction import Compactor, WithArguments
from .conclude import out_of_evaluations
from .images import Images, take
from .progress import progress_bar
from .sampled import Sampled
from .state import SolverState


def _evaluate(f: Callable[..., Any], args: tuple[Any, ...], state: SolverState, judged: bool) -> list[Tensor]:
    """One evaluation and step; f's leaves. ``judged``: ``state.judge`` may have to look at this f."""
    fz = f(state.z, *args)
    if not judged:
        state.step(fz)
        return state.layout.tensors(fz)
    leaves = state.layout.flatten(fz, "f(z)")
    state.advance(leaves, None)
    return leaves


class Seen(NamedTuple):
    """What was seen between evaluations, as far as anybody asked: residuals, f at the answer, states, rows."""

    residuals: list[Tensor] | None = None
    images: list[Tensor] | None = None
    sampled: Sampled | None = None
    compactor: Compactor | None = None


def look_on(f: Callable[..., Any], args: tuple[Any, ...], state: SolverState, options: Options) -> Seen:
    """The loop with what somebody wants to see or do between evaluations."""
    judged = options.callback is not None or options.returns == "next" or options.of != options.returns
    compactor = None
    if options.compact is not False:
        follows = following(options.compact, args, state.layout)
        compactor = Compactor(state, WithArguments(f, args, follows), follows, judged=judged)
    images = Images(state, compactor is not None) if "image" in (options.returns, options.of) else None
    sampled = None if options.states is None else Sampled(state, options.states.draw(), options.of, images)
    rows: list[Tensor] | None = [] if options.trace else None
    bar = progress_bar(options.max_iter) if options.progress else None
    lookers = [one for one in (images, sampled) if one is not None]
    leaves: list[Tensor] = []
    which: Tensor | None = None
    told = False  # to stop
    try:
        while not (state.done or state.nfe == options.max_iter) or (compactor is not None and compactor.unsure):
            if compactor is None:
                leaves = _evaluate(f, args, state, judged)
            else:
                leaves, which = compactor.evaluate()
            for one in lookers:
                one.look(leaves, which)
            if rows is not None:
                rows.append(torch.where(state.steps == state.nfe, state.residual, float("nan")))
            if bar is not None:
                bar.update()
                bar.set_postfix_str(f"{state.known_running} running", refresh=False)
            if options.callback is not None and state.show(options.callback):
                told = True
                break
    finally:
        if bar is not None:
            bar.close()
    _end(state, options, sampled, told, (leaves, which))
    found = images.leaves if images is not None and options.returns == "image" else None
    return Seen(rows, found, sampled, compactor)


def _end(
    state: SolverState,
    options: Options,
    sampled: Sampled | None,
    told: bool,
    newest: tuple[list[Tensor], Tensor | None],
) -> None:
    """After the loop, with f's ``newest`` output and where its samples are in it: what the kernels have not ended.

    ``told``: the callback said stop.
    """
    if told or not state.done:  # else the kernels have ended it
        state.judge(newest[1])
    if sampled is not None and options.of != options.returns:
        sampled.close(*newest)
    if not (told or state.done):
        out_of_evaluations(state, options.returns)
    if options.returns == "next":
        converged = state.ws.int_row(Int.STATUS) == int(Status.CONVERGED)
        take(state.layout, state.ws.x[state.ws.cur], converged, *newest)
