"""The measurements in a sentence or two."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .measure import Row
from .turns import quartiles

_CLEAR = 1.1  # a ratio of times that is worth a change
_SAME = 1.05
_LESS_EXACT = 5.0
_ELSEWHERE = 0.1  # relative distance from the reference that is another solution


def ratio(above: Row, below: Row) -> tuple[float, float, float]:
    """Quartiles of the times of one row over those of another, round by round: of steps, where both make them."""
    pairs = (above.step_seconds, below.step_seconds)
    if not all(pairs):
        pairs = (above.seconds, below.seconds)
    return quartiles([a / b for a, b in zip(*pairs, strict=True)])


def verdict(rows: Sequence[Row], target: float, f_seconds: float) -> str:
    """What to use, and why."""
    old = rows[0]
    able = [row for row in rows[1:] if row.reached and row.seconds]
    if not able:
        return _nobody(rows, target)
    best = simplest(able)
    if not (old.reached and old.seconds):
        why = old.failed or f"it ended at a residual of {old.residual:.1e} after {old.evaluations} evaluations"
        return f"use {best.name}: {_took(best)}, where {old.name} did not reach {target:.1e} ({why})." + _more(
            old, best
        )
    low, middle, high = ratio(old, best)
    counts = f"{_took(best)}, against {_took(old)}"
    what = "a forward and backward pass" if old.step_seconds and best.step_seconds else "a forward solve"
    if middle >= _CLEAR and low > 1:
        text = f"use {best.name}: {what} is {middle:.1f} times faster (quartiles {low:.1f} to {high:.1f}); {counts}."
    elif middle <= 1 / _CLEAR and high < 1:
        text = f"keep your own, {old.name}: {what} takes {middle:.2f} of the time of {best.name}; {counts}."
    else:
        text = (
            f"keep your own, {old.name}, unless you need what else deqfast has: {what} takes {middle:.2f} of the time"
            f" of {best.name}, which is within what the rounds differ by; {counts}."
        )
    return text + _share(old, f_seconds) + _more(old, best)


def simplest(able: Sequence[Row]) -> Row:
    """The fastest; of those that are as fast, the one with the least memory."""
    fastest = min(able, key=lambda row: statistics.median(row.step_seconds or row.seconds))
    same = [row for row in able if ratio(row, fastest)[1] <= _SAME]
    return min(same, key=lambda row: row.memory or 0)


def _took(row: Row) -> str:
    return f"{row.evaluations} evaluations" + ("" if row.products is None else f" and {row.products} vjps")


def _nobody(rows: Sequence[Row], target: float) -> str:
    old, closest = rows[0], min(rows[1:], key=lambda row: row.residual)
    if old.reached:
        ended = f"{closest.name} ended at {closest.residual:.1e}"
        return f"keep your own, {old.name}: deqfast did not reach {target:.1e}; {ended}."
    return (
        f"no solver reached {target:.1e}: {old.name} ended at {old.residual:.1e}, {closest.name} at"
        f" {closest.residual:.1e}. Ask for less, allow more evaluations, or see the guide on what does not converge."
    )


def _share(old: Row, f_seconds: float) -> str:
    """How much of the old solve is f, which no solver makes faster."""
    share = min(1.0, f_seconds * old.evaluations / statistics.median(old.seconds))
    return f" f itself is {100 * share:.0f} % of {old.name}'s forward solve."


def _more(old: Row, best: Row) -> str:
    notes = ""
    a, b = old.gradient_error, best.gradient_error
    if a is not None and b is not None and min(a, b) > 0:
        if b > _LESS_EXACT * a:
            notes += f" Its gradient is less exact ({b:.1e} against {a:.1e}): a smaller rtol makes up for that."
        elif a > _LESS_EXACT * b:
            notes += f" {old.name}'s gradient is less exact ({a:.1e} against {b:.1e})."
    if old.seconds and old.products is None and best.products is not None:
        notes += f" {old.name} gives no gradient, so forward solves are compared."
    if any(row.reached and row.error is not None and row.error > _ELSEWHERE for row in (old, best)):
        notes += " They ended at different solutions: f has more than one, or is nearly singular there."
    return notes
