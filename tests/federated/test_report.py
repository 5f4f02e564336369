"""What run.py says of what it measured: differences by seed, targets missed as well as met, a picture, a page."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import figure
import frame
import fusion
import run

ROOT = Path(__file__).parents[2]
FINALS = {"equilibrium": (0.95, 0.93), "explicit": (0.94, 0.95), "shallow": (0.9, 0.9)}


def records(finals, size=1000):
    """Two seeds of every variant, three rounds each."""
    found = []
    for model, weighting in run.VARIANTS:
        sent = size * (5 if model == "explicit" else 1)
        for seed, last in enumerate(finals[model]):
            row = {"bytes_up": sent, "bytes_down": sent, "left_out": {}, "weights": {"0": 0.25, "1": 0.75}}
            history = [{"round": k + 1, "accuracy": a, **row} for k, a in enumerate((0.5, last - 0.04, last))]
            found.append({"model": model, "weighting": weighting, "seed": seed, "history": history})
    return found


def timed(ratio):
    names = [
        ("deqfast", 1.0),
        ("deqfast at a tenth of the tolerance", 0.5),
        ("torchdeq Broyden", 2 * ratio),
        ("torchdeq plain iteration", ratio),
    ]
    return [
        {"name": name, "budget": budget, "seconds": 0.01 * r, "ratio": r, "ratios": [r, r], "residual": 1e-4}
        for budget in (8, 40)
        for name, r in names
    ]


def test_differences_are_by_seed_and_every_weighting_has_a_row():
    rows = run.summaries(records(FINALS))
    assert [(row["model"], row["weighting"]) for row in rows] == run.VARIANTS
    assert {row["weighting"] for row in rows if row["model"] == "equilibrium"} == set(fusion.WEIGHTINGS)
    explicit = rows[-2]
    assert explicit["difference"] == pytest.approx([-1.0, 2.0]) and explicit["bytes"] == 10_000
    assert rows[0]["rounds_to_90"] == [2, 3] and rows[0]["bytes"] == 2000
    header, cells = run.fused_table(rows)
    assert all(len(row) == len(header) for row in cells)
    assert cells[-2][4:7] == ["5.00x", "94.5 (94.0 to 95.0)", "+0.5 (-1.0 to +2.0)"]


def test_targets_are_met_and_missed():
    met = run.targets(run.summaries(records(FINALS)), timed(1.5))
    assert [t["met"] for t in met] == [True] * 4
    assert met[2]["what"].endswith("fastest torchdeq (torchdeq plain iteration) over deqfast")
    worse = {**FINALS, "equilibrium": (0.9, 0.9), "explicit": (0.95, 0.92)}
    missed = run.targets(run.summaries(records(worse)), timed(0.9))
    assert [t["met"] for t in missed] == [True, False, False, False]
    assert missed[1]["measured"] == "-3.5 points"


def test_which_weighting_is_best_is_counted():
    found = records(FINALS)
    for record in found:
        if record["weighting"] == "budget":
            record["history"][-1]["accuracy"] += -0.01 if record["seed"] else -0.02
    first = run.remarks(run.summaries(found))[0]
    assert "data 2, budget 0, equal 2, residual 2, score 2" in first
    assert first.endswith("better or worse than data at every seed: budget.")


def test_a_picture_is_drawn(tmp_path):
    rows = run.summaries(records(FINALS))
    path = tmp_path / "federated.png"
    assert frame.paint(lambda p: figure.draw(p, rows, timed(2.0), [[9] * 10, [20] * 10], [4, 40]), path, 22)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 50_000


def test_a_bar_moves_a_step_a_round_also_where_a_run_is_resumed():
    steps = iter(range(100))
    count = run.Counter(steps, 5)
    count({})
    count.rest()
    assert next(steps) == 4  # the first of five was made before


def test_without_flower_it_says_how_to_get_it(tmp_path):
    script = Path(run.__file__)
    code = f"import runpy, sys\nsys.modules['flwr'] = None\nsys.path.insert(0, {str(script.parent)!r})\n"
    code += f"sys.argv = ['run.py', '--quick', '--out', sys.argv[1]]\nrunpy.run_path({str(script)!r}, None, '__main__')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "is not installed: make federated" in done.stderr, done.stderr


@pytest.mark.parametrize("option", ["--seeds", "--rounds", "--clients", "--turns", "--cpus"])
def test_options_that_make_no_sense_are_refused(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", option, "0"])
    with pytest.raises(SystemExit):
        run.parse_args()
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_page_is_filled_from_full_runs_only(tmp_path):
    spec = importlib.util.spec_from_file_location("make_federated", ROOT / "docs" / "make_federated.py")
    make_federated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_federated)
    page = tmp_path / "federated.md"
    page.write_text((ROOT / "docs" / "federated.md").read_text())
    record = {
        "title": "A title",
        "date": "2001-02-03",
        "quick": False,
        "options": {"seeds": "3", "rounds": "20", "quick": "False", "device": "cpu"},
        "machine": {"processor": "a processor", "device": "cpu", "threads": 1, "python": "3.11"},
        "versions": {"torch": "2", "ray": None},
        "seconds": 12.3,
        "tables": {
            "fused": {"header": ["", "bytes"], "rows": [["equilibrium", "1"]]},
            "timed": {"header": ["", "ms"], "rows": [["deqfast", "2"]]},
        },
        "targets": [{"what": "bytes", "target": "4x", "measured": "3x", "met": False}],
        "notes": ["a note"],
        "picture": None,
    }
    path = tmp_path / "federated.json"
    arguments = ["--results", str(path), "--page", str(page)]
    path.write_text(json.dumps(record))
    make_federated.main(arguments)
    text = page.read_text()
    assert "| equilibrium | 1 |" in text and "| deqfast | 2 |" in text and "| bytes | 4x | 3x | **missed** |" in text
    assert "`python examples/federated/run.py --seeds 3 --rounds 20` on a processor (1 torch thread), 2001" in text
    path.write_text(json.dumps({**record, "quick": True}))
    with pytest.raises(SystemExit, match="nothing measured"):
        make_federated.main(arguments)
    assert page.read_text() == text
