"""Benchmarks that compare in pairs: the interval holds what it says, and a checkout equals itself."""

import json
import random
import statistics
from pathlib import Path

import pytest

import deqfast
from bench import ab, timing, torch_backend
from bench.report.torch import torch_checks, torch_section

TREE = Path(deqfast.__file__).parents[1]


def test_interval_of_forty_ratios_holds_the_true_median_as_often_as_it_says():
    draw = random.Random(0)
    held, coverage = 0, set()
    for _ in range(1000):
        found = timing.ratio([draw.lognormvariate(0.0, 0.3) for _ in range(40)], [1.0] * 40)
        assert found.low <= found.ratio <= found.high
        held += found.low <= 1.0 <= found.high
        coverage.add(found.coverage)
    (told,) = coverage
    assert 0.95 <= told < 0.97
    assert abs(held / 1000 - told) < 0.03


def test_too_few_ratios_give_all_of_them_and_say_how_little_that_holds():
    found = timing.ratio([1.0, 3.0], [1.0, 2.0])
    assert (found.low, found.ratio, found.high) == (1.0, 1.25, 1.5)
    assert found.coverage == pytest.approx(0.5)
    assert timing.ratio([3.0], [2.0]).coverage == 0.0


def test_ratios_are_of_the_same_turn():
    slowed = [1.0, 50.0, 1.0, 50.0, 1.0, 50.0]  # a machine that is slow now and then, for both
    found = timing.ratio([1.1 * t for t in slowed], slowed)
    assert found.low == pytest.approx(1.1) and found.high == pytest.approx(1.1)


def test_a_checkout_computes_the_bits_that_it_computes(tmp_path):
    if not (TREE / "csrc").is_dir():
        pytest.skip("deqfast does not lie in a checkout")
    out = tmp_path / "ab.json"
    ab.main([str(TREE), str(TREE), "--pairs", "2", "--turn", "0.001", "--cases", "one evaluation*", "--out", str(out)])
    record = json.loads(out.read_text())
    assert [row["case"].split(",")[1] for row in record["rows"]] == [" forward", " forward and implicit backward"]
    for row in record["rows"]:
        assert row["same_bits"] and row["pairs"] == 2
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert record["old"] == record["new"]


def test_ops_are_counted_without_views_and_without_those_of_f(tmp_path, monkeypatch):
    pytest.importorskip("torchdeq")
    monkeypatch.setattr(torch_backend, "QUICK_SIZES", ("1x64",))
    out = tmp_path / "torch.json"
    torch_backend.main(["--backend", "native", "--quick", "--out", str(out)])
    record = json.loads(out.read_text())
    own, default, rival = record["rows"]
    assert own["ops"] == default["ops"] == 0  # a step of the native backend is one call outside of torch
    assert rival["ops"] > 20 and rival["ratio"] == 1.0
    assert statistics.median([own["low"], own["ratio"], own["high"]]) == own["ratio"]
    assert len(torch_checks(record)) == 4
    assert "| 1x64 | torchdeq | 30 |" in torch_section(record)[-1]
