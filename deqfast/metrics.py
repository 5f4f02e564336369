"""What the solves of a training run took, in numbers for a dashboard."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .solution import EVENTS, BackwardReport, Solution
from .status import Status


class Metrics:
    """Evaluations, residuals, restarts and failures of many solves, forward and backward.

    ::

        metrics = dq.Metrics()
        layer = dq.DEQ(cell, metrics=metrics)
        layer(x).sum().backward()
        metrics.compute()  # or metrics.write(writer, step), every so often, for TensorBoard

    It may be called with a ``Solution`` as well: ``metrics(dq.fixed_point(...))``. Adding one reads nothing from the
    device; ``compute`` does. States are not kept, counts and residuals are: 60 bytes or so a sample.

    Args:
        quantiles: of the samples' residuals, each between 0 and 1; default the median and the upper tenth.
        window: how many solves are remembered; the oldest are forgotten first.

    Raises:
        ValueError: a quantile outside of 0 to 1, or a window below 1.
    """

    def __init__(self, quantiles: Sequence[float] = (0.5, 0.9), window: int = 1000) -> None:
        if any(not 0 <= q <= 1 for q in quantiles):
            raise ValueError(f"quantiles must lie between 0 and 1, got {tuple(quantiles)}")
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a number of solves, 1 or more, got {window!r}")
        self.quantiles = tuple(quantiles)
        self._solves: deque[_Solve] = deque(maxlen=window)

    def __len__(self) -> int:
        """How many solves are remembered."""
        return len(self._solves)

    def __call__(self, solution: Solution) -> Solution:
        """Remember a solve; its backward solve counts once it has run.

        Returns:
            ``solution``, so that a call may stand around the one that solves.

        Raises:
            TypeError: it is none of ``fixed_point``, ``root`` or a ``DEQ``.
        """
        if not isinstance(solution, Solution):
            raise TypeError(f"solution must be a Solution, got {type(solution).__name__}")
        self._solves.append(_Solve(solution))
        return solution

    def reset(self) -> None:
        """Forget every solve."""
        self._solves.clear()

    def compute(self) -> dict[str, float]:
        """Numbers over the remembered solves; without any, none.

        ``solves``, ``samples``; ``evaluations`` of the mean solve and ``steps`` of the mean sample; ``converged``, a
        share of samples, and every other status that occurred; ``residual_q50`` and so on, ``residual_max`` (of finite
        residuals); every event of ``Solution.events`` a sample; and, of those backward solves that have run,
        ``backward_solves``, ``backward_evaluations``, ``backward_converged``, ``backward_residual_max``.
        """
        solves = list(self._solves)
        if not solves:
            return {}
        found = {"solves": float(len(solves))}
        status = torch.cat([solve.status.cpu() for solve in solves])
        found["samples"] = float(status.numel())
        found["evaluations"] = sum(int(solve.evaluations) for solve in solves) / len(solves)
        found.update(self._of_samples(solves, status))
        reports = [solve.reports[0] for solve in solves if solve.reports]
        return found | (_backward(reports) if reports else {})

    def _of_samples(self, solves: list[_Solve], status: Tensor) -> dict[str, float]:
        if not status.numel():
            return {}
        found = {"steps": float(torch.cat([solve.steps.cpu() for solve in solves]).double().mean())}
        counts = torch.bincount(status.long(), minlength=len(Status)).tolist()
        shares = {Status(i).name.lower(): n / status.numel() for i, n in enumerate(counts)}
        found["converged"] = shares.pop("converged")
        found.update({name: share for name, share in shares.items() if share})
        residual = torch.cat([solve.residual.cpu().double() for solve in solves])
        residual = residual[residual.isfinite()]
        if residual.numel():
            asked = residual.new_tensor(self.quantiles)
            for q, value in zip(self.quantiles, _quantiles(residual, asked), strict=True):
                found[f"residual_q{100 * q:g}"] = value
            found["residual_max"] = float(residual.max())
        for name in EVENTS:
            found[name] = sum(int(solve.events[name].sum()) for solve in solves) / status.numel()
        return found

    def write(self, writer: Any, step: int, prefix: str = "deqfast/") -> dict[str, float]:
        """Hand the numbers to ``writer.add_scalar(name, value, step)``, and begin anew.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or another that has ``add_scalar``.
            step: of the training.
            prefix: before every name.

        Returns:
            What ``compute`` gave.

        Raises:
            TypeError: ``writer`` has no ``add_scalar``.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer must have a method add_scalar(name, value, step), got {type(writer).__name__}")
        found = self.compute()
        for name, value in found.items():
            writer.add_scalar(prefix + name, value, step)
        self.reset()
        return found


class _Solve:
    """What is kept of a solution."""

    def __init__(self, solution: Solution) -> None:
        self.evaluations = solution.evaluations
        self.status = solution.status.detach().flatten()
        self.steps = solution.steps.detach().flatten()
        self.residual = solution.residual.detach().flatten()
        self.events = solution.events
        self.reports: list[BackwardReport] = solution.reports


def _quantiles(values: Tensor, asked: Tensor) -> list[float]:
    """By sorting: torch.quantile refuses more than 16 million numbers."""
    ordered = values.sort().values
    places = (asked * (ordered.numel() - 1)).round().long()
    found: list[float] = ordered[places].tolist()
    return found


def _backward(reports: list[BackwardReport]) -> dict[str, float]:
    converged = torch.cat([report.converged.cpu().flatten() for report in reports])
    residual = torch.cat([report.residual.cpu().double().flatten() for report in reports])
    residual = residual[residual.isfinite()]
    found = {
        "backward_solves": float(len(reports)),
        "backward_evaluations": sum(report.evaluations for report in reports) / len(reports),
    }
    if converged.numel():
        found["backward_converged"] = float(converged.double().mean())
    if residual.numel():
        found["backward_residual_max"] = float(residual.max())
    return found
