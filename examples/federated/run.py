"""Federated learning of an equilibrium network on handwritten digits, with Flower: what is sent, and what it is worth.

Ten clients have digits that are not shared out evenly and devices that afford 4 to 40 iterations. Each trains the
network it is sent on its own digits; the server fuses what comes back. Beside it the same network with its layers
written out, a network without layers, and five ways to weigh clients, each over several seeds.

    python examples/federated/run.py                 # tables, out/federated.json and out/federated.png; minutes
    python examples/federated/run.py --resume        # after it was stopped: goes on after the last round
    python examples/federated/run.py --seeds 10      # the comparison of the weightings, longer

Read training.py for what a client does, fusion.py for how the server weighs, strategy.py for what it does with clients
that fail, and docs/federated.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import data
import model as models
import timing
from figure import draw
from frame import TIMES, columns, paint, progress, provenance
from fusion import WEIGHTINGS
from training import Options, initial

PACKAGES = ("deqfast", "flwr", "ray", "torch", "torchdeq", "scikit-learn", "numpy")
# The weightings are compared on the equilibrium network; the others have no residual and no budget.
VARIANTS = [("equilibrium", weighting) for weighting in ("data", *sorted(set(WEIGHTINGS) - {"data"}))]
VARIANTS += [("explicit", "data"), ("shallow", "data")]
BASE = ("equilibrium", "data")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="splits, initial weights and orders of each row")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each run")
    parser.add_argument("--clients", type=int, default=10, help="clients")
    parser.add_argument("--turns", type=int, default=15, help="turns of each solver in the timing")
    parser.add_argument("--cpus", type=int, default=None, help="processes that serve clients; without it, one a core")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture, the JSON, checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on after the last round that was finished")
    parser.add_argument("--quick", action="store_true", help="two rounds, one seed: the numbers mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.rounds, args.turns = 1, 2, 1
    for name in ("seeds", "rounds", "clients", "turns"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.cpus is not None and args.cpus < 1:
        parser.error(f"--cpus must be at least 1, got {args.cpus}")
    return args


def everything(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record a run, in one simulation: {model, weighting, seed, history}."""
    try:  # Flower takes seconds to import, and is needed from here on
        from server import run_rounds
        from simulation import simulate
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("flwr", "ray"):
            raise
        raise SystemExit(
            f"{error.name} is not installed: make federated, or pip install 'deqfast[federated]'"
        ) from None

    runs = [
        Options(model, weighting, seed, args.clients, args.rounds, device=args.device)
        for seed in range(args.seeds)
        for model, weighting in VARIANTS
    ]
    records: list[dict[str, Any]] = []

    def serve(grid: Any) -> None:
        told = progress(
            [(options, k) for options in runs for k in range(options.rounds)],
            lambda item: f"{item[0].model}, {item[0].weighting}, seed {item[0].seed}",
            "round",
        )
        for options in runs:
            next(told, None)
            path = args.out / "federated" / f"{options.model}-{options.weighting}-{options.seed}.npz"
            go_on = args.resume and path.is_file()
            count = Counter(told, options.rounds)
            _, history = run_rounds(grid, options, path, go_on, tell=count)
            count.rest()
            found = {"model": options.model, "weighting": options.weighting, "seed": options.seed}
            records.append({**found, "history": history})
        next(told, None)

    simulate(serve, args.clients, args.device, args.cpus)
    return records


class Counter:
    """Moves a bar on with each round; the rounds of a resumed run that were there already at its end."""

    def __init__(self, bar: Iterable[Any], rounds: int) -> None:
        self.bar, self.left = iter(bar), rounds - 1  # the first round's step was made when the run began

    def __call__(self, row: dict[str, Any]) -> None:
        if self.left > 0:
            self.left -= 1
            next(self.bar, None)

    def rest(self) -> None:
        while self.left > 0:
            self({})


def of(records: list[dict[str, Any]], model: str, weighting: str) -> list[list[dict[str, Any]]]:
    """Histories by seed."""
    return [r["history"] for r in records if (r["model"], r["weighting"]) == (model, weighting)]


def final(history: list[dict[str, Any]]) -> float:
    """Accuracy in per cent after the last round."""
    return 100 * history[-1]["accuracy"]


def bytes_a_round(histories: list[list[dict[str, Any]]]) -> float:
    """Up and down, all clients."""
    return statistics.mean(row["bytes_up"] + row["bytes_down"] for history in histories for row in history)


def spread(values: list[float], form: Callable[[float], str]) -> str:
    return f"{form(statistics.mean(values))} ({form(min(values))} to {form(max(values))})"


def summaries(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a variant; differences are to the equilibrium network weighted by data, seed by seed."""
    base = [final(history) for history in of(records, *BASE)]
    rows = []
    for model, weighting in VARIANTS:
        histories = of(records, model, weighting)
        finals = [final(history) for history in histories]
        first = [next((r["round"] for r in h if r["accuracy"] >= 0.9), None) for h in histories]
        rows.append(
            {
                "model": model,
                "weighting": weighting,
                "parameters": sum(array.size for array in initial(Options(model)).values()),
                "bytes": bytes_a_round(histories),
                "final": finals,
                "difference": [a - b for a, b in zip(finals, base, strict=True)],
                "rounds_to_90": first,
                "curves": [[row["accuracy"] for row in history] for history in histories],
                "weights": [history[-1]["weights"] for history in histories],
                "left_out": sum(len(row["left_out"]) for history in histories for row in history),
            }
        )
    return rows


def fused_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["model", "weights", "parameters", "bytes a round", "/ equilibrium"]
    header += ["accuracy, % (seeds)", "difference, points (seeds)", "rounds to 90 %"]
    cells = []
    for row in rows:
        reached = [r for r in row["rounds_to_90"] if r is not None]
        cell = f"{statistics.mean(reached):.1f}" if len(reached) == len(row["rounds_to_90"]) else "-"
        difference = "" if row is rows[0] else spread(row["difference"], lambda v: f"{v:+.1f}")
        cells.append([row["model"], row["weighting"], f"{row['parameters']:,}", f"{row['bytes']:,.0f}"])
        cells[-1] += [f"{row['bytes'] / rows[0]['bytes']:.2f}x", spread(row["final"], lambda v: f"{v:.1f}")]
        cells[-1] += [difference, cell]
    return header, cells


def timed_table(timed: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["solver", "budget", "ms an epoch", "/ deqfast (turns)", "residual of the state"]
    cells = []
    for row in timed:
        ratio = f"{row['ratio']:.2f}x ({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f})"
        ratio = "1.00x" if row["name"] == "deqfast" else ratio
        cells.append([row["name"], str(row["budget"]), f"{1000 * row['seconds']:.1f}", ratio, f"{row['residual']:.0e}"])
    return header, cells


def targets(rows: list[dict[str, Any]], timed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    explicit = next(row for row in rows if row["model"] == "explicit")
    saved = explicit["bytes"] / rows[0]["bytes"]
    lead = -statistics.mean(explicit["difference"])
    found = [
        target("bytes a round, explicit over equilibrium", "at least 4x", f"{saved:.2f}x", saved >= 4),
        target("accuracy, equilibrium less explicit", "at least -3 points", f"{lead:+.1f} points", lead >= -3),
    ]
    for budget in timing.TIMED_BUDGETS:
        rivals = [row for row in timed if row["budget"] == budget and row["name"].startswith("torchdeq")]
        if rivals:
            fastest = min(rivals, key=lambda row: row["ratio"])
            what = f"a client's training, budget {budget}: fastest torchdeq ({fastest['name']}) over deqfast"
            found.append(target(what, "above 1x", f"{fastest['ratio']:.2f}x", fastest["ratio"] > 1))
    return found


def target(what: str, asked: str, measured: str, met: bool) -> dict[str, Any]:
    return {"what": what, "target": asked, "measured": measured, "met": bool(met)}


def remarks(rows: list[dict[str, Any]]) -> list[str]:
    """What a reader must know before he believes the table; which weighting is best is counted, not claimed."""
    weighted = [row for row in rows if row["model"] == "equilibrium"]
    seeds = range(len(weighted[0]["final"]))
    tops = [max(row["final"][k] for row in weighted) for k in seeds]
    best = [f"{row['weighting']} {sum(row['final'][k] == tops[k] for k in seeds)}" for row in weighted]
    means = [statistics.mean(row["final"]) for row in weighted]
    between = max(max(row["final"]) - min(row["final"]) for row in weighted)
    one_sided = [row["weighting"] for row in weighted[1:] if min(row["difference"]) * max(row["difference"]) > 0]
    shallow = next(row for row in rows if row["model"] == "shallow")
    left_out = sum(row["left_out"] for row in rows)
    explicit = next(row for row in rows if row["model"] == "explicit")
    until_90 = [
        f"{row['bytes'] * statistics.mean(row['rounds_to_90']) / 1e6:.1f} MB {row['model']}"
        for row in (rows[0], explicit, shallow)
        if None not in row["rounds_to_90"]
    ]
    fewer = rows[0]["bytes"] / shallow["bytes"]
    return [
        f"weightings: their means lie within {max(means) - min(means):.1f} points, the seeds of one of them up to "
        f"{between:.1f} apart; seeds at which each is best, ties counted for all: {', '.join(best)}; better or "
        f"worse than data at every seed: {', '.join(one_sided) or 'none'}.",
        f"shallow: one hidden layer and no equilibrium sends {fewer:.1f} times fewer bytes "
        f"than the equilibrium network at {statistics.mean(shallow['difference']):+.1f} points: these digits do not "
        "need depth. The equilibrium network is to be compared with the deep one.",
        f"sent until 90 % are right, which takes rounds as well as bytes: {', '.join(until_90) or 'not reached'}.",
        f"updates left out of a round: {left_out}.",
    ]


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    records = everything(args)
    options = Options(clients=args.clients, device=args.device)
    timed = []
    for budget in progress(timing.TIMED_BUDGETS, lambda budget: f"timing, budget {budget}", "budget"):
        timed += timing.measure(options, budget, args.turns)
    if not timing.HAS_TORCHDEQ:
        print("torchdeq is not installed, so nothing is timed against: pip install torchdeq==0.1.0 --no-deps")
    rows = summaries(records)
    tables = {"fused": fused_table(rows), "timed": timed_table(timed)}
    for header, cells in tables.values():
        print("\n" + columns(header, cells))
    notes = remarks(rows)
    met = targets(rows, timed)
    print()
    for note in notes:
        print(note)
    for t in met:
        print(f"{'met   ' if t['met'] else 'MISSED'}  {t['what']}: {t['measured']} (target {t['target']})")
    picture = args.out / "federated.png"
    shares = [part.labels.bincount(minlength=10).tolist() for part in data.split(0, args.clients)]
    budgets = [data.budget(k) for k in range(args.clients)]
    painted = paint(lambda path: draw(path, rows, timed, shares, budgets), picture, title_pad=22)
    record = {
        "name": "federated",
        "title": f"Federated learning of an equilibrium network: {met[0]['measured'].replace('x', TIMES)} fewer bytes",
        "quick": args.quick,
        **provenance(args, PACKAGES, silent=("out", "resume", "cpus")),
        "seconds": time.perf_counter() - started,
        "tables": {name: {"header": header, "rows": cells} for name, (header, cells) in tables.items()},
        "targets": met,
        "notes": notes,
        "picture": picture.name if painted else None,
        "rows": rows,
        "timed": timed,
        "clients": {"labels": shares, "budgets": budgets},
        "norm_bound": models.NORM_BOUND,
    }
    (args.out / "federated.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(f"\nWrote {args.out / 'federated.json'}" + (f" and {picture}" if painted else ""))


if __name__ == "__main__":
    main()
