"""The server: rounds of `WeightedFusion`, each judged on digits that no client has, and written to a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import telemetry_off  # noqa: F401  before Flower is imported

# isort: split
import checkpoint
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from fusion import WEIGHTINGS
from strategy import WeightedFusion, wait_for
from training import Options, initial, test_accuracy

app = ServerApp()


def run_rounds(
    grid: Grid,
    options: Options,
    path: Path | None = None,
    resume: bool = False,
    tell: Callable[[dict[str, Any]], None] = lambda row: None,
    wait_s: float = 120,
    answer_s: float = 600,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The weights after the last round, and a row a round.

    Args:
        grid: Flower's way to the clients.
        options: of the run.
        path: the checkpoint, written after every round; none without it.
        resume: go on after the round that ``path`` was written in.
        tell: hears each round's row.
        wait_s: seconds for all clients to come at first; a round goes on without those that have left.
        answer_s: seconds for a round's updates to come; those that do not are left out of it.
    """
    if options.weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {options.weighting!r}")
    if resume and path is None:
        raise ValueError("resume: expected the path of a checkpoint, got None")
    torch.set_num_threads(1)
    history: list[dict[str, Any]] = []
    weights = initial(options)
    if resume and path is not None:
        weights, history = checkpoint.load(path, options)
    wait_for(grid, options.clients, wait_s)
    strategy = WeightedFusion(WEIGHTINGS[options.weighting], len(history), wait_s)

    def judge(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 0:
            return None
        weights.update({name: array.numpy() for name, array in arrays.items()})
        row = {"round": len(history) + 1, "accuracy": test_accuracy(weights, options), **strategy.report}
        # As it will be read from a file: its keys are strings.
        history.append(json.loads(json.dumps(row)))
        if path is not None:
            checkpoint.save(path, weights, history, options)
        tell(history[-1])
        return MetricRecord({"accuracy": row["accuracy"]})

    strategy.start(
        grid,
        ArrayRecord({name: Array(array) for name, array in weights.items()}),
        num_rounds=max(0, options.rounds - len(history)),
        timeout=answer_s,
        train_config=ConfigRecord(dataclasses.asdict(options)),
        evaluate_fn=judge,
    )
    return weights, history


@app.main()
def main(grid: Grid, context: Context) -> None:
    """What `flwr run` starts: options from pyproject.toml, or from --run-config."""
    given: dict[str, Any] = dict(context.run_config)
    path, resume = Path(given.pop("checkpoint")), given.pop("resume")
    _, history = run_rounds(grid, Options(**given), path, resume, tell=say)
    print(f"finished: {len(history)} rounds", flush=True)


def say(row: dict[str, Any]) -> None:
    sent = row["bytes_down"] + row["bytes_up"]
    print(f"round {row['round']}: {row['accuracy']:.1%} of unseen digits right, {sent:,} bytes sent", flush=True)
