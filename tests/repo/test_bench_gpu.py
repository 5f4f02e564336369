"""The GPU benchmark's script works: on CPU tensors it takes the paths of a device, and reports what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import floor, targets
from bench.report import gpu as report
from bench.report.markdown import table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "2001-02-03-none" / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--quick", "--out", str(out)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text()), out


def test_every_section_is_there_and_nothing_was_left_out(record):
    found = record[0]
    assert found["dry"] and found["without"] == {}
    assert found["copy_bytes_per_second"] > 0
    assert found["device"]["torch"] and found["meta"]["date"] and found["meta"]["command"].endswith("--dry")
    for section in ("latency", "bandwidth", "histories", "joint"):
        rows = found[section]
        assert rows
        for row in rows:
            assert row["us_low"] <= row["us"] <= row["us_high"]
            assert row["copy_fraction"] > 0 and row["floor_bytes"] > 0
    assert [row["history"] for row in found["histories"]] == ["float32", "bfloat16", "int8"]
    sizes = [row["history_bytes"] for row in found["histories"]]
    assert sizes[0] == 2 * sizes[1] and sizes[1] > 1.9 * sizes[2]


def test_rivals_and_own_rows_make_as_many_evaluations(record):
    for entry in record[0]["solves"]:
        own = {name: row for name, row in entry["rows"].items() if "mode" in row}
        assert len(own) >= 4
        assert {row["nfe"] for row in own.values()} == {entry["evaluations"]}
        assert "torch.compile" in entry["rows"], entry["skipped"]
        assert all(row["us"] > 0 for row in entry["rows"].values())
    assert record[0]["device_loop"]["host_syncs"] == 0
    for entry in record[0]["training"]:
        errors = [row["gradient_error"] for name, row in entry["rows"].items() if name.startswith("deqfast")]
        assert errors and max(errors) < 0.1


def test_report_says_that_no_run_was_made_and_shows_one_that_was(record, tmp_path):
    found, out = record
    assert report.newest(out.parents[1]) is None  # a dry run measures nothing
    assert "No run on a GPU has been made" in "\n".join(report.section(None))
    folder = tmp_path / "2001-02-03-some-gpu"
    folder.mkdir()
    made_up = {**found, "dry": False, "device": {**found["device"], "name": "some GPU"}}
    (folder / "gpu.json").write_text(json.dumps(made_up))
    text = "\n\n".join(report.section(report.newest(tmp_path)))
    assert "on some GPU" in text and "### Steps" in text and "### Training step, MLP" in text
    assert "A `--quick` trial" in text
    assert table(["a"], [["b"]]) == "| a |\n|---|\n| b |"


def test_floor_counts_the_bytes_of_the_schedule_that_a_sample_gets():
    assert floor.fits_a_block(floor.block_max_n()) and not floor.fits_a_block(floor.block_max_n() + 1)
    assert floor.anderson_device_bytes(1, 6, 4, one_pass=True) == 68
    assert floor.anderson_device_bytes(1, 6, 2, one_pass=True) == 44
    assert floor.anderson_device_bytes(1, 6, 4, one_pass=False) == 76
    assert floor.anderson_device_bytes(1, 10, 2, one_pass=False, both=True) == 84
    assert floor.broyden_device_bytes(1, 4, True) == 32
    assert floor.broyden_device_bytes(1, 4, False) == 56


def test_targets_are_held_against_the_fastest_mode_and_never_against_a_worse_residual():
    rows = {
        "torchdeq anderson": {"us": 1500.0, "residual": 1e-3},
        "Type II m=6, float32, native, loop": {"us": 200.0, "residual": 1e-3},
        "Type II m=6, float32, native, device": {"us": 75.0, "residual": 1e-3},
    }
    entry = {"size": "64x1024", "rows": rows, "skipped": {"torch.compile": "no compiler"}}
    record = {"dry": False, "solves": [entry]}
    ((label, told), (_, absent)) = report.target_rows(record)
    assert "native, device" in label and told.startswith(f"20.0 (met, target {targets.GPU_TORCHDEQ['64x1024']})")
    assert "no compiler" in absent
    rows["Type II m=6, float32, native, device"]["residual"] = 1e-2
    assert "no win" in report.target_rows(record)[0][1]


def test_smoke_program_agrees_with_the_reference_on_a_cpu():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "tests" / "device" / "device_smoke.py"), "cpu", "native"],
        env=environment, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agree with the reference" in done.stdout
