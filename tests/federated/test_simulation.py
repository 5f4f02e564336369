"""Flower's simulation, in processes of Ray's: the same bits as in one process, and a server that is killed goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import telemetry_off  # noqa: F401  before Flower

pytest.importorskip("flwr", reason="flwr is not installed: make federated-test")
pytest.importorskip("ray", reason="ray is not installed: make federated-test")
pytest.importorskip("sklearn")

import checkpoint
import client
import data
import numpy as np
from flower_grid import CalledGrid
from model import MODELS
from server import run_rounds
from training import Options

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "federated"
OPTIONS = Options(clients=3, rounds=6, epochs=1, weighting="residual")
SCRIPT = """
import sys
from pathlib import Path
from server import run_rounds
from simulation import simulate
from training import Options
path, resume = Path(sys.argv[1]), sys.argv[2] == "resume"
options = Options(clients=3, rounds=6, epochs=1, weighting=sys.argv[3])
def tell(row):
    print(row["round"], flush=True)
simulate(lambda grid: run_rounds(grid, options, path, resume, tell), 3, cpus=1)
"""


def start(path: Path, how: str, weighting: str = "residual") -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(path), how, weighting]
    paths = [str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_server_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    path = tmp_path / "run.npz"
    killed = start(path, "anew")
    try:
        for line in killed.stdout:
            if line.strip() == "2":
                break
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.wait(timeout=30) == -signal.SIGKILL
    finally:
        end(killed)
    done = len(checkpoint.load(path, OPTIONS)[1])
    assert 2 <= done < OPTIONS.rounds
    resumed = start(path, "resume")
    try:
        said, errors = resumed.communicate(timeout=240)
    finally:
        end(resumed)
    assert resumed.returncode == 0, errors
    assert said.split() == [str(turn) for turn in range(done + 1, OPTIONS.rounds + 1)]
    weights, history = checkpoint.load(path, OPTIONS)
    # Not stopped, and in one process.
    expected, rows = run_rounds(CalledGrid(client.app, [data.budget(k) for k in range(3)]), OPTIONS)
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    keys = ("round", "accuracy", "weights", "left_out", "updates")
    assert [{k: row[k] for k in keys} for row in history] == [{k: row[k] for k in keys} for row in rows]


def test_what_the_server_raises_ends_the_simulation(tmp_path):
    begun = time.monotonic()
    failed = start(tmp_path / "run.npz", "anew", weighting="best")
    try:
        _, errors = failed.communicate(timeout=120)
    finally:
        end(failed)
    assert failed.returncode != 0 and "weighting: expected one of" in errors
    assert time.monotonic() - begun < 120


def test_the_comparison_runs_and_is_resumed(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--device", "cpu", "--cpus", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    found = []
    for extra in ([], ["--resume"]):
        line = [*command, *extra, "--out", str(tmp_path)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        assert "updates left out of a round: 0." in done.stdout and "residual" in done.stdout
        found.append(json.loads((tmp_path / "federated.json").read_text()))
    assert found[0]["rows"] == found[1]["rows"]  # of checkpoints, bit for bit
    assert {row["model"] for row in found[0]["rows"]} == set(MODELS)
    assert (tmp_path / "federated.png").read_bytes().startswith(b"\x89PNG")
