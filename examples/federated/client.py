"""The client: Flower hands it the server's weights, it trains on its own digits and sends back what it found.

A device says what it can afford, `--node-config "partition-id=3 num-partitions=10 budget=8"`; one that says nothing has
the budget that data.py gives its number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import telemetry_off  # noqa: F401  before Flower is imported

# isort: split
import data
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from training import Options, train

app = ClientApp()


@app.train()
def answer(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)  # several clients share a machine
    client = int(context.node_config["partition-id"])
    budget = int(context.node_config.get("budget", data.budget(client)))
    config: dict[str, Any] = dict(message.content.config_records["config"])
    options = Options(**{field.name: config[field.name] for field in dataclasses.fields(Options)})
    weights = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
    try:
        update = train(weights, client, config["server-round"], budget, options)
    except Exception as error:
        raise RuntimeError(f"client {client}: {error}") from error  # the server sees no more of it than this text
    found = {"client": client, "examples": update.examples, "budget": budget}
    metrics = MetricRecord({**found, "residual": update.residual, "score": update.score})
    arrays = ArrayRecord({name: Array(array) for name, array in update.weights.items()})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
