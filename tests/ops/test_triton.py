"""The Triton kernels in Triton's interpreter, in a process of its own: its variable is read when they are loaded."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deqfast import ops
from deqfast.ops.lag import LAG, SLOTS, Lag

INSTALLED = importlib.util.find_spec("triton") is not None


@pytest.mark.triton
@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("what", ["conformance", "conformance_joint"])
def test_interpreted_kernels_conform(what):
    file = Path(__file__).with_name(f"triton_{what}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_kernels_import_nothing_of_the_package():
    """It loads them."""
    files = Path(__file__).parents[2].glob("kernels/*.py")
    assert [file.name for file in files if re.search(r"^\s*(import|from) deqfast", file.read_text(), re.M)] == []


def python(code: str, **environment: str) -> str:
    return subprocess.check_output(
        [sys.executable, "-c", code], text=True, env={**os.environ, "TRITON_INTERPRET": "0", **environment}
    ).strip()


def test_neither_import_nor_solve_loads_triton():
    code = (
        "import sys, torch, deqfast as dq; dq.fixed_point(lambda z: z / 2, torch.ones(2, 3)); "
        "print('triton' in sys.modules, 'deqfast.kernels' in sys.modules)"
    )
    assert python(code) == "False False"


def test_without_triton_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ops.why_not("triton", torch.device("cpu")) == "triton is not installed"
    with pytest.raises(ValueError, match="backend='triton' cannot serve device cpu: triton is not installed"):
        ops.choose("triton", torch.device("cpu"))


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
def test_on_a_cpu_the_reason_names_the_interpreter():
    code = "import torch; from deqfast import ops; print(ops.why_not('triton', torch.device('cpu')))"
    assert "TRITON_INTERPRET=1" in python(code)
    assert python(code, TRITON_INTERPRET="1") == "None"


class Event:
    """Of a GPU that is always done."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def lag_of_a_device(limit: int = 0, evaluations: int = 0) -> Lag:
    lag = Lag(9, torch.device("cpu"), limit, evaluations)
    lag._event, lag._seen = Event, torch.empty(SLOTS, dtype=torch.int32)
    lag._noted_by = [Event() for _ in range(SLOTS)]
    return lag


def number(count: int) -> torch.Tensor:
    return torch.tensor([count], dtype=torch.int32)


def test_host_reads_the_count_of_two_steps_ago():
    assert Lag(9, torch.device("cpu"), 0, 0).read(number(4)) == 4
    lag = lag_of_a_device()
    counts = list(range(20, 0, -1))
    assert [lag.read(number(count)) for count in counts] == [9] * LAG + counts[:-LAG]
    lag.rewind(0)
    assert [lag.read(number(count)) for count in counts] == [9] * LAG + counts[:-LAG]


def test_after_the_last_evaluation_nothing_runs():
    lag = lag_of_a_device(limit=5)
    assert [lag.read(number(7)) for _ in range(5)] == [9, 9, 7, 7, 0]
    assert lag_of_a_device(limit=5, evaluations=4).read(number(7)) == 0


def test_report_reads_the_count_of_any_number_of_reports_ago():
    lag = lag_of_a_device()
    assert [lag.report(number(count), 1) for count in (5, 4, 3)] == [9, 5, 4]
    assert lag.report(number(2), 0) == 2


def test_other_devices_are_refused(monkeypatch):
    if not INSTALLED:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "device type 'xpu'" in str(ops.why_not("triton", torch.device("xpu")))
