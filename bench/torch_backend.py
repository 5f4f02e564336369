"""deqfast in plain torch against torchdeq's Anderson: `python -m bench.torch_backend --out FILE.json`.

Like for like (Type II, m=6, float32 history) and with the defaults, float32, a nearly free f, equal evaluations, rows
in turns. Beside the times, what torch dispatches a step: small states cost what their ops cost to launch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import equal, free, meta, peers, targets, timing
from bench.peers import Map, Peer

SIZES = ("1x64", "64x128", "64x1024", "512x512", "32x61440")
QUICK_SIZES = SIZES[:2]
EVALUATIONS = 30
FULL = 20  # evaluations after which every history is full


class Ops(TorchDispatchMode):
    """Counts what torch dispatches; views, which touch no numbers, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def ops_a_step(peer: Peer, f: Map, z0: torch.Tensor) -> float:
    """Dispatched ops of one more evaluation of a solve with a full history, f's own left out."""

    def ops(run: Callable[[], object]) -> int:
        with Ops() as counter:
            run()
        return counter.count

    few, many = (ops(partial(peer.solve, f, z0, evaluations, 0.0)) for evaluations in (FULL, EVALUATIONS))
    return (many - few) / (EVALUATIONS - FULL) - ops(partial(f, z0))


def contestants(backend: str) -> list[Peer]:
    solvers = equal.own_anderson()
    own = [peers.deqfast(solvers[name], name, backend) for name in (targets.LIKE_FOR_LIKE, targets.DEFAULT)]
    return [*own, peers.torchdeq("anderson", targets.TORCHDEQ)]


def compare(size: str, backend: str, rounds: int) -> list[dict[str, Any]]:
    """Facts of every row at one size."""
    f, z0 = free.diagonal_map(*free.SIZES[size])
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    for peer in contestants(backend):
        outcome = peers.run(peer, f, z0, EVALUATIONS)
        residual = float(outcome.residual.median())
        facts: dict[str, Any] = {
            "size": size,
            "row": peer.name,
            "evaluations": outcome.evaluations,
            "residual": residual,
        }
        rows.append({**facts, "ops": ops_a_step(peer, f, z0)})
        calls[peer.name] = partial(peer.solve, f, z0, EVALUATIONS, 0.0)
    taken = timing.alternate(calls, rounds=rounds, least_rounds=rounds)
    for facts in rows:
        own, scale = taken[facts["row"]], 1e6 / EVALUATIONS
        low, high = own.quartiles
        facts.update(us=own.median * scale, us_low=low * scale, us_high=high * scale)
        facts.update(vars(timing.ratio(own.seconds, taken[targets.TORCHDEQ].seconds)))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.torch_backend", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backend", default="torch", help="deqfast's backend")
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds: a trial, not a measurement")
    options = parser.parse_args(arguments)
    bystanders, rows = meta.Bystanders(), []
    with torch.no_grad():
        for size in QUICK_SIZES if options.quick else SIZES:
            rows += compare(size, options.backend, rounds=3 if options.quick else 40)
            for facts in [row for row in rows if row["size"] == size]:
                interval = f"{facts['ratio']:.3f} [{facts['low']:.3f}, {facts['high']:.3f}]"
                print(f"{size:>9s}  {facts['row']:<38s}{facts['us']:>10,.1f} us  {interval}  {facts['ops']:.1f} ops")
    command = f"python -m bench.torch_backend --backend {options.backend}" + (" --quick" if options.quick else "")
    record = {"kind": "torch", "quick": options.quick, "backend": options.backend, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**record, "meta": meta.describe(command, bystanders)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
