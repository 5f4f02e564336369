"""Benchmarks run only when asked for: `make bench`, or `pytest bench --benchmark-only`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench import meta
from bench.equal import Comparison, compare

HERE = Path(__file__).parent
_BYSTANDERS = meta.Bystanders()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deqfast benchmarks")
    group.addoption("--quick", action="store_true", help="three sizes, few rounds: a trial, not a measurement")
    group.addoption("--jaxopt-python", default=None, help="interpreter that has jaxopt (or set DEQFAST_BENCH_JAX)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("benchmark_only", default=False)
    # rivals warn as they like: the package's own rule that a warning is an error is not for them
    marker = pytest.mark.filterwarnings("ignore") if asked else pytest.mark.skip(reason="runs with --benchmark-only")
    for item in items:
        if HERE in Path(item.path).parents and "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(marker)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Keep what a figure needs and drop what names a host."""
    quick = " --quick" if config.getoption("--quick", default=False) else ""
    machine_info.clear()
    machine_info.update(
        meta.describe(f"python -m pytest bench --benchmark-only{quick}", _BYSTANDERS), quick=bool(quick)
    )


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for key in ("project", "branch", "author_time"):
        commit_info.pop(key, None)


@cache
def _compared(size: str, method: str, quick: bool, jax_python: str | None) -> Comparison:
    rounds, budget = (3, 3.0) if quick else (15, 15.0)
    return compare(size, method, rounds=rounds, budget=budget, jax_python=jax_python)


@pytest.fixture
def equal_evaluations(request: pytest.FixtureRequest) -> Any:
    """A function (size, method) -> Comparison, measured once a session for all rows of that size."""
    config = request.config
    quick, python = config.getoption("--quick", default=False), config.getoption("--jaxopt-python", default=None)

    def get(size: str, method: str) -> Comparison:
        from bench.free import QUICK_SIZES

        if quick and size not in QUICK_SIZES:
            pytest.skip("not in the quick subset")
        return _compared(size, method, quick, python)

    return get
