"""One record a run, written to the file that --adoption-out names; a package that is not there is skipped, by name."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from adoption.rows import Record
from bench import meta

HERE = Path(__file__).parent
PACKAGES = ("deepinv", "dxtb", "pyscf", "silva-networks", "torch-sla", "torch_geometric")
_RECORD = Record()
_BYSTANDERS = meta.Bystanders()


def pytest_addoption(parser: pytest.Parser) -> None:
    # With a =, or pytest takes a file that exists for one to look for tests beside.
    parser.addoption("--adoption-out", default=None, help="JSON file of what was found")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(item.path).parents:  # other packages warn as they like
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def record() -> Record:
    return _RECORD


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and hasattr(report, "wasxfail"):
        _RECORD.skipped[report.nodeid.split("/")[-1]] = f"fails, as expected: {report.wasxfail}"
    elif report.skipped and isinstance(report.longrepr, tuple):
        _RECORD.skipped[report.nodeid.split("/")[-1]] = report.longrepr[2].removeprefix("Skipped: ")


def pytest_sessionfinish(session: pytest.Session) -> None:
    out = session.config.getoption("--adoption-out")
    if out is None or not (_RECORD.rows or _RECORD.solves):
        return
    described = meta.describe("make adoption", _BYSTANDERS)
    versions = described["versions"]
    assert isinstance(versions, dict)
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found = {"kind": "adoption", "meta": described, **_RECORD.as_dict()}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(found, indent=1) + "\n")
