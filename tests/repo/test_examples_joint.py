"""The joint examples run end to end in --quick mode, and write what the documentation is made from."""

import importlib.util
import json
import math
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
KEYS = {"name", "title", "date", "quick", "options", "machine", "versions", "header", "rows", "targets", "notes"}
EXAMPLES = ("generation", "inverse", "adversarial", "metalearning")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A quick run of an example on the package under test, and its JSON."""
    for package in ("matplotlib", "sklearn", "torchdeq"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    threads = torch.get_num_threads()

    def run(name: str) -> dict:
        script = ROOT / "examples" / f"joint_{name}.py"
        arguments = [str(script), "--quick", "--device", "cpu", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        with warnings.catch_warnings():
            runpy.run_path(str(script), run_name="__main__")
        assert "target" in capsys.readouterr().out
        return json.loads((tmp_path / f"joint_{name}.json").read_text())

    yield run
    torch.set_num_threads(threads)


def numbers(tree) -> list[float]:
    if isinstance(tree, dict):
        return [n for value in tree.values() for n in numbers(value)]
    if isinstance(tree, list):
        return [n for value in tree for n in numbers(value)]
    return [float(tree)] if isinstance(tree, (int, float)) else []


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_writes_a_table_and_a_picture(name, run, tmp_path):
    if name == "inverse":
        pytest.importorskip("skimage")
    record = run(name)
    assert record.keys() >= KEYS and record["quick"] and record["name"] == f"joint_{name}"
    assert record["rows"] and all(len(row) == len(record["header"]) for row in record["rows"])
    assert any("joint" in row[0] for row in record["rows"])
    assert all({"what", "target", "measured", "met"} == target.keys() for target in record["targets"])
    found = numbers(record["raw"])
    assert found and all(map(math.isfinite, found))
    picture = tmp_path / record["picture"]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert counts_are_of_both(record)


def counts_are_of_both(record: dict) -> bool:
    """Evaluations and products were counted for every method, the joint one included."""
    entries = record["raw"]
    if "methods" in entries[0]:
        entries = [method for task in entries for method in task["methods"].values()]
    totals = [(sum_of(entry["evaluations"]), sum_of(entry["vjps"])) for entry in entries]
    return all(evaluations > 0 and vjps > 0 for evaluations, vjps in totals)


def sum_of(value) -> float:
    return sum(value) if isinstance(value, list) else value


def test_documentation_is_filled_from_full_runs_only(tmp_path):
    spec = importlib.util.spec_from_file_location("make_joint", ROOT / "docs" / "make_joint.py")
    make_joint = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_joint)
    page = tmp_path / "joint.md"
    page.write_text((ROOT / "docs" / "joint.md").read_text())
    record = {
        "name": "joint_inverse",
        "title": "A title",
        "date": "2001-02-03",
        "quick": False,
        "options": {"epochs": "3", "seed": "0", "quick": "False", "device": "cpu", "threads": "1"},
        "machine": {"processor": "a processor", "device": "cpu", "threads": 1, "python": "3.11"},
        "versions": {"torch": "2", "torchdeq": None},
        "seconds": 12.3,
        "header": ["", "wall"],
        "rows": [["joint", "1.0x"]],
        "targets": [{"what": "time", "target": "3x", "measured": "2x", "met": False}],
        "notes": ["a note"],
        "picture": None,
    }
    path = tmp_path / "joint_inverse.json"
    arguments = ["--results", str(tmp_path), "--page", str(page)]
    path.write_text(json.dumps(record))
    make_joint.main(arguments)
    text = page.read_text()
    assert "| joint | 1.0x |" in text and "| time | 3x | 2x | **missed** |" in text
    assert "`python examples/joint_inverse.py --epochs 3 --seed 0` on a processor (1 torch thread), 2001-02-03" in text
    path.write_text(json.dumps({**record, "quick": True}))
    with pytest.raises(SystemExit, match="nothing measured"):
        make_joint.main(arguments)
    assert page.read_text() == text
