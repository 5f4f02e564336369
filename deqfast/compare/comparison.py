"""What ``dq.compare`` returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure import Row
from .turns import quartiles
from .verdict import simplest, verdict


@dataclass(frozen=True)
class Comparison:
    """Solvers of one problem, side by side; ``print`` shows a table and the verdict.

    Attributes:
        rows: one a solver, the old one first: ``name``; ``evaluations`` of f and ``products`` (vjps); ``residual`` and
            ``error`` of the worst sample; ``gradient_error``; ``seconds`` and ``step_seconds``, one a round;
            ``operations`` beside those of f; ``memory`` in bytes; ``reached``, whether the residual is at most the
            target; ``rtol`` that it was asked for; ``trace`` of residuals; ``failed``.
        target: relative residual that everybody was to reach.
        f_seconds: an evaluation of f at z0, the median.
        reference: precision of the residuals and of the reference, and what that reached.
        memory_source: how memory was measured.
        setting: device, threads, shapes, versions.
    """

    rows: list[Row]
    target: float
    f_seconds: float
    reference: str
    memory_source: str
    setting: str

    @property
    def old(self) -> Row:
        """The row of the old solver."""
        return self.rows[0]

    @property
    def best(self) -> Row | None:
        """The fastest row of deqfast's that reached the target, of equals the one of least memory; None: none did."""
        able = [row for row in self.rows[1:] if row.reached and row.seconds]
        return simplest(able) if able else None

    @property
    def verdict(self) -> str:
        """What to use, and why: "use ...", "keep your own ..." or that no solver reached the target."""
        return verdict(self.rows, self.target, self.f_seconds)

    def table(self) -> str:
        """The numbers as text."""
        header = ("", "forward ms", "f + b ms", "f", "vjps", "residual", "error", "gradient", "ops / f", "memory")
        cells = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
        lines = ["  ".join([line[0].ljust(widths[0]), *_right(line[1:], widths[1:])]).rstrip() for line in cells]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def __str__(self) -> str:
        rounds = len(self.rows[0].seconds) or max(len(row.seconds) for row in self.rows)
        marks = [
            f"* {row.name}: {row.failed or f'did not reach {self.target:.1e}'}" for row in self.rows if _marked(row)
        ]
        return "\n".join(
            [
                f"to a relative residual of {self.target:.1e} of the worst sample; {self.setting}",
                "",
                self.table(),
                *marks,
                "",
                f"forward, f + b (with the backward pass): median of {rounds} rounds in turns, and half the distance of"
                " the quartiles.",
                f"residual: by an evaluation beside the solver's. error, gradient: from a solve in {self.reference}.",
                f"ops / f: operations dispatched beside f's, an evaluation. memory: {self.memory_source}.",
                "",
                self.verdict,
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {**dataclasses.asdict(self), "verdict": self.verdict}

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw residuals against evaluations, and times; a matplotlib figure.

        Args:
            path: where to save it: a .png, .pdf or .svg.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            import matplotlib.figure  # noqa: F401, PLC0415 - optional
        except ImportError as error:
            raise ImportError("Comparison.plot needs matplotlib: pip install 'deqfast[plot]'") from error
        from .picture import draw  # noqa: PLC0415 - it imports matplotlib

        figure = draw(self.rows, self.target, self.setting, self.verdict)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _marked(row: Row) -> bool:
    return bool(row.failed) or not row.reached


def _right(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name + (" *" if _marked(row) else ""),
        _time(row.seconds),
        _time(row.step_seconds),
        str(row.evaluations) if row.trace else "-",
        "-" if row.products is None else str(row.products),
        f"{row.residual:.1e}" if row.trace else "-",
        "-" if row.error is None else f"{row.error:.1e}",
        "-" if row.gradient_error is None else f"{row.gradient_error:.1e}",
        f"{row.operations / row.evaluations:.1f}" if row.evaluations else "-",
        "-" if row.memory is None else _bytes(row.memory),
    )


def _time(seconds: list[float]) -> str:
    if not seconds:
        return "-"
    low, middle, high = quartiles(seconds)
    return f"{1e3 * middle:.3g} ±{1e3 * (high - low) / 2:.2g}"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"
