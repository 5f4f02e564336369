"""The example of stable dynamics: what its table says of V and of the orthogonal layer; accuracy is not asserted."""

import importlib.util
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
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "lyapunov.json").read_text())
    rows = record["rows"]
    assert [(row["training"], row["projected"]) for row in rows] == [
        (training, projected) for training in ("clean", "adversarial") for projected in (False, True)
    ]
    for plain, projected in (rows[:2], rows[2:]):
        assert max(projected["along"], projected["random"]) <= 1e-6 < min(plain["along"], plain["random"])
        assert projected["falling"] > 0.95 and plain["falling"] < 0.9
        assert max(plain["orthogonality"], projected["orthogonality"]) < 1e-5
        for row in (plain, projected):
            assert row["worst"] <= min(*row["attacked"], row["transferred"]) <= row["accuracy"]
    for table in record["tables"].values():
        assert all(len(cells) == len(table["header"]) and cells[0] in printed for cells in table["rows"])
    assert [met["met"] for met in record["targets"][:2]] == [True, True]
    assert all(met["what"] in printed for met in record["targets"])
    assert record["quick"]  # of 200 digits: no page is filled from it
    assert (tmp_path / "lyapunov.png").read_bytes().startswith(b"\x89PNG")
    make, page = script("make_lyapunov"), tmp_path / "lyapunov.md"
    page.write_text("# T\n<!-- lyapunov:begin -->\nold\n<!-- lyapunov:end -->\n")
    arguments = ["--results", str(tmp_path / "lyapunov.json"), "--page", str(page)]
    with pytest.raises(SystemExit, match="nothing measured"):
        make.main(arguments)
    (tmp_path / "lyapunov.json").write_text(json.dumps({**record, "quick": False}))
    make.main(arguments)
    assert "`python examples/lyapunov.py --epochs 2 --seeds 1 --numbers 8` on" in page.read_text()
    assert "old" not in page.read_text()


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPT.parents[1] / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
