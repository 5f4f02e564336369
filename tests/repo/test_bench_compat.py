"""The benchmark behind other libraries' names: every row is told, and what was asked of one is marked as met or not."""

import json
import re
import warnings

import pytest
import torch

from bench import compat, targets
from bench.report.compat import compat_checks, compat_section


def test_quick_run_is_reported(tmp_path, capsys):
    pytest.importorskip("torchdeq")
    pytest.importorskip("scipy")
    out, threads, filters = tmp_path / "compat.json", torch.get_num_threads(), list(warnings.filters)
    compat.main(["--quick", "--parts", "sines", "batch", "graph", "--out", str(out)])
    assert torch.get_num_threads() == threads and warnings.filters == filters
    record = json.loads(out.read_text())
    assert record["meta"]["threads"] == 1
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(record["rows"]) == 14
    asked = [row["held"] for row in record["rows"] if "held" in row]
    assert [held["asked"] for held in asked] == [*targets.COMPAT_INR.values(), *2 * [targets.COMPAT_SEGMENTS]]
    for held in asked:
        assert held["met"] == ((held["value"] <= held["asked"]) if held["at_most"] else held["value"] >= held["asked"])
    checks = compat_checks(record)
    assert len(checks) == len(asked)
    assert ["**missed**" not in measured for _, measured in checks] == [held["met"] for held in asked]
    assert sum("MISSED" in line for line in told) == sum(not held["met"] for held in asked)
    text = "\n".join(compat_section(record))
    assert len(re.findall(r"^\| ", text, re.MULTILINE)) == 14 + 3
    for row in record["rows"]:
        if row["part"] == "sines":
            assert row["residual"] < 2e-4 and row["gradient_error"] < 1e-2


def test_the_graph_is_what_it_says():
    for orthogonal in (False, True):
        A, W, _ = compat.graph(0, orthogonal)
        assert torch.equal(A, A.T)
        torch.testing.assert_close(A.sum(1), torch.ones(compat.NODES))
        torch.testing.assert_close(torch.linalg.matrix_norm(W, 2), torch.tensor(0.95))
        assert A[:50, 50:].abs().max() == 0
