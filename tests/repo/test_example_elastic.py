"""The example of an elastic solve: a rank is killed, torchrun starts all anew, the solve goes on from its save."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deqfast.ops.native import extension as native

pytestmark = [
    pytest.mark.skipif(native._C is None or native.EMULATED, reason="it is of the host's kernels, in the extension"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.host,
]

ROOT = Path(__file__).parents[2]


def run(folder, processes, *more):
    """What the example tells, and what torchrun says of the processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command += ["--nproc-per-node", str(processes), str(ROOT / "examples" / "elastic_solve.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    settings = ["--folder", str(folder), "--every", "20", *more]
    done = subprocess.run([*command, *settings], env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, done.stdout
    return json.loads(lines[0]), done.stderr


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_a_killed_rank_costs_what_came_after_the_last_checkpoint_and_nothing_else(tmp_path, solver):
    through, _ = run(tmp_path / "through", 2, "--solver", solver)
    assert through["converged"] and through["began at evaluation"] == 0 and through["evaluations"] > 60
    killed, said = run(tmp_path / "killed", 2, "--solver", solver, "--kill-at", "50")
    assert re.search(r"Signal 9 \(SIGKILL\)|exitcode: -9", said), said[-3000:]
    assert killed["began at evaluation"] == 40  # of 50: those since the last checkpoint
    assert killed["evaluations"] == through["evaluations"] and killed["converged"]
    one, other = (torch.load(tmp_path / name / "answer.pt", weights_only=True) for name in ("through", "killed"))
    assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_another_number_of_processes_takes_it_up(tmp_path):
    first, _ = run(tmp_path, 2, "--max-iter", "40")
    assert not first["converged"] and first["evaluations"] == 40
    then, _ = run(tmp_path, 3, "--max-iter", "2000")
    assert then["began at evaluation"] == 40 and then["converged"] and then["processes"] == 3
    alone, _ = run(tmp_path / "alone", 1)
    assert abs(then["u at the middle"] - alone["u at the middle"]) <= 1e-8
