"""Fills the measured figures into README.md: ``python docs/make_readme.py``.

Takes the newest full runs in bench/results/ (``make bench``, ``python -m bench.convergence``) and the demo's
out/digits.json (``make demo``). What has not been measured leaves its part of the README as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import methods, targets  # noqa: E402
from bench.report import summary  # noqa: E402
from bench.report.markdown import CROWDED, provenance, table  # noqa: E402
from bench.report.newest import newest  # noqa: E402
from bench.report.sections import speed_rows  # noqa: E402

Record = Mapping[str, Any]
COLUMNS = {
    "like for like": targets.LIKE_FOR_LIKE,
    "`dq.Anderson()`": targets.DEFAULT,
    "`dq.Broyden()`": targets.BROYDEN,
}


def fill(text: str, name: str, body: str) -> str:
    """``text`` with ``body`` between the markers of ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"README.md: expected {begin} and {end} once each")
    return re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)


def speed_block(record: Record) -> list[str]:
    """Times faster than torchdeq, size by size."""
    anderson, broyden = (speed_rows(record, method) for method in ("anderson", "broyden"))
    rows = []
    for size in anderson:
        found = {**anderson[size], **broyden.get(size, {})}
        cells = [found[row]["ratio_to_torchdeq"] if row in found else None for row in COLUMNS.values()]
        rows.append([size, *("-" if ratio is None else f"{ratio:.1f}x" for ratio in cells)])
    note = (
        "A solver step with a nearly free f, float32, equal evaluations: torchdeq 0.1.0's time over deqfast's, medians "
        "of rows that took turns in one run. *Like for like* is torchdeq's own method: Type II, m=6, float32 history."
    )
    return [note, table(["B x N", *COLUMNS], rows), provenance(record["machine_info"])]


def convergence_block(record: Record) -> list[str]:
    """Evaluations to tolerance and failures, against every peer of the suite."""
    headline = record["headline"]
    rows = []
    for method in (methods.DEFAULT, "deqfast Broyden()", *methods.TORCHDEQ_ALL):
        if method in record["counts"]:
            failed = summary.failed_percent(record, method, headline)
            rows.append([method, f"{summary.geometric_mean(record, method, headline):.1f}", f"{failed:.1f} %"])
    note = (
        f"Evaluations of f until ||f(z) - z|| <= tolerance ||f(z)||, geometric mean over {len(record['problems'])} "
        f"problems at {' and '.join(f'{t:g}' for t in headline)}, at most {record['cap']}:"
    )
    meta = {**record["meta"], "busy_elsewhere": None}  # counts do not mind company
    return [note, table(["method", "evaluations", "samples that failed"], rows), provenance(meta)]


def rows_block(record: Record) -> list[str]:
    """What a batch pays for its slowest sample, plain and with ``compact="auto"``."""
    rows = []
    for row in record["rows"]:
        if "faster" in row:
            plain = next(r for r in record["rows"] if r["case"] == row["case"] and r["row"] == "plain")
            rows.append(
                [
                    row["case"],
                    f"{plain['evaluations']} (mean {plain['mean']:.0f})",
                    f"{plain['rows']:,d}",
                    f"{row['rows']:,d}",
                    f"{row['own']:,d}",
                    f"{row['faster']['ratio']:.1f}x",
                ]
            )
    note = (
        'Rows of f that a solve evaluates, plain and with `compact="auto"`, the rows that its samples need by '
        "themselves, and the time of the plain one over the other's:"
    )
    header = ["batch", "evaluations", "plain", '`compact="auto"`', "the samples' own", "time"]
    return [note, table(header, rows), provenance(record["meta"], of_the_processor=True)]


def measured(results: Path) -> list[str]:
    """The parts that full runs of the benchmarks give; a quick trial, or times taken on a busy machine, are none."""
    speed, convergence, rows = (newest(results, kind) for kind in ("speed", "convergence", "rows"))
    parts = []
    if rows is not None and not rows["quick"]:
        parts += rows_block(rows)
    if speed is not None:
        machine = speed["machine_info"]
        if machine.get("quick", False) or (machine.get("busy_elsewhere") or 0.0) > CROWDED:
            print("left out: the newest times come from a quick trial or from a busy machine")
        else:
            parts += speed_block(speed)
    if convergence is not None and not convergence["quick"]:
        parts += convergence_block(convergence)
    return parts


def demo_block(record: Record, picture: str | None) -> str:
    """The table of the digits demo."""
    rows = []
    for run in record["runs"]:
        epochs = [sum(parts) for parts in zip(run["forward_s"], run["backward_s"], run["rest_s"], strict=True)]
        rows.append(
            [
                run["name"],
                f"{100 * run['accuracy'][-1]:.1f} %",
                f"{mean(run['calls']):.1f} + {mean(run['vjps']):.1f}",
                f"{median(epochs):.3f}",
                f"{run['ratio_to_deqfast']:.2f}x",
                f"{run['forward_residual']['worst']:.0e} / {run['backward_residual']['worst']:.0e}",
            ]
        )
    header = ["", "test accuracy", "f + VJPs a batch", "s an epoch", "/ deqfast", "worst residual, state / gradient"]
    machine, options = record["machine"], record["options"]
    packages = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    parts = [
        f"Training a DEQ on scikit-learn's digits, the same model and initial weights with each library, "
        f"{options['epochs']} epochs, asked for a relative residual of {record['runs'][0]['rtol']:g} "
        "unless the row says otherwise:",
        table(header, rows),
    ]
    if picture:
        parts.append(f"![Convergence and timing of the digits demo]({picture})")
    given = " ".join(f"--{name} {options[name]}" for name in ("epochs", "batch", "hidden", "seed") if name in options)
    parts.append(
        f"`python examples/digits.py {given}` on {machine['processor']} ({machine['threads']} torch threads), "
        f"{record['date']}; python {machine['python']}, {packages}."
    )
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite README.md with whatever has been measured."""
    parser = argparse.ArgumentParser(prog="python docs/make_readme.py", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--demo", type=Path, default=ROOT / "out" / "digits.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    text, done = options.readme.read_text(), []
    parts = measured(options.results)
    if parts:
        text = fill(text, "bench", "\n\n".join([*parts, "All of it: [docs/benchmarks.md](docs/benchmarks.md)."]))
        done.append("bench")
    if options.demo.is_file():
        picture, target = options.demo.with_suffix(".png"), options.readme.parent / "docs" / "img" / "digits.png"
        if picture.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, target)
        shown = "docs/img/digits.png" if target.is_file() else None
        text = fill(text, "demo", demo_block(json.loads(options.demo.read_text()), shown))
        done.append("demo")
    if not done:
        raise SystemExit(f"nothing measured: no full results in {options.results}, no {options.demo}")
    options.readme.write_text(text)
    print(f"filled {' and '.join(done)} into {options.readme.name}")


if __name__ == "__main__":
    main()
