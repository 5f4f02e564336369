"""The server's side of a round, a Flower strategy: who is fused, with which weight, and what was sent."""

from __future__ import annotations

import time
from collections.abc import Iterable
from logging import getLogger
from typing import Any

import telemetry_off  # noqa: F401  before Flower is imported

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from fusion import NobodyLeft, Update, Weighting, fuse, normalised, sift

log = getLogger("flwr")


class WeightedFusion(FedAvg):
    """theta <- sum_k w_k theta_k over the clients of a round, w_k proportional to n_k^a q_k.

    A client that fails, does not answer, sends another architecture or numbers that are not finite, or whose weight is
    negative is left out and named in the log and in `report`; the round goes on with the others. Where nobody is left,
    or all weights are 0, the model stays as it was, and that is said too: a long run survives one bad round.

    Args:
        weighting: n_k^a q_k of an update.
        rounds_before: rounds of a run that is resumed.
        wait_s: seconds that a round waits for one client at least to be connected, then TimeoutError.
    """

    def __init__(self, weighting: Weighting, rounds_before: int = 0, wait_s: float = 120) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1, min_evaluate_nodes=0, min_available_nodes=1)
        self.wait_s = wait_s
        self.weighting = weighting
        self.rounds_before = rounds_before
        self.report: dict[str, Any] = {}  # of the last round
        self.names: dict[int, str] = {}  # of Flower's node numbers, once a node has said which client it is

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        wait_for(grid, 1, self.wait_s)
        self.reference = {name: array.numpy() for name, array in arrays.items()}
        messages = list(super().configure_train(self.rounds_before + server_round, arrays, config, grid))
        self.asked = [message.metadata.dst_node_id for message in messages]
        self.bytes_down = sum(map(size, messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        updates, left_out = self.read(replies)
        kept, weights, refused = sift(updates, self.reference, self.weighting)
        left_out |= {f"client {client}": why for client, why in refused.items()}
        where = f"round {self.rounds_before + server_round}"
        for name, why in left_out.items():
            log.warning("%s: %s is left out: %s", where, name, why)
        self.report = {
            "bytes_down": self.bytes_down,
            "bytes_up": sum(size(message) for message in replies if message.has_content()),
            "left_out": left_out,
            "weights": {},
            "updates": {u.client: {"budget": u.budget, "residual": u.residual, "score": u.score} for u in kept},
        }
        try:
            shares = normalised(weights)
        except NobodyLeft as error:
            log.warning("%s: nobody is left, the model stays as it was (%s)", where, error)
            return None, None
        self.report["weights"] = {update.client: share for update, share in zip(kept, shares, strict=True)}
        fused = fuse(kept, weights)
        return ArrayRecord({name: Array(array) for name, array in fused.items()}), None

    def read(self, replies: list[Message]) -> tuple[list[Update], dict[str, str]]:
        """What came back, and who failed, sent no update, or did not answer."""
        updates, failed = [], {}
        silent = set(self.asked)
        for message in replies:
            node = message.metadata.src_node_id
            silent.discard(node)
            if message.has_error():
                failed[self.name(node)] = f"it failed: {message.error.reason}"
                continue
            try:
                update = as_update(message)
            except (KeyError, TypeError, ValueError) as error:
                failed[self.name(node)] = f"it sent no update: {error!r}"
                continue
            self.names[node] = f"client {update.client}"
            updates.append(update)
        return updates, failed | {self.name(node): "it did not answer in time" for node in sorted(silent)}

    def name(self, node: int) -> str:
        return self.names.get(node, f"node {node}")


def wait_for(grid: Grid, clients: int, seconds: float) -> None:
    """Until so many clients are connected; Flower itself would wait for ever."""
    end = time.monotonic() + seconds
    while (come := len(list(grid.get_node_ids()))) < clients:
        if time.monotonic() > end:
            raise TimeoutError(f"{come} of {clients} clients came within {seconds:g} s")
        time.sleep(0.2)


def as_update(message: Message) -> Update:
    metrics: Any = message.content.metric_records["metrics"]
    arrays = message.content.array_records["arrays"]
    return Update(
        client=int(metrics["client"]),
        weights={name: array.numpy() for name, array in arrays.items()},
        examples=int(metrics["examples"]),
        budget=int(metrics["budget"]),
        residual=float(metrics["residual"]),
        score=float(metrics["score"]),
    )


def size(message: Message) -> int:
    """Bytes of what a message carries, as Flower counts them."""
    return sum(record.count_bytes() for record in message.content.values())
