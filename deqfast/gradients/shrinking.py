"""The backward solve of a batch that shrinks: u = J^T u + g of the samples that still run, by a graph of f at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ranges
from ..following import Following
from .graph import Attachment, Graph, adjoint_map, autocast_as, evaluate


class AdjointRows:
    """The adjoint map at all rows, and at some of them by an evaluation of f at those alone.

    Args:
        attachment: whose adjoint it is.
        z: the solution that the whole graph is of.
        g: right-hand side.
        whole: the map of the whole graph.
        following: which arguments a smaller batch takes along.
    """

    def __init__(
        self,
        attachment: Attachment,
        z: Sequence[Tensor],
        g: list[Tensor],
        whole: Callable[[Any], Any],
        following: Following,
    ) -> None:
        self._attachment, self._z, self._g = attachment, z, g
        self._whole, self._following = ranges.around(ranges.VJP, whole), following

    def whole(self, z: Any) -> Any:
        """The map at all rows."""
        return self._whole(z)

    def part(self, rows: Tensor, samples: Tensor) -> Callable[[Any], Any]:
        """The map at some rows. The graph of the part before is let go with the map that it belongs to."""
        of = self._attachment
        layout = of.layout.resized(rows.numel())
        z = [t.detach().requires_grad_() for t in of.layout.select(list(self._z), samples)]
        with torch.enable_grad(), autocast_as(layout.device.type, of.autocast):
            args = self._following.gather(of.args, rows)
            graph = Graph(evaluate(of.f, z, args, layout, of.copy_z))
        graph.tensors = []
        return ranges.around(ranges.VJP, adjoint_map(graph, z, of.layout.select(self._g, samples), layout))
