"""No GPU needed: what launches ask of a device fits it at every size, and the host waits as long as it should."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
SPIN = (200, 300)  # microseconds
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    program = tmp_path_factory.mktemp("limits") / "limits"
    folders = [f"-I{ROOT / 'csrc' / folder}" for folder in (".", "include", "cuda", "cuda/emulate")]
    source = Path(__file__).with_name("limits.cpp")
    assert COMPILER is not None
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-pthread", *folders, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_every_size_that_is_taken_can_be_launched(lines):
    assert [line[0] for line in lines] == [*["columns"] * 4, "chains", "tiny", "boundary", "waiting"]
    assert int(dict(line for line in lines if len(line) == 2)["chains"]) == 2 * 8192


def test_the_host_spins_by_the_clock(lines):
    spun = float(lines[-1][1])
    assert SPIN[0] <= spun  # on a crowded machine it may be away for longer
    text = (ROOT / "csrc" / "cuda" / "waiting.h").read_text()
    asked = int(text.partition("microseconds kSpin{")[2].partition("}")[0])
    assert SPIN[0] <= asked <= SPIN[1]
