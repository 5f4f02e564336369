"""The gate names what became slower by more than the spread, and nothing else."""

from __future__ import annotations

import copy
import json

import pytest

from bench import gate
from bench.report.newest import newest

SEGMENTS = {
    "kind": "segments",
    "meta": {"date": "2026-01-01 00:00 UTC"},
    "rows": [
        {
            "case": "equal", "backend": "native", "row": "segments=",
            "held": {"what": "over a batch", "value": 1.0, "low": 0.9, "high": 1.1, "at_most": True},
        },
        {"case": "equal", "backend": "native", "row": "a batch"},
    ],
}  # fmt: skip
TRAINING = {
    "kind": "training",
    "meta": {"date": "2026-01-01 00:00 UTC"},
    "rows": [
        {
            "net": "MLP", "row": "deqfast",
            "held": [{"what": "rival / row", "value": 4.0, "low": 3.5, "high": 4.5, "at_most": False}],
        }
    ],
}  # fmt: skip


def moved(record, **numbers):
    later = copy.deepcopy(record)
    later["meta"]["date"] = "2026-01-02 00:00 UTC"
    held = later["rows"][0]["held"]
    (held if isinstance(held, dict) else held[0]).update(numbers)
    return later


@pytest.fixture
def told(tmp_path, capsys):
    def run(before, after):
        for name, records in (("before", before), ("after", after)):
            (tmp_path / name).mkdir()
            for i, record in enumerate(records):
                (tmp_path / name / f"{i}.json").write_text(json.dumps(record))
        status = gate.main(["--before", str(tmp_path / "before"), "--after", str(tmp_path / "after")])
        return status, capsys.readouterr().out

    return run


def test_a_ratio_beyond_both_spreads_is_named(told):
    status, out = told([SEGMENTS], [moved(SEGMENTS, value=1.3, low=1.2, high=1.4)])
    assert status == 1
    assert "slower: segments, equal, native, segments=: over a batch: 1.00 (0.900 to 1.10) -> 1.30" in out


def test_within_the_spread_nothing_is_said(told):
    status, out = told([SEGMENTS], [moved(SEGMENTS, value=1.15, low=1.05, high=1.3)])
    assert status == 0 and "1 figures compared, 0 became slower" in out


@pytest.mark.parametrize(("value", "low", "high", "status"), [(3.0, 2.8, 3.2, 1), (6.0, 5.5, 6.5, 0)])
def test_of_a_ratio_that_should_be_large_the_fall_counts(told, value, low, high, status):
    assert told([TRAINING], [moved(TRAINING, value=value, low=low, high=high)])[0] == status


def test_nothing_new_is_no_success(told):
    status, out = told([SEGMENTS], [SEGMENTS])
    assert status == 2 and "not compared: segments: no new results" in out


def test_the_committed_results_have_figures():
    found = {kind: newest(gate.ROOT / "bench" / "results", kind) for kind in gate.KINDS}
    names = [figure.name for kind, record in found.items() if record for figure in gate.figures(kind, record)]
    assert len(names) == len(set(names)) > 50
    assert all(f.low <= f.value <= f.high for kind, r in found.items() if r for f in gate.figures(kind, r))
