"""Evaluations to tolerance on the convergence suite, every method measured by the same ruler.

    python -m bench.convergence --out bench/results/convergence.json            # everything, several minutes
    python -m bench.convergence --quick                                         # eleven problems, under a minute
    python -m bench.convergence --problems 'linear/*' --no-time                 # a part of it
    python -m bench.convergence --no-time --methods 'deqfast *' --against OLD.json  # did a change move a count?

Writes one JSON file, prints the tables, and draws performance profiles to docs/img/.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import counts, meta, methods, problems, tolerance_time
from bench.families.scaling import rescaled
from bench.peers import Peer
from bench.recorder import count
from bench.report import pictures, summary

TOLERANCES = (1e-3, 1e-5, 1e-6)
HEADLINE = (1e-3, 1e-5)
CAP = 300
SCALE_PROBLEMS = ("mlp/2", "linear/non-normal .9", "attention-adjoint/1")
POWERS = (-20, -10, -1, 1, 10, 20)
OTHER_FACTORS = (1e-6, 1e-3, 0.3, 3.0, 1e3, 1e6)


def count_all(contestants: Sequence[Peer], suite: Sequence[problems.Problem], cap: int) -> dict[str, Any]:
    found_of: dict[str, dict[str, Any]] = {peer.name: {} for peer in contestants}
    described: dict[str, Any] = {}
    for index, problem in enumerate(suite, 1):
        start = time.perf_counter()
        tolerances = [t for t in TOLERANCES if t >= problem.tightest]
        described[problem.name] = {
            "B": problem.B, "N": problem.N, "notes": problem.notes, "tolerances": tolerances, "cheap": problem.cheap,
        }  # fmt: skip
        for peer in contestants:
            found = count(peer, problem, tolerances, cap)
            found_of[peer.name][problem.name] = vars(found)
            if found.error:
                print(f"    {peer.name} raised on {problem.name}: {found.error}", flush=True)
        took = time.perf_counter() - start
        print(f"[{index:2d}/{len(suite)}] {problem.name:<30s} {took:5.1f} s", flush=True)
    return {"problems": described, "counts": found_of}


def scaling(peer: Peer, cap: int) -> list[dict[str, Any]]:
    """Change of the evaluation counts under z -> s f(z / s): none for powers of two is the claim, at most one else."""
    rows = []
    for name in SCALE_PROBLEMS:
        problem = problems.make(name)
        plain = torch.tensor(count(peer, problem, HEADLINE, cap).evaluations)
        for label, factors in (("powers of two", [2.0**p for p in POWERS]), ("other", OTHER_FACTORS)):
            change = 0
            for factor in factors:
                f, z0 = rescaled(problem.f, problem.z0, factor)
                moved = problems.Problem(name, problem.family, f, z0)
                change = max(
                    change, int((torch.tensor(count(peer, moved, HEADLINE, cap).evaluations) - plain).abs().max())
                )
            rows.append({"method": peer.name, "problem": name, "factors": label, "largest_change": change})
    return rows


def print_table(record: dict[str, Any]) -> None:
    default = summary.geometric_mean(record, methods.DEFAULT, HEADLINE) if methods.DEFAULT in record["counts"] else None
    print(f"\n{'method':<44s} {'mean':>6s} {'failed':>7s} {'ratio':>6s}   " + "".join(f"{t:>16g}" for t in TOLERANCES))
    for method in record["counts"]:
        mean = summary.geometric_mean(record, method, HEADLINE)
        line = f"{method:<44s} {mean:6.1f} {summary.failed_percent(record, method, HEADLINE):6.1f}%"
        line += f" {mean / default:6.2f}   " if default else "      -   "
        for t in TOLERANCES:
            one, failed = summary.geometric_mean(record, method, (t,)), summary.failed_percent(record, method, (t,))
            line += f"{one:8.1f} {failed:5.1f} %"
        print(line)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.convergence", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/convergence.json"))
    parser.add_argument("--img", type=Path, default=Path("docs/img"), help="folder of the pictures")
    parser.add_argument("--quick", action="store_true", help="eleven problems, fewer methods and rounds")
    parser.add_argument("--problems", default="*", help="shell pattern of problem names")
    parser.add_argument("--methods", nargs="+", default=["*"], help="shell patterns of methods, torchdeq's among them")
    parser.add_argument("--against", type=Path, help="an earlier result: ends with 1 where a count has changed")
    parser.add_argument("--rivals-only", action="store_true", help="torchdeq alone; needs no deqfast")
    parser.add_argument("--shown-only", action="store_true", help="deqfast's defaults and torchdeq, no variants")
    parser.add_argument("--no-time", action="store_true", help="skip the time to tolerance")
    parser.add_argument("--backend", default="native", help="deqfast's backend")
    parser.add_argument("--cap", type=int, default=CAP)
    return parser.parse_args(arguments)


def _named(peer: Peer, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(peer.name, pattern) for pattern in patterns)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    rivals = methods.rivals()
    own = [] if options.rivals_only else methods.own(options.backend, options.quick)
    if options.shown_only:
        own = [peer for peer in own if peer.name in methods.SHOWN]
    own, rivals = ([p for p in peers if _named(p, options.methods)] for peers in (own, rivals))
    suite = problems.suite(pattern=options.problems, quick=options.quick)
    print(f"{len(suite)} problems built in {time.perf_counter() - start:.1f} s", flush=True)
    command = "python -m bench.convergence" + (" --quick" if options.quick else "")
    bystanders = meta.Bystanders()
    record: dict[str, Any] = {"meta": {}, "kind": "convergence", "quick": options.quick}
    record.update(cap=options.cap, tolerances=list(TOLERANCES), headline=list(HEADLINE))
    record.update(count_all([*own, *rivals], suite, options.cap))
    print_table(record)
    if own and not options.against:
        record["scaling"] = scaling(own[0], options.cap)
        if not options.no_time:
            contestants = [peer for peer in [*own, *rivals] if peer.name in methods.SHOWN]
            record["time"] = tolerance_time.measure(contestants, HEADLINE, options.cap, options.quick)
            print(f"\ntime to tolerance, best of torchdeq's three / deqfast: {record['time']['summary']}")
    record["meta"] = meta.describe(command, bystanders)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record))
    shown = [method for method in methods.SHOWN if method in record["counts"]]
    pictures.performance_profiles(record, shown, options.img / "performance_profiles.png")
    print(f"\nwrote {options.out} and pictures in {options.img}, {time.perf_counter() - start:.0f} s in all")
    if options.against is None:
        return 0
    found = counts.compare(json.loads(options.against.read_text()), record)
    print(f"\nagainst {options.against}:\n{counts.told(found)}")
    return 0 if found.same else 1


if __name__ == "__main__":
    raise SystemExit(main())
