"""Training steps beside JAX's and torchdeq's: `python -m bench.training --jax .venv-jax/bin/python --out FILE.json`.

One step: forward solve, a loss, the backward solve, the gradients of all parameters; no optimiser. Every row is asked
for the same relative tolerance in both passes, and what it returns is measured beside its time. Rows take turns within
one run, those of JAX too, in a process that waits for its turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import meta, targets, timing
from bench.compat_training import held, times
from bench.training.elsewhere import Elsewhere, Worker
from bench.training.nets import NETS
from bench.training.torch_rows import BARE, Bare, Step, exact_gradient, steps

Row = dict[str, Any]
WITHIN = 10.0  # times the tolerance that a gradient may be off by for its row to be compared


def net_rows(name: str, python: str | None, rounds: int, budget: float) -> tuple[list[Row], dict[str, str]]:
    """All rows of one net, and the versions of JAX's packages."""
    net = NETS[name]()
    exact = exact_gradient(net)
    calls: dict[str, Callable[[], object]] = {}
    facts: dict[str, Row] = {}
    for row, step in steps(net):
        calls[row] = step
        facts[row] = _facts(step, exact)
    calls[BARE] = bare = Bare(net)
    facts[BARE] = {"evaluations": bare.evaluations}
    worker = Worker(python, name) if python else None
    for row, found in (worker.rows if worker else {}).items():
        facts[row] = {key: value for key, value in found.items() if key != "gradient"}
        if worker is not None and "failed" not in found:
            calls[row] = Elsewhere(worker, row)
            flat = torch.cat([torch.tensor(found["gradient"][key]).double() for key in sorted(found["gradient"])])
            facts[row]["gradient_error"] = float((flat - exact).norm() / exact.norm())
    taken = timing.alternate(calls, rounds=rounds, least_rounds=min(rounds, 7), budget=budget)
    if worker is not None:
        worker.end()
    rows = [{"net": name, "row": row, **(times(taken[row]) if row in taken else {}), **facts[row]} for row in facts]
    _hold(name, rows, taken)
    return rows, worker.versions if worker else {}


def _facts(step: Step, exact: torch.Tensor) -> Row:
    step()
    found = step.facts()
    found["gradient_error"] = float((step.cell.gradient() - exact).norm() / exact.norm())
    return found


def _hold(name: str, rows: list[Row], taken: dict[str, timing.Timing]) -> None:
    """Mark deqfast's fastest rows with what they are held against."""
    by_name = {row["row"]: row for row in rows}

    def fastest(prefixes: tuple[str, ...], *, compiled: bool = True) -> str | None:
        names = [
            row["row"]
            for row in rows
            if row["row"].startswith(prefixes)
            and "ms" in row
            and row["gradient_error"] <= WITHIN * targets.TRAINING_RTOL
            and (compiled or "compiled" not in row["row"])
        ]
        return min(names, key=lambda n: float(by_name[n]["ms"]), default=None)

    best, plain = fastest(("deqfast",)), fastest(("deqfast",), compiled=False)
    assert best is not None and plain is not None
    checks = by_name[best]["held"] = []
    for rival, prefixes in (("jaxopt", ("jaxopt",)), ("JAX by hand", ("JAX by hand",)), ("torchdeq", ("torchdeq",))):
        other = fastest(prefixes)
        if other is not None:
            found = timing.ratio(taken[other].seconds, taken[best].seconds)
            checks.append(held(f"{name}: fastest of {rival} ({other}) / {best}", found, targets.TRAINING[rival][name]))
    found = timing.ratio(taken["deqfast Broyden()"].seconds, taken[BARE].seconds)
    asked = targets.TRAINING["bare"].get(name)
    if asked is not None:
        by_name["deqfast Broyden()"].setdefault("held", []).append(
            held(f"{name}: deqfast Broyden() / its bare calls", found, asked, at_most=True)
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--jax", default=None, help="an interpreter that has jax, jaxopt and optimistix")
    parser.add_argument("--only", choices=list(NETS), help="one net")
    parser.add_argument("--quick", action="store_true", help="few rounds: a trial, not a measurement")
    options = parser.parse_args(arguments)
    bystanders = meta.Bystanders()
    rows: list[Row] = []
    versions: dict[str, str] = {}
    for name in [options.only] if options.only else NETS:
        found, versions = net_rows(name, options.jax, 3 if options.quick else 21, 3.0 if options.quick else 20.0)
        rows += found
        for row in found:
            print({key: value for key, value in row.items() if key != "net"} | {"net": name}, flush=True)
    described = meta.describe("python -m bench.training" + (" --jax PYTHON" if options.jax else ""), bystanders)
    described["versions"] = {**described["versions"], **versions}  # type: ignore[dict-item]
    record = {"kind": "training", "quick": options.quick, "meta": described, "rows": rows}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
