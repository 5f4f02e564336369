"""Results of the convergence suite are told apart, count by count."""

from __future__ import annotations

import copy
import json

import pytest

from bench import counts

RECORD = {
    "kind": "convergence",
    "cap": 300,
    "problems": {"linear/1": {"tolerances": [1e-3, 1e-5]}, "mlp/1": {"tolerances": [1e-3]}},
    "counts": {
        "a": {
            "linear/1": {"evaluations": [[5, 6], [9, 0]], "error": None},
            "mlp/1": {"evaluations": [[3, 3, 4]], "error": None},
        },
        "b": {
            "linear/1": {"evaluations": [[7, 7], [8, 8]], "error": None},
            "mlp/1": {"evaluations": [[2, 2, 2]], "error": None},
        },
    },
}


def changed(**rows):
    record = copy.deepcopy(RECORD)
    for method, counts_of in rows.items():
        record["counts"][method].update(counts_of)
    return record


def test_the_same_counts_are_the_same():
    found = counts.compare(RECORD, copy.deepcopy(RECORD))
    assert found.same and found.compared == 14
    assert counts.told(found) == "14 counts compared, 0 rows differ"


def test_each_problem_whose_evaluations_or_failures_changed_is_named():
    after = changed(a={"linear/1": {"evaluations": [[5, 6], [10, 12]], "error": None}})
    found = counts.compare(RECORD, after)
    assert not found.same
    assert [str(change) for change in found.changes] == [
        "a, linear/1, 1e-05: 2 samples, 9 -> 22 evaluations, 1 -> 0 failed"
    ]
    (moved,) = counts.compare(RECORD, changed(b={"mlp/1": {"evaluations": [[2, 1, 3]], "error": None}})).changes
    assert str(moved) == "b, mlp/1, 0.001: 2 samples, 6 -> 6 evaluations"  # whose sum says nothing


def test_what_cannot_be_compared_is_said():
    fewer = copy.deepcopy(RECORD)
    del fewer["counts"]["a"]["mlp/1"], fewer["counts"]["b"]
    found = counts.compare(RECORD, fewer)
    assert found.incomparable == ["a, mlp/1: only before"] and not found.same and found.compared == 4
    raised = changed(a={"mlp/1": {"evaluations": [[0, 0]], "error": "LinAlgError: singular"}})
    found = counts.compare(RECORD, {**raised, "cap": 100})
    assert found.incomparable == [
        "the limit of evaluations was 300, now it is 100",
        "a, mlp/1: raised None, now LinAlgError: singular",
        "a, mlp/1: other tolerances or samples",
    ]
    assert not counts.compare(RECORD, {**RECORD, "counts": {}}).same
    with pytest.raises(ValueError, match=r"before must be a result of bench.convergence, got kind 'speed'"):
        counts.compare({"kind": "speed"}, RECORD)


def test_the_script_ends_with_one_where_something_changed(tmp_path, capsys):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(RECORD))
    after.write_text(json.dumps(changed(b={"mlp/1": {"evaluations": [[2, 2, 0]], "error": None}})))
    assert counts.main([str(before), str(before)]) == 0
    assert counts.main([str(before), str(after)]) == 1
    assert "b, mlp/1, 0.001: 1 samples, 6 -> 4 evaluations, 0 -> 1 failed" in capsys.readouterr().out


def test_a_run_is_held_against_an_earlier_one(tmp_path, capsys):
    pytest.importorskip("torchdeq")
    pytest.importorskip("matplotlib")
    from bench import convergence

    first, second = tmp_path / "first.json", tmp_path / "second.json"
    wanted = ["--problems", "linear/non-normal .9", "--methods", "deqfast A*", "--no-time", "--img", str(tmp_path)]
    assert convergence.main([*wanted, "--out", str(first)]) == 0
    record = json.loads(first.read_text())
    assert list(record["counts"]) == ["deqfast Anderson()"]
    assert convergence.main([*wanted, "--out", str(second), "--against", str(first)]) == 0
    record["counts"]["deqfast Anderson()"]["linear/non-normal .9"]["evaluations"][0][0] += 1
    first.write_text(json.dumps(record))
    assert convergence.main([*wanted, "--out", str(second), "--against", str(first)]) == 1
    assert "deqfast Anderson(), linear/non-normal .9, 0.001: 1 samples" in capsys.readouterr().out
