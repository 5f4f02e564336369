"""Two checkouts of deqfast against each other, in turns: `python -m bench.ab OLD NEW --out FILE.json`.

Each has a process of its own that lives through the whole run (bench/ab_worker.py), so imports and warm-up are paid
once; a pair is one turn of each, and who goes first alternates. What is told of a case is the median over the pairs
of new time / old time with its 95 % interval, and whether both computed the same bits. Both checkouts must be built in
place: deqfast/_C beside the sources, and deqfast/kernels -> ../kernels.

    git worktree add OLD REVISION && make -C OLD build && ln -sfn ../kernels OLD/deqfast/kernels
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from bench import ab_worker, meta, timing

PAUSE = 0.003  # seconds between turns: a worker's threads spin for a moment after their last loop
WORKER = Path(__file__).with_name("ab_worker.py")


class Side:
    """A checkout and the process that times it."""

    def __init__(self, checkout: Path, threads: int) -> None:
        self.checkout = checkout.resolve()
        command = [sys.executable, str(WORKER), str(self.checkout), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the worker of {self.checkout} ended, asked for {request}; its message is above")
        found: dict[str, Any] = json.loads(answer)
        return found

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pipes, which is what a worker ends at."""
        self.process.__exit__(None, None, None)

    def revision(self) -> str | None:
        """The commit, marked where tracked files differ from it."""
        command = ["git", "-C", str(self.checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None


def compare(case: str, old: Side, new: Side, pairs: int, turn: float) -> dict[str, Any]:
    """Facts of one case; ``turn``: seconds that a turn shall last at least."""
    opened = [side.ask(open=case) for side in (old, new)]
    calls = max(1, round(turn / max(1e-7, statistics.mean(answer["seconds"] for answer in opened))))
    taken: dict[Side, list[float]] = {old: [], new: []}
    for pair in range(pairs):
        for side in (old, new) if pair % 2 == 0 else (new, old):
            time.sleep(PAUSE)
            taken[side].append(side.ask(calls=calls)["seconds"])
    found = timing.ratio(taken[new], taken[old])
    return {
        "case": case,
        "pairs": pairs,
        "calls": calls,
        "old_us": 1e6 * statistics.median(taken[old]),
        "new_us": 1e6 * statistics.median(taken[new]),
        **vars(found),
        "same_bits": opened[0]["digest"] == opened[1]["digest"],
    }


def told(row: dict[str, Any]) -> str:
    sure = "" if row["coverage"] >= timing.LEVEL else f" ({row['coverage']:.0%})"
    bits = "" if row["same_bits"] else "  other bits"
    return (
        f"{row['case']:<56s}{row['old_us']:>12,.1f}{row['new_us']:>12,.1f}"
        f"{row['ratio']:>11.4f}  [{row['low']:.4f}, {row['high']:.4f}]{sure}{bits}"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ab", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="checkout, built in place")
    parser.add_argument("new", type=Path, help="checkout, built in place")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=40, help="turns of each side a case")
    parser.add_argument("--turn", type=float, default=0.05, help="seconds that a turn lasts at least")
    parser.add_argument("--cases", default="*", help="shell pattern of their names")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    names = [name for name, _, _ in ab_worker.cases() if fnmatch(name, options.cases)]
    if not names:
        raise SystemExit(f"no case is called {options.cases}")
    bystanders = meta.Bystanders()
    if options.threads:
        torch.set_num_threads(options.threads)  # for the record: the workers are told so too
    print(f"{'':56s}{'old, us':>12s}{'new, us':>12s}{'new / old':>11s}")
    rows = []
    with Side(options.old, options.threads) as old, Side(options.new, options.threads) as new:
        for name in names:
            rows.append(compare(name, old, new, options.pairs, options.turn))
            print(told(rows[-1]), flush=True)
    # Here, not above: what a child took counts as the parent's only once it has ended.
    command = f"python -m bench.ab OLD NEW --pairs {options.pairs} --turn {options.turn:g} --threads {options.threads}"
    record: dict[str, Any] = {"kind": "ab", "meta": meta.describe(command, bystanders), "rows": rows}
    record.update(old=old.revision(), new=new.revision())
    mean = statistics.geometric_mean([row["ratio"] for row in rows])
    print(f"{len(rows)} cases, geometric mean of the ratios {mean:.4f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
