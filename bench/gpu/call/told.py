"""A pytest plugin, `-p bench.gpu.call.told`: a line a test for the runner of a call, without those that have ended.

The runner kills a test that hangs and starts pytest again with ``--done``; ``--shard I/N`` takes every N-th test from
the I-th on, so that several processes share a file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.call.items import tell
from bench.gpu.call.process import STICKY, die_with_parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--done", type=Path, default=None, help="a file with the names of tests that have ended")
    parser.addoption("--shard", default="0/1", help="I/N: every N-th test from the I-th on")


def pytest_configure(config: pytest.Config) -> None:
    die_with_parent()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    given: Path | None = config.getoption("--done")
    done = set(given.read_text().splitlines()) if given else set()
    index, count = (int(part) for part in str(config.getoption("--shard")).split("/"))
    mine = {item.nodeid for item in items[index::count]} - done
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in mine])
    items[:] = [item for item in items if item.nodeid in mine]


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    tell(begin=nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    failed = report.failed
    # A test is told of once: where it failed or was skipped, or at the end of its call.
    if not failed and not (report.when == "call" or (report.when == "setup" and report.skipped)):
        return
    why = str(report.longrepr)[-1500:] if failed or report.skipped else ""
    lost = failed and "CUDA error" in why
    tell(name=report.nodeid, ended="failed" if failed else report.outcome.replace("passed", "ok"), why=why, lost=lost)
    if lost:  # every later test of this process would fail too
        os._exit(STICKY)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK
