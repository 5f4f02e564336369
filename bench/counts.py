"""Two results of `bench.convergence`, told apart: `python -m bench.counts BEFORE.json AFTER.json`.

Names every problem on which a method's evaluations or failures changed, and says how many counts were compared. Ends
with 1 where there was a change, or nothing to compare.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """Of one method on one problem to one tolerance: samples that took another number, and that failed (0)."""

    method: str
    problem: str
    tolerance: float
    samples: int
    evaluations: tuple[int, int]
    failures: tuple[int, int]

    def __str__(self) -> str:
        (taken, takes), (failed, fails) = self.evaluations, self.failures
        line = f"{self.method}, {self.problem}, {self.tolerance:g}: {self.samples} samples, "
        line += f"{taken} -> {takes} evaluations"
        return line if failed == fails else f"{line}, {failed} -> {fails} failed"


@dataclass(frozen=True)
class Difference:
    """What two records say: counts that both have, and where they differ.

    Attributes:
        compared: counts, one a sample, tolerance, problem and method.
        changes: where they are not the same.
        incomparable: what only one has, or has in another shape, or what raised in one alone.
    """

    compared: int
    changes: list[Change]
    incomparable: list[str]

    @property
    def same(self) -> bool:
        """Whether there was something to compare and nothing differed."""
        return bool(self.compared) and not self.changes and not self.incomparable


def compare(before: Record, after: Record) -> Difference:
    """The counts of two records of `bench.convergence`, of methods that both have.

    Raises:
        ValueError: one is no such record.
    """
    for name, record in (("before", before), ("after", after)):
        if record.get("kind") != "convergence":
            raise ValueError(f"{name} must be a result of bench.convergence, got kind {record.get('kind')!r}")
    compared, changes, incomparable = 0, [], []
    if before["cap"] != after["cap"]:
        incomparable.append(f"the limit of evaluations was {before['cap']}, now it is {after['cap']}")
    for method, problem in _pairs(before, after):
        old, new = (record["counts"][method].get(problem) for record in (before, after))
        if old is None or new is None:
            incomparable.append(f"{method}, {problem}: only {'after' if old is None else 'before'}")
            continue
        if old["error"] != new["error"]:
            incomparable.append(f"{method}, {problem}: raised {old['error']}, now {new['error']}")
        tolerances = after["problems"][problem]["tolerances"]
        if before["problems"][problem]["tolerances"] != tolerances or _shape(old) != _shape(new):
            incomparable.append(f"{method}, {problem}: other tolerances or samples")
            continue
        for tolerance, was, now in zip(tolerances, old["evaluations"], new["evaluations"], strict=True):
            compared += len(was)
            moved = sum(a != b for a, b in zip(was, now, strict=True))
            if moved:
                failures = was.count(0), now.count(0)
                changes.append(Change(method, problem, tolerance, moved, (sum(was), sum(now)), failures))
    return Difference(compared, changes, incomparable)


def _pairs(before: Record, after: Record) -> Iterator[tuple[str, str]]:
    """Methods that both know, and problems that one of them does."""
    for method in after["counts"]:
        if method in before["counts"]:
            names = {**before["problems"], **after["problems"]}
            for problem in names:
                yield method, problem


def _shape(count: Record) -> list[int]:
    return [len(row) for row in count["evaluations"]]


def told(found: Difference) -> str:
    """The lines that a reader is shown."""
    lines = [*found.incomparable, *map(str, found.changes)]
    return "\n".join([*lines, f"{found.compared:,} counts compared, {len(found.changes)} rows differ"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files; 0 where they are the same."""
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    found = compare(json.loads(options.before.read_text()), json.loads(options.after.read_text()))
    print(told(found))
    return 0 if found.same else 1


if __name__ == "__main__":
    raise SystemExit(main())
