"""One call of ``fixed_point``, as the loop, the graphs and the gradients see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import transforms
from .following import Following
from .ops.layout import Layout
from .ops.shared import Group, group_of
from .ops.workspace import Stopping
from .options import Options
from .solution import BackwardReport


@dataclass
class Problem:
    """What is solved, how, and what is known of it."""

    f: Callable[..., Any]
    args: tuple[Any, ...]
    layout: Layout
    options: Options
    stopping: Stopping
    transformed: bool = False  # a torch.func transform or a forward-mode level surrounds the call
    copy_z: bool = False  # f writes into the z that it is given
    reports: list[BackwardReport] = field(default_factory=list)  # the last backward solve's, once there was one
    following: Following | None = None  # what a smaller batch takes along; None: the backward solve is of all samples
    group: Group | None = None  # the ranks that share the solve

    def share(self) -> None:
        """Where ranks share the solve: find them, and that they were given what fits together.

        Raises:
            RankError: they were not.
        """
        options = self.options
        self.group = group_of(options.group, options.stop, overlapped=not options.looks)
        if self.group is not None:
            more = {"stop": options.stop, "returns": options.returns, "backward": options.backward}
            self.group.settle(self.layout, options.solver, self.stopping, more)

    @property
    def differentiated(self) -> bool:
        """Whether somebody may ask for a derivative."""
        return torch.is_grad_enabled() or (self.transformed and transforms.forward_mode())
