"""What every test shares: seeds, hypothesis settings, poisoned memory."""

import importlib.util
import os

import hypothesis
import pytest
import torch

from deqfast.ops import pool

# No deadline: CI shares two cores. Derandomised: a red build is red again.
hypothesis.settings.register_profile("deqfast", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("deqfast")


def pytest_report_header() -> str:
    native = importlib.util.find_spec("deqfast._C")
    isa = os.environ.get("DEQFAST_CPU_ISA", "auto")
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; deqfast._C: {native and native.origin} ({isa})"
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin return NaN (or the largest integer), so that a read of unwritten memory shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    pool.clear()
    yield
    torch.use_deterministic_algorithms(False)
