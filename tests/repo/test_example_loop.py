"""The example of a model that loops: the three changed lines give the same bits, and what follows saves evaluations."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "loop_model.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT), run_name="loop_model")


def test_it_writes_its_tables_and_a_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--quick", "--out", str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "loop_model.json").read_text())
    hand, same, plain, fast, halted, decided = record["rows"]
    assert all(row["name"] in printed for row in record["rows"])
    assert same["difference"] == 0 and same["evaluations"] == hand["evaluations"] == plain["evaluations"]
    assert fast["evaluations"] < hand["evaluations"] and fast["difference"] < 0.05
    assert halted["evaluations"] == fast["evaluations"] and halted["passes"] < 0.8 * fast["passes"]
    assert decided["passes"] < halted["passes"]
    zero, cache = record["epochs"]["from zero"], record["epochs"]["from the cache"]
    assert cache[0] == zero[0] and cache[-1] < zero[-1] - 1
    assert (tmp_path / "loop_model.png").read_bytes().startswith(b"\x89PNG")


def test_batch_that_shrinks_finds_what_the_whole_one_does(example):
    model = example["Model"]()
    symbols, _ = example["draw"](24, torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = model.embed(symbols)
        found, seen = example["shrinking"](model.block, x, 1e-5)
        hand = example["by_hand"](model.block, x, 200)
        same = example["by_deqfast"](model.block, x, 200)
    assert torch.equal(hand, same)
    assert seen[0] == 24 and seen == sorted(seen, reverse=True) and seen[-1] < 24
    assert float((found - hand).norm() / hand.norm()) < 1e-3
