"""What a solve returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .ops.codes import Int
from .rows import RowCount, needed
from .status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _wide(dtype: torch.dtype) -> torch.dtype:
    return (
        torch.complex64 if dtype.is_complex and dtype != torch.complex128 else torch.promote_types(dtype, torch.float32)
    )


WORTH_SAYING = 0.3  # of the rows


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"


EVENTS = {
    "solve_fallbacks": Int.SOLVE_FALLBACKS,
    "step_fallbacks": Int.STEP_FALLBACKS,
    "growth_restarts": Int.GROWTH_RESTARTS,
    "rescales": Int.RESCALES,
    "evictions": Int.EVICTIONS,
    "full_restarts": Int.FULL_RESTARTS,
    "denominator_restarts": Int.DENOMINATOR_RESTARTS,
    "woken": Int.WOKEN,
}


@dataclass(frozen=True)
class BackwardReport:
    """How an ``Implicit`` gradient's backward solve went.

    Attributes:
        evaluations: vjps; reading it waits for the device if the loop ran there.
        residual: (B,) relative residual.
        status: (B,) int32 of ``Status``.
        rows: rows of dim 0 that vjps were made of, where ``compact`` let the batch shrink; else None.
    """

    made: int | Tensor  # a loop on the device leaves a tensor
    residual: Tensor
    status: Tensor
    rows: RowCount | None = None

    @property
    def evaluations(self) -> int:
        """Vjps of the solve."""
        return int(self.made)

    @property
    def converged(self) -> Tensor:
        """Of each sample, a bool."""
        return self.status == int(Status.CONVERGED)


@dataclass
class Solution:
    """Outcome of ``fixed_point`` or ``root`` for a batch of B samples.

    Attributes:
        z: the answer, structured like z0; with gradients on, attached to the graph.
        converged: (B,) bool.
        steps: (B,) int32, evaluations of f a sample used, the converging one included.
        residual: (B,) relative residual ||f(z) - z|| / ||f(z)|| of exactly this z (of the equilibrium the phantom
            steps start from, where the gradient is ``Phantom`` or ``OneStep``).
        nfe: evaluations of f by the solver; reading it waits for the device if the loop ran there.
        status: (B,) int32 of ``dq.Status``.
        trace: (nfe, B) relative residuals if asked for, NaN once a sample has stopped; else None.
        states: with ``states=`` the states after each of those evaluations, without a graph; else None.
        states_at: those evaluations, in ascending order; else None.
        backend: the backend that ran the updates.
        mode: how the loop ran: "loop", "graph" or "device".
        counters: what ``events`` reads.
        reports: what ``backward`` reads.
        rows: with ``compact`` the rows of dim 0 that f has seen (``seen``, ``plain`` without ``compact``, ``spared``),
            and why the batch stayed whole if it did (``whole``); else None.
        compactable: whether ``compact`` could have been asked for, which ``summary`` then recommends where it pays.
        aux: with ``has_aux=True`` what f returned beside z at the last evaluation of the solve.
    """

    z: Any
    converged: Tensor
    steps: Tensor
    residual: Tensor
    evaluations: int | Tensor = field(repr=False)  # a loop on the device leaves a tensor
    status: Tensor
    trace: Tensor | None
    backend: str
    counters: Tensor
    mode: str = "loop"
    reports: list[BackwardReport] = field(default_factory=list, repr=False)
    aux: Any = field(default=None, repr=False)
    states: list[Any] | None = field(default=None, repr=False)
    states_at: tuple[int, ...] | None = None
    rows: RowCount | None = field(default=None, repr=False)
    compactable: bool = field(default=False, repr=False)

    def state(self, at: int) -> Any:
        """The state after evaluation ``at``, one of those that ``states=`` asked for.

        Raises:
            ValueError: it was not stored.
        """
        stored = self.states_at or ()
        if self.states is None or at not in stored:
            asked = f"one of {list(stored)}, the evaluations that states= asked for" if stored else "asked for"
            hint = "" if stored else ": this solve was called without states=[...]"
            raise ValueError(f"at must be {asked}, got {at}{hint}")
        return self.states[stored.index(at)]

    @property
    def backward(self) -> BackwardReport | None:
        """How the last backward solve went; None before there was one."""
        return self.reports[0] if self.reports else None

    @property
    def nfe(self) -> int:
        """Evaluations of f by the solver."""
        return int(self.evaluations)

    @property
    def events(self) -> dict[str, Tensor]:
        """Fallbacks and restarts by cause, (B,) int32 each."""
        return {
            name: self.counters[row, : self.steps.numel()].view(tuple(self.steps.shape)) for name, row in EVENTS.items()
        }

    def summary(self, fz: Any = None) -> str:
        """One line: how many samples ended how, the evaluations they took, and the rows of f that ``compact`` spared.

        Without ``compact`` it says what "auto" would have spared, where that is 30 % of the rows and more.

        Args:
            fz: f at ``z``, one evaluation that you make (structured like z): a line for each tensor of the state then
                says the largest ||f(z) - z|| / ||f(z)|| of that tensor alone, and whose it is. The residual of a state
                of several tensors is over all of them, and hides a small one that is far off.

        Raises:
            TypeError, ValueError: ``fz`` is not structured like z.
        """
        counts = torch.bincount(self.status.flatten().long().cpu(), minlength=len(Status)).tolist()
        parts = [f"{n} {Status(i).name.lower()}" for i, n in enumerate(counts) if n]
        worst = float(self.residual.max()) if self.residual.numel() else 0.0
        line = f"{', '.join(parts) or 'no samples'}; {self.nfe} evaluations, largest residual {worst:.2e}"
        line += self._of_rows()
        return line if fz is None else "\n".join([line, *self._of_leaves(fz)])

    def _of_rows(self) -> str:
        if self.rows is not None:
            told = f"; compact spared {_percent(max(0.0, self.rows.spared))} of the rows of f"
            return told if self.rows.whole is None else f"{told}, for the batch must be whole: {self.rows.whole}"
        if not self.compactable or not self.steps.numel() or not self.nfe:
            return ""
        steps = self.steps.reshape(self.steps.shape[0], -1).amax(1)
        spared = RowCount(needed(steps, self.nfe), self.nfe * steps.numel()).spared
        if spared < WORTH_SAYING:
            return ""
        return (
            f"; {self.nfe} evaluations for a mean of {float(steps.double().mean()):.0f}: "
            f'compact="auto" would have spared {_percent(spared)} of the rows, if f treats samples independently'
        )

    def _of_leaves(self, fz: Any) -> list[str]:
        named, structure = pytree.tree_flatten_with_path(self.z)
        images, theirs = pytree.tree_flatten(fz)
        if theirs != structure or not all(isinstance(image, Tensor) for image in images):
            raise TypeError(f"fz must be structured like z, {structure}, got {theirs}")
        lines = []
        for (path, z), image in zip(named, images, strict=True):
            name = pytree.keystr(path) or "z"
            if image.shape != z.shape:
                raise ValueError(f"fz at {name} must have the shape {tuple(z.shape)}, got {tuple(image.shape)}")
            dims = self.steps.dim() if z.shape[: self.steps.dim()] == self.steps.shape else 0  # 0: segments, one norm
            rows = [t.detach().to(_wide(t.dtype)).reshape(*t.shape[:dims], -1) for t in (image - z, image)]
            moved, size = (torch.linalg.vector_norm(t, dim=-1) for t in rows)
            relative = torch.where(moved > 0, moved / size, 0.0).flatten()
            if relative.numel():
                worst = int(relative.argmax())
                whose = f", sample {worst}" if dims and relative.numel() > 1 else ""
                lines.append(f"  {name}: largest residual {float(relative[worst]):.2e}{whose}")
        return lines

    def plot(self, ax: Axes | None = None, label: str = "median") -> Axes:
        """Residual against evaluations: the median over samples, and the band from the 10th to the 90th percentile.

        Args:
            ax: matplotlib axes to draw on; a new figure when None.
            label: name of the median line in the legend.

        Raises:
            ValueError: the solve did not record a trace.
            ImportError: matplotlib is not installed.
        """
        if self.trace is None:
            raise ValueError("there is no trace to plot: solve with trace=True")
        if self.trace.numel() == 0:
            raise ValueError("the trace is empty: the solve made no evaluation")
        try:
            import matplotlib.pyplot as plt  # noqa: PLC0415 - optional
        except ImportError as error:
            raise ImportError("Solution.plot needs matplotlib: pip install 'deqfast[plot]'") from error
        if ax is None:
            _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
        # A stopped sample keeps its last residual, so that late quantiles do not describe the slow samples alone.
        filled = _forward_fill(self.trace.detach().cpu().double())
        low, middle, high = torch.quantile(filled, filled.new_tensor([0.1, 0.5, 0.9]), dim=1).numpy()
        evaluations = range(1, self.nfe + 1)
        (line,) = ax.semilogy(evaluations, middle, label=label)
        ax.fill_between(evaluations, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        ax.set_xlabel("evaluations of f")
        ax.set_ylabel("relative residual")
        ax.legend(frameon=False)
        return ax


class ConvergenceError(RuntimeError):
    """Some samples did not converge and ``throw=True`` was asked for; ``solution`` holds the whole result."""

    def __init__(self, solution: Any) -> None:
        super().__init__(f"the solve did not converge: {solution.summary()}")
        self.solution = solution

    def __reduce__(self) -> Any:
        return ConvergenceError, (self.solution,)


def _forward_fill(trace: Tensor) -> Tensor:
    rows = [trace[0]]
    for row in trace[1:]:
        rows.append(torch.where(torch.isnan(row), rows[-1], row))
    return torch.stack(rows)
