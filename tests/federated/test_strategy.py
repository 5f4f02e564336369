"""Rounds on Flower with clients that are called in this process: what is fused, who is left out, what is resumed."""

import logging
import os
from dataclasses import asdict

import fusion
import numpy as np
import pytest
import telemetry_off  # before Flower

pytest.importorskip("flwr", reason="flwr is not installed: make federated-test")
pytest.importorskip("sklearn")

import client
from flower_grid import FIRST_NODE, CalledGrid
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg
from server import run_rounds
from strategy import WeightedFusion
from training import Options, initial, train

OPTIONS = Options(clients=3, rounds=3, epochs=1)
BUDGETS = [4, 8, 40]


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with caplog.at_level(logging.WARNING, "flwr"):
        yield lambda: [record.getMessage() for record in caplog.records if record.getMessage().startswith("round")]


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def updates_of(weights: dict, turn: int, options: Options = OPTIONS) -> list[fusion.Update]:
    return [train(weights, k, turn, budget, options) for k, budget in enumerate(BUDGETS)]


@pytest.mark.parametrize("weighting", fusion.WEIGHTINGS)
def test_rounds_on_flower_are_the_fusion_of_what_clients_made(weighting):
    options = Options(clients=3, rounds=2, epochs=1, weighting=weighting)
    weights, history = run_rounds(CalledGrid(client.app, BUDGETS), options)
    expected = initial(options)
    for turn in (1, 2):
        updates = updates_of(expected, turn, options)
        expected = fusion.fuse(updates, [fusion.WEIGHTINGS[weighting](update) for update in updates])
    assert equal(weights, expected)
    assert [row["round"] for row in history] == [1, 2]
    for row in history:
        assert sum(row["weights"].values()) == pytest.approx(1) and not row["left_out"]
        assert [row["updates"][str(k)]["budget"] for k in range(3)] == BUDGETS


def test_equal_weights_are_the_plain_average_on_flower_bit_for_bit():
    options = Options(clients=3, rounds=1, epochs=1, weighting="equal")
    weights, _ = run_rounds(CalledGrid(client.app, BUDGETS), options)
    updates = updates_of(initial(options), 1, options)
    for name, array in weights.items():
        average = sum(update.weights[name].astype(np.float64) for update in updates) / 3
        assert np.array_equal(array, average.astype(np.float32))


def test_equal_weights_agree_with_flowers_own_averaging_to_rounding():
    grid, options = CalledGrid(client.app, BUDGETS), Options(clients=3, rounds=1, epochs=1, weighting="equal")
    ours, _ = run_rounds(grid, options)

    def alike(turn, k, reply):
        reply.content["metrics"]["num-examples"] = 1
        return reply

    grid.spoil = alike
    theirs = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    start = ArrayRecord({name: Array(array) for name, array in initial(options).items()})
    result = theirs.start(grid, start, num_rounds=1, train_config=ConfigRecord(asdict(options)))
    for name, array in ours.items():
        np.testing.assert_allclose(array, result.arrays[name].numpy(), rtol=1e-5, atol=1e-7)


def test_bytes_are_counted_up_and_down():
    _, history = run_rounds(CalledGrid(client.app, BUDGETS), OPTIONS)
    numbers = 4 * sum(array.size for array in initial(OPTIONS).values())
    for row in history:
        for way in ("bytes_up", "bytes_down"):
            assert 3 * numbers < row[way] < 3 * (numbers + 2000)


def nan(reply):
    arrays = {name: array.numpy().copy() for name, array in reply.content["arrays"].items()}
    arrays["head.bias"][0] = np.nan
    reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return reply


def cut(reply):
    arrays = {name: array.numpy() for name, array in reply.content["arrays"].items()}
    arrays["cell.linear.weight"] = arrays["cell.linear.weight"][:5]
    reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return reply


def renamed(reply):
    arrays = {"other." + name: array for name, array in reply.content["arrays"].items()}
    reply.content["arrays"] = ArrayRecord(arrays)
    return reply


def without_metrics(reply):
    reply.content["metrics"] = MetricRecord({"client": 1})
    return reply


SPOILT = {
    "NaN": (nan, "client 1", "head.bias has 1 numbers that are not finite"),
    "shape": (cut, "client 1", "cell.linear.weight has shape (5, 96), expected (96, 96)"),
    "names": (renamed, "client 1", "another architecture"),
    "metrics": (without_metrics, "client 1", "it sent no update: KeyError"),
    "silence": (lambda reply: None, "client 1", "it did not answer in time"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_faulty_client_is_left_out_and_named_and_the_round_goes_on(fault, warned):
    spoil, name, why = SPOILT[fault]
    grid = CalledGrid(client.app, BUDGETS, lambda turn, k, reply: spoil(reply) if (turn, k) == (2, 1) else reply)
    weights, history = run_rounds(grid, OPTIONS)
    first, second, third = history
    assert list(second["left_out"]) == [name] and why in second["left_out"][name]
    assert warned() == [f"round 2: {name} is left out: {second['left_out'][name]}"]
    assert not first["left_out"] and not third["left_out"]
    assert list(second["weights"]) == ["0", "2"] and list(third["weights"]) == ["0", "1", "2"]
    expected = initial(OPTIONS)
    for turn in (1, 2, 3):
        updates = [u for u in updates_of(expected, turn) if (turn, u.client) != (2, 1)]
        expected = fusion.fuse(updates, [u.examples for u in updates])
    assert equal(weights, expected)


def test_a_client_that_raises_is_named_with_what_it_said(monkeypatch, warned):
    def broken(weights, k, turn, budget, options):
        if k == 2:
            raise MemoryError("no memory left")
        return train(weights, k, turn, budget, options)

    monkeypatch.setattr(client, "train", broken)
    _, history = run_rounds(CalledGrid(client.app, BUDGETS), Options(clients=3, rounds=1, epochs=1))
    assert history[0]["left_out"] == {f"node {FIRST_NODE + 2}": "it failed: client 2: no memory left"}
    assert list(history[0]["weights"]) == ["0", "1"]
    assert "client 2" in warned()[0]


def test_a_round_in_which_nobody_is_left_keeps_the_model_and_says_so(warned):
    grid = CalledGrid(client.app, BUDGETS, lambda turn, k, reply: nan(reply) if turn == 2 else reply)
    rows: list[dict] = []
    weights, history = run_rounds(grid, OPTIONS, tell=rows.append)
    assert history[1]["accuracy"] == history[0]["accuracy"] and history[1]["weights"] == {}
    assert set(history[1]["left_out"]) == {"client 0", "client 1", "client 2"} and len(history) == 3
    assert "round 2: nobody is left, the model stays as it was" in warned()[-1]
    assert rows == history
    once = updates_of(initial(OPTIONS), 1)
    kept = fusion.fuse(once, [u.examples for u in once])
    updates = updates_of(kept, 3)
    assert equal(weights, fusion.fuse(updates, [u.examples for u in updates]))


def test_weights_that_are_all_zero_keep_the_model(monkeypatch, warned):
    monkeypatch.setitem(fusion.WEIGHTINGS, "zero", fusion.Weighting(1.0, lambda u: 0.0))
    options = Options(clients=3, rounds=1, epochs=1, weighting="zero")
    weights, _ = run_rounds(CalledGrid(client.app, BUDGETS), options)
    assert equal(weights, initial(options))
    assert "expected one that is positive at least, got [0.0, 0.0, 0.0]" in warned()[0]


def test_a_client_with_a_negative_weight_is_left_out(monkeypatch, warned):
    monkeypatch.setitem(fusion.WEIGHTINGS, "odd", fusion.Weighting(0.0, lambda u: -1.0 if u.client == 0 else 1.0))
    options = Options(clients=3, rounds=1, epochs=1, weighting="odd")
    _, history = run_rounds(CalledGrid(client.app, BUDGETS), options)
    assert history[0]["weights"] == {"1": 0.5, "2": 0.5}
    assert warned() == [
        "round 1: client 0 is left out: its weight is -1.0, expected a finite number that is not negative"
    ]


def test_a_client_that_has_gone_is_done_without():
    grid = CalledGrid(client.app, BUDGETS)

    def tell(row):
        grid.connected = range(FIRST_NODE, FIRST_NODE + 2)

    _, history = run_rounds(grid, OPTIONS, tell=tell)
    assert [list(row["weights"]) for row in history] == [["0", "1", "2"], ["0", "1"], ["0", "1"]]


@pytest.mark.parametrize("after", [0, 1])
def test_clients_that_do_not_come_end_the_wait(after):
    grid = CalledGrid(client.app, BUDGETS)
    grid.connected = range(FIRST_NODE, FIRST_NODE + 3 * after)

    def tell(row):
        grid.connected = range(0)

    with pytest.raises(TimeoutError, match=f"0 of {3 if after == 0 else 1} clients came within 0.1 s"):
        run_rounds(grid, OPTIONS, tell=tell, wait_s=0.1)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(stop, tmp_path):
    weights, history = run_rounds(CalledGrid(client.app, BUDGETS), OPTIONS)
    path = tmp_path / "run.npz"

    def die(row):
        if row["round"] == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rounds(CalledGrid(client.app, BUDGETS), OPTIONS, path, tell=die)
    turns = []
    grid = CalledGrid(client.app, BUDGETS, lambda turn, k, reply: turns.append(turn) or reply)
    resumed, told = run_rounds(grid, OPTIONS, path, resume=True)
    assert min(turns) == stop + 1 and max(turns) == 3
    assert equal(resumed, weights) and told == history
    done, same = run_rounds(CalledGrid(client.app, BUDGETS), OPTIONS, path, resume=True)
    assert equal(done, weights) and same == history


def test_resuming_needs_a_path_and_a_weighting_that_is_known():
    with pytest.raises(ValueError, match="resume: expected the path of a checkpoint, got None"):
        run_rounds(CalledGrid(client.app, BUDGETS), OPTIONS, resume=True)
    with pytest.raises(ValueError, match=r"weighting: expected one of equal, data, .*, got 'best'"):
        run_rounds(CalledGrid(client.app, BUDGETS), Options(weighting="best"))


def test_telemetry_is_off():
    from flwr.supercore import telemetry

    assert telemetry_off.__doc__ and os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert telemetry.FLWR_TELEMETRY_ENABLED == "0"


def test_it_is_a_strategy_of_flowers():
    assert isinstance(WeightedFusion(fusion.WEIGHTINGS["data"]), FedAvg)
