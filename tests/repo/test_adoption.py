"""The folder adoption/, as far as it needs no package but SciPy."""

import json

import pytest
import torch

from adoption import report
from adoption.problem_sets import REGISTRY
from adoption.rows import Record, Row


@pytest.mark.parametrize("name", [name for name, problem in REGISTRY.items() if problem.root is not None])
def test_a_known_root_is_one(name):
    problem = REGISTRY[name]
    torch.testing.assert_close(problem.F(problem.root), torch.zeros_like(problem.root), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", REGISTRY)
def test_rows_of_a_batch_are_systems_of_their_own(name):
    problem = REGISTRY[name]
    rows = torch.stack((problem.start, problem.start + 0.1, problem.start - 0.1))
    torch.testing.assert_close(problem.F(rows), torch.stack([problem.F(row) for row in rows]))


@pytest.mark.parametrize(
    ("evaluations", "ratio", "solved", "said"),
    [
        ((30, 10), (2.0, 1.5, 2.5), (True, True), "deqfast"),
        ((10, 30), (0.5, 0.4, 0.6), (True, True), "**own**"),
        ((10, 30), (2.0, 1.5, 2.5), (True, True), "evaluations **own**, time deqfast"),
        ((10, 10), (0.5, 0.4, 0.6), (True, True), "evaluations even, time **own**"),
        ((10, 10), None, (True, True), "even"),
        ((None, 10), (0.5, 0.4, 0.6), (True, True), "**own**"),
        ((None, 10), None, (True, True), "-"),
        ((30, 10), (2.0, 1.5, 2.5), (True, False), "**own**, deqfast's is not within"),
        ((30, 10), (2.0, 1.5, 2.5), (False, False), "neither is within"),
    ],
)
def test_the_table_says_who_is_ahead(evaluations, ratio, solved, said, tmp_path):
    record = Record()
    row = Row("some", "problem", "its own", evaluations, ratio, 1e-9, 1e-8, solved)
    record.add(row)
    record.skipped["test_other.py"] = "no such package"
    meta = {
        "command": "make adoption",
        "date": "2000-01-01",
        "device": "a processor",
        "capability": "none",
        "cores": 1,
        "threads": 1,
        "busy_elsewhere": 0.0,
        "versions": {"some": "1.0"},
    }
    (tmp_path / "found.json").write_text(json.dumps({"kind": "adoption", "meta": meta, **record.as_dict()}))
    report.write(tmp_path, tmp_path / "adoption.md")
    text = (tmp_path / "adoption.md").read_text()
    assert f"| {said} |" in text
    assert "| some 1.0 |" in text
    assert "no such package" in text
