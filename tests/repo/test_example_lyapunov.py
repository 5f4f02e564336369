"""The example of stable dynamics: what its table says of V and of the orthogonal layer; accuracy is not asserted."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "lyapunov.py"


def test_it_writes_its_table_and_a_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    options = ["--epochs", "2", "--seeds", "1", "--numbers", "8", "--keep", "200", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    plain, projected = json.loads((tmp_path / "lyapunov.json").read_text())["rows"]
    assert plain["name"] in printed and projected["name"] in printed
    assert projected["excess"] <= 1e-6 < plain["excess"]
    assert projected["falling"] > 0.95 and plain["falling"] < 0.9
    assert max(plain["orthogonality"], projected["orthogonality"]) < 1e-5
    assert all(min(row["attacked"].values()) <= row["accuracy"] for row in (plain, projected))
    assert (tmp_path / "lyapunov.png").read_bytes().startswith(b"\x89PNG")
