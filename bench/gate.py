"""What became slower since the results that are committed: `python -m bench.gate`, after `make bench`.

Machines differ, so times are not compared: only a row against its rival in the same run, and with the spread that the
run itself found. A figure became slower where the two intervals do not meet. Evaluations do not depend on the machine:
their geometric mean may grow by one per cent. Ends with 1 where something did, and with 2 where nothing could be
compared.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import methods, targets
from bench.report import summary
from bench.report.markdown import Results, number
from bench.report.newest import newest
from bench.report.sections import joint_rows, speed_rows

ROOT = Path(__file__).parents[1]
KINDS = ("speed", "convergence", "torch", "compat", "segments", "training")
LABELS = ("part", "case", "backend", "solver", "f", "size", "W", "row")
MORE_EVALUATIONS = 1.01
MORE_FAILURES = 0.1  # points


@dataclass(frozen=True)
class Figure:
    """A row over its rival: more is slower; the quartiles of the run, or its interval, lie between low and high."""

    name: str
    value: float
    low: float
    high: float

    def slower_than(self, before: Figure) -> bool:
        """Whether it is beyond what both runs leave open."""
        return self.low > before.high


def figures(kind: str, record: Results) -> Iterator[Figure]:
    """What one record says of deqfast's own rows."""
    if kind == "speed":
        yield from _speed(record)
    elif kind == "torch":
        for row in record["rows"]:
            if "ratio" in row:
                yield Figure(
                    f"{row['row']}, torch, {row['size']}: over torchdeq", row["ratio"], row["low"], row["high"]
                )
    elif kind == "convergence":
        yield from _counts(record)
    else:
        for row in record["rows"]:
            found = row.get("held", [])
            for held in [found] if isinstance(found, dict) else found:
                yield _held(kind, row, held)


def _held(kind: str, row: Results, held: Results) -> Figure:
    label = ", ".join(str(row[key]) for key in LABELS if key in row)
    name = f"{kind}, {label}: {held['what']}"
    value, low, high = held["value"], held["low"], held["high"]
    return Figure(name, value, low, high) if held["at_most"] else Figure(name, 1 / value, 1 / high, 1 / low)


def _speed(record: Results) -> Iterator[Figure]:
    for method in ("anderson", "broyden"):
        for size, facts_of in speed_rows(record, method).items():
            rival = facts_of.get(targets.TORCHDEQ)
            for name, row in facts_of.items():
                if rival is not None and name in (*targets.SPEED, targets.BFLOAT16):
                    low, high = row["us_low"] / rival["us_high"], row["us_high"] / rival["us_low"]
                    yield Figure(f"{name}, {size}: over torchdeq", row["us"] / rival["us"], low, high)
    for size, facts_of in joint_rows(record).items():
        rival = next((row for row in facts_of.values() if "ratio_to_torch" not in row), None)
        for name, row in facts_of.items():
            if rival is not None and "ratio_to_torch" in row:
                low, high = row["us_low"] / rival["us_high"], row["us_high"] / rival["us_low"]
                yield Figure(f"joint step, {name}, {size}: over torch", row["us"] / rival["us"], low, high)


def _counts(record: Results) -> Iterator[Figure]:
    headline = record["headline"]
    for method in methods.SHOWN:
        if method.startswith("deqfast") and method in record["counts"]:
            mean = summary.geometric_mean(record, method, headline)
            yield Figure(f"{method}: evaluations", mean, mean / MORE_EVALUATIONS, mean)
            failed = summary.failed_percent(record, method, headline)
            yield Figure(f"{method}: failed samples, %", failed, failed - MORE_FAILURES, failed)


def committed(revision: str, into: Path) -> Path:
    """The results of a commit, below a folder."""
    command = ["git", "archive", revision, "bench/results"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(into, filter="data")
    return into / "bench" / "results"


def compare(before: Path, after: Path) -> tuple[list[str], list[str], int]:
    """Lines on what became slower and on what could not be compared, and how many figures were."""
    slower, missing, compared = [], [], 0
    for kind in KINDS:
        old, new = newest(before, kind), newest(after, kind)
        if old is None or new is None or old == new:
            missing.append(f"{kind}: {'no new results' if old == new else 'results on one side only'}")
            continue
        known = {figure.name: figure for figure in figures(kind, old)}
        for figure in figures(kind, new):
            earlier = known.get(figure.name)
            if earlier is None:
                missing.append(f"{figure.name}: not measured before")
                continue
            compared += 1
            if figure.slower_than(earlier):
                slower.append(f"{figure.name}: {_told(earlier)} -> {_told(figure)}")
    return slower, missing, compared


def _told(figure: Figure) -> str:
    return f"{number(figure.value)} ({number(figure.low)} to {number(figure.high)})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__.splitlines()[0])
    parser.add_argument("--before", default="HEAD", help="a commit, or a folder of results")
    parser.add_argument("--after", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(options.before)
        before = given if given.is_dir() else committed(options.before, Path(folder))
        slower, missing, compared = compare(before, options.after)
    for line in missing:
        print(f"not compared: {line}")
    for line in slower:
        print(f"slower: {line}")
    print(f"{compared} figures compared, {len(slower)} became slower")
    return 1 if slower else 0 if compared else 2


if __name__ == "__main__":
    sys.exit(main())
