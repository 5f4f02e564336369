"""What every test shares: seeds, hypothesis settings, poisoned memory, the device that tensors are made on."""

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from deqfast.ops import pool
from deqfast.ops.broyden import BroydenWorkspace
from deqfast.ops.native import extension, plan

# bench/ and examples/ are tested too. Last: a copy of the package that PYTHONPATH names comes first.
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

# No deadline: CI shares two cores. Derandomised: a red build is red again.
hypothesis.settings.register_profile("deqfast", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("deqfast")

# Processes side by side have a core each; what depends on the number of threads sets it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)

DEVICE = os.environ.get("DEQFAST_TEST_DEVICE")
if DEVICE:
    # Two matrix products of one run must agree bit for bit, and deterministic algorithms ask for it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_default_device(DEVICE)


def pytest_report_header() -> str:
    found = importlib.util.find_spec("deqfast._C")
    isa = os.environ.get("DEQFAST_CPU_ISA", "auto")
    where = f"{torch.get_num_threads()} threads" if DEVICE in (None, "cpu") else DEVICE
    return f"torch {torch.__version__}, {where}; deqfast._C: {found and found.origin} ({isa})"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=extension.EMULATED)
def forms_of_a_device(monkeypatch):
    """Emulated kernels are a GPU's, and take a GPU's form of a step for CPU tensors."""
    monkeypatch.setattr(BroydenWorkspace, "GRAM_MIN_N", BroydenWorkspace.DEVICE_GRAM_MIN_N)


@pytest.fixture(autouse=bool(os.environ.get("DEQFAST_TEST_LAG")))
def late_counts(monkeypatch):
    """Emulated kernels tell the host late, as a GPU does: what a loop must put up with shows without one."""
    monkeypatch.setattr(plan, "EMULATED_LAG", int(os.environ.get("DEQFAST_TEST_LAG", "0")))


@pytest.fixture(autouse=torch.cuda.is_available())
def device_still_answers(request):
    """What an error of a kernel leaves behind fails every later test of the process: it ends, and says at which."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        pytest.exit(f"after {request.node.nodeid} the device answers no more: {reason}", returncode=3)


@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin return NaN (or the largest integer), so that a read of unwritten memory shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    pool.clear()
    yield
    torch.use_deterministic_algorithms(False)
