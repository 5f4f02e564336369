"""The model of what processes cost, and the page that it fills."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest

from bench import scaling_model as model

ROOT = Path(__file__).parents[2]
SIZES = (1, 2, 4)
META = {
    "date": "2026-01-01",
    "command": "python -m bench.scaling",
    "device": "a CPU",
    "capability": "AVX2",
    "cores": 2,
    "threads": 1,
    "versions": {"torch": "2"},
}


def page_maker():
    spec = importlib.util.spec_from_file_location("make_scaling", ROOT / "docs" / "make_scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(quick=False):
    """A machine of 8 GB/s a process, 100 us an all-reduce, 1 GB/s on the wire."""
    rows = []
    for size in SIZES:
        us = {"stream": 1e6 * 8 * model.STREAM / 8e9, "all-reduce": 100.0}
        us["all-reduce, large"] = 100.0 + 1e6 * 8 * model.LARGE / 1e9
        us |= {"strong": 5e4, "weak": 6e4, "consensus": 7e4, "together": 6.9e4}
        rows += [{"processes": size, "row": n, "us": t, "us_low": t, "us_high": t} for n, t in us.items()]
    held = [{"what": "a target", "value": 1.2, "low": 1.1, "high": 1.3, "asked": 1.15, "at_most": True}]
    sizes = {"strong": 8_000_000, "weak": 2_000_000, "consensus": [32, 61_440], "stream": model.STREAM, "shrink": 1}
    return {
        "kind": "scaling",
        "quick": quick,
        "held": held,
        "rows": rows,
        "m": 10,
        "evaluations": 20,
        "meta": META,
        **sizes,
    }


def test_the_machine_is_that_of_the_micro_measurements():
    found = model.measured_cluster(record(), 2)
    assert (found.bandwidth, found.latency, found.wire) == pytest.approx((8e9, 1e-4, 1e9))


def test_predictions_do_not_depend_on_the_rows_that_are_predicted():
    slower = record()
    for row in slower["rows"]:
        if row["row"] in model.PREDICTED:
            row["us"] *= 10
    before, after = model.compared(record()), model.compared(slower)
    assert [row["predicted"] for row in before] == [row["predicted"] for row in after]
    assert [row["ratio"] for row in after] == pytest.approx([10 * row["ratio"] for row in before])
    assert {(row["row"], row["processes"]) for row in before} == {(n, s) for n in model.PREDICTED for s in SIZES}


def test_bytes_and_seconds_by_hand():
    # Three evaluations: f thrice 16; a plain step 12; steps with 1 and 2 columns of 2 bytes, 24 + 6 and 24 + 12.
    problem = model.Problem(numbers=1000, samples=3, evaluations=3, m=10)
    assert model.solve_bytes(problem) == 1000 * (48 + 12 + 30 + 36)
    assert model.reduced_bytes(3, 10) == 8 * 3 * 48
    whole = model.seconds(problem, model.Cluster(1e9, 1e-4, 1e9))
    assert whole == pytest.approx((126e-6 + 4 * (1e-4 + 1152e-9)) / 3)


@pytest.mark.parametrize("cheaper", [{"h": 1}, {"mix_every": 4}])
def test_narrow_columns_and_rarer_mixes_move_less(cheaper):
    assert model.solve_bytes(model.Problem(1000, 1, 20, 10, **cheaper)) < model.solve_bytes(
        model.Problem(1000, 1, 20, 10)
    )


def test_more_gpus_are_faster_and_less_efficient():
    found = model.predicted(lambda gpus: model.Problem(2_000_000_000 // gpus, 1, 20, 10))
    assert [gpus for gpus, _, _ in found] == list(model.GPUS)
    assert all(a[1] > b[1] and a[2] > b[2] for a, b in itertools.pairwise(found))


def test_the_page_is_filled(tmp_path):
    pytest.importorskip("matplotlib")
    maker = page_maker()
    page, results = tmp_path / "scaling.md", tmp_path / "results"
    results.mkdir()
    page.write_text((ROOT / "docs" / "scaling.md").read_text())
    (results / "a-scaling.json").write_text(json.dumps(record(quick=True)))
    with pytest.raises(SystemExit, match="nothing measured"):
        maker.main(["--results", str(results), "--page", str(page)])
    (results / "b-scaling.json").write_text(json.dumps(record()))
    maker.main(["--results", str(results), "--page", str(page)])
    text = page.read_text()
    assert "Not measured yet" not in text
    assert "| strong | 2 |" in text
    assert "| 1024 |" in text
    assert (tmp_path / "img" / "scaling.png").stat().st_size > 10_000
