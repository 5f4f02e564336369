"""A SuperLink and SuperNodes as processes on loopback: two rounds, the bits of one process, and an end."""

from pathlib import Path

import pytest
import telemetry_off  # noqa: F401  before Flower

pytest.importorskip("flwr", reason="flwr is not installed: make federated-test")
pytest.importorskip("sklearn")

import checkpoint
import client
import numpy as np
import processes
from flower_grid import CalledGrid
from server import run_rounds
from training import Options

BUDGETS = [6, 20]
LIMIT_S = 300


def mentioning(folder: Path) -> list[str]:
    """Command lines, or environments, of living processes that name the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            said = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if f"FLWR_HOME={folder}".encode() in said:
            found.append(said.split(b"\0")[0].decode())
    return found


def test_two_rounds_in_processes_are_the_bits_of_one_process(tmp_path):
    options = Options(clients=2, rounds=2, epochs=1)
    path = tmp_path / "run.npz"
    said = processes.run(tmp_path / "logs", BUDGETS, {"rounds": 2, "epochs": 1, "checkpoint": path}, LIMIT_S)
    assert "round 1: " in said and "round 2: " in said
    weights, history = checkpoint.load(path, options)
    expected, rows = run_rounds(CalledGrid(client.app, BUDGETS), options)
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    assert [row["accuracy"] for row in history] == [row["accuracy"] for row in rows]
    assert [history[0]["updates"][k]["budget"] for k in ("0", "1")] == BUDGETS
    assert not mentioning(tmp_path / "logs")
    for log in ("flower-superlink", "supernode-0", "supernode-1"):
        assert "Traceback" not in (tmp_path / "logs" / f"{log}.log").read_text()


def test_a_run_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(TimeoutError, match=r"did not end within 12 s|nothing listens"):
        processes.run(tmp_path / "logs", BUDGETS, {"rounds": 1000, "checkpoint": tmp_path / "a.npz"}, limit_s=12)
    assert not mentioning(tmp_path / "logs")


def test_a_server_that_fails_is_told(tmp_path):
    config = {"weighting": "best", "checkpoint": tmp_path / "a.npz"}
    with pytest.raises(RuntimeError, match="weighting: expected one of"):
        processes.run(tmp_path / "logs", BUDGETS, config, LIMIT_S)
    assert not mentioning(tmp_path / "logs")


@pytest.mark.parametrize(
    ("value", "written"), [(True, "true"), (2, "2"), (0.5, "0.5"), ("data", "'data'"), (Path("/a"), "'/a'")]
)
def test_values_are_written_as_toml(value, written):
    assert processes.toml(value) == written
