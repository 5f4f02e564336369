"""The backward solve as a recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import graphs
from ..graphs import identity
from ..loop.state import SolverState
from ..solution import BackwardReport
from .graph import Attachment, Graph, adjoint_map, autocast_as, evaluate
from .linear import adjoint_start, warn_of_failures


def replayed_adjoint(attachment: Attachment, z: Sequence[Tensor], g: list[Tensor]) -> list[Tensor] | None:
    """``solve_adjoint`` by a recording, which evaluates f once more; None, with a warning, where there can be none."""
    f, layout, options = attachment.f, attachment.layout, attachment.options
    autocast, copy_z = attachment.autocast, attachment.copy_z  # a recording must not keep the attachment's graph
    try:
        tensors, rebuild, rest, others = graphs.split(attachment.args, layout.device)
    except graphs.CannotRecord as reason:
        graphs.warn(options.mode, str(reason))
        return None
    many = len(z)

    def prepare(inputs: list[Tensor]) -> Callable[[Any], Any]:
        at = [t.detach().requires_grad_() for t in inputs[:many]]
        with torch.enable_grad(), autocast_as(layout.device.type, autocast):
            graph = Graph(evaluate(f, at, rebuild(inputs[2 * many :]), layout, copy_z))
        if not graph.which:
            raise graphs.CannotRecord("f does not depend on z")
        return adjoint_map(graph, at, inputs[many : 2 * many], layout)

    def finish(state: SolverState, evaluations: int | Tensor) -> list[Tensor]:
        if options.mode == "graph" and state.failed():
            warn_of_failures(state, g)
        leaves, residual = state.answer()
        if options.tell is not None:  # the memory is the recording's
            counted = layout.counted(residual)
            options.tell(BackwardReport(evaluations, counted.clone(), state.status.clone()))
        return [t.clone() for t in leaves]

    program = graphs.Program(
        prepare=prepare,
        inputs=[*z, *g, *tensors],
        key=("adjoint", identity(f, layout.device), rest, autocast, copy_z),
        family=graphs.family(f),
        layout=layout,
        solver=options.solver,
        stopping=options.stopping,
        backend=options.backend,
        mode=options.mode,
        alive=(f, others),
    )
    start = adjoint_start(g, layout, options)
    return graphs.replayed(program, [t.detach() for t in layout.tensors(start)], finish)
