"""examples/cluster: the training script on two processes, and what its other files name is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

tomllib: Any = None
if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "examples" / "cluster"


def torchrun(folder, *arguments, processes=2):
    pytest.importorskip("sklearn")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    env["PYTHONPATH"] = str(ROOT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launch, "--max-restarts", "3", str(CLUSTER / "train.py"), "--checkpoint", str(folder), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def epochs(out):
    return [(int(n), float(right)) for n, right in re.findall(r"^epoch (\d+): ([\d.]+) % right", out, re.MULTILINE)]


def test_a_job_goes_on_where_a_process_died_and_where_one_ended(tmp_path):
    broken = torchrun(tmp_path / "a", "--epochs", "3", "--die-on", "1", "--die-after", "2")
    assert "going on after epoch 2" in broken
    found = dict(epochs(broken))
    assert 3 in found and (tmp_path / "a" / "epoch-0003" / ".metadata").exists()
    later = torchrun(tmp_path / "a", "--epochs", "4", processes=1)  # another number of processes
    assert "going on after epoch 3" in later and [n for n, _ in epochs(later)] == [4]
    assert epochs(later)[0][1] > 80


@pytest.fixture(autouse=True)
def _folder(tmp_path):
    (tmp_path / "a").mkdir()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_batch_script_parses_and_names_what_is_there():
    script = CLUSTER / "job.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    (program,) = re.findall(r'"\$WORK/(\S+\.py)"', text)
    assert (ROOT / program).exists()
    options = (ROOT / program).read_text()
    asked = re.search(r"train\.py\" (.*)$", text, re.MULTILINE)
    assert asked is not None
    for option in re.findall(r"--[a-z-]+", asked.group(1)):
        assert f'"{option}"' in options


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_batch_script_launches_what_it_says(tmp_path):
    """With stand-ins for SLURM's commands that say how they were called."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "scontrol").write_text("#!/bin/sh\necho node1\necho node2\n")
    (bin_ / "srun").write_text('#!/bin/sh\necho "$@"\n')
    for tool in bin_.iterdir():
        tool.chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": "/w", "SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NAME": "j"}
    slurm |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "17"}
    env = {**os.environ, **slurm, "PATH": f"{bin_}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(CLUSTER / "job.sbatch")], env=env, capture_output=True, text=True, check=True)
    said = done.stdout
    for part in ("--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node1:29400", "--checkpoint /w/out/cluster-j"):
        assert part in said


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_image_copies_and_installs_what_is_there():
    text = (CLUSTER / "Dockerfile").read_text()
    for copied in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert (ROOT / copied).exists()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = re.findall(r'"/src\[(\w+)\]"', text)
    assert asked in extras
    assert "TORCH ?= " + re.findall(r"^ARG TORCH=(\S+)$", text, re.MULTILINE)[0] in (ROOT / "Makefile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE)
    assert set(re.findall(r"--from=(\w+)", text)) <= set(stages)


def test_the_page_names_every_variable_that_is_read_at_run_time():
    read = set()
    for path in [*(ROOT / "deqfast").rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]:
        text = path.read_text()
        read |= set(re.findall(r'(?:environ(?:\.get\(|\[)|getenv\()\s*"(DEQFAST_\w+)"', text))
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert {"DEQFAST_BACKEND", "DEQFAST_POOL_MB"} <= read
    assert all(f"`{name}`" in page for name in read)
