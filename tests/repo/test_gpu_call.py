"""A call to a GPU ends with a summary whatever its parts do: injected here by a plan of commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from bench.gpu.call import plan

ROOT = Path(__file__).parents[2]
CHILD = """
import sys, time
from pathlib import Path
from bench.gpu.call.items import Items
lost = []
def wait():
    if lost: raise RuntimeError("CUDA error: an illegal memory access was encountered")
items = Items(Path(sys.argv[-1]), wait)
items.run("good", lambda: 1, gpu="good")
items.run("mismatch", lambda: 1 / 0)
items.run("sticky", lambda: lost.append(1))
items.run("hang", lambda: time.sleep(99))
items.run("last", lambda: 2)
"""


def start(tmp_path, stages):
    (tmp_path / "plan.json").write_text(json.dumps(stages))
    command = [sys.executable, "-m", "bench.gpu.call", "--out", str(tmp_path / "out"), "--limit", "40"]
    command += ["--plan", str(tmp_path / "plan.json")]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def part(name, code, **more):
    return {"name": name, "command": [sys.executable, "-c", code], "limit": 30, **more}


def test_failures_hangs_and_lost_contexts_are_results_and_the_rest_goes_on(tmp_path):
    smoke = part("smoke", CHILD, items=True, patience=1.0)
    plan = [[part("build", "print('no nvcc'); raise SystemExit(2)")], [smoke], [part("after", "")]]
    assert start(tmp_path, plan).wait(40) == 1
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    found = {row["name"]: row["ended"] for row in rows}
    assert found == {"build": "exit status 2", "good": "ok", "mismatch": "failed", "sticky": "failed",
                     "hang": "hung", "last": "ok", "after": "ok"}  # fmt: skip
    assert len(rows) == len(found)
    assert [row["lost"] for row in rows if row["ended"] == "failed"] == [False, True]
    summary = (out / "summary.md").read_text()
    assert summary.startswith("ended") and "no nvcc" in summary and "| smoke | items failed |" in summary
    assert json.loads((out / "gpu.json").read_text())["good"] == 1
    with tarfile.open(out / "call.tar.gz") as archive:
        assert set(archive.getnames()) == {"summary.md", "results.jsonl", "gpu.json"}


def test_a_signal_writes_the_summary_and_ends_the_children(tmp_path):
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(99)"
    process = start(tmp_path, [[part("long", code)]])
    end = time.monotonic() + 20
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1
    assert "stopped by SIGTERM" in (tmp_path / "out" / "summary.md").read_text()
    assert not Path(f"/proc/{int((tmp_path / 'pid').read_text())}").exists()


def test_smoke_cases_have_a_line_each_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "bench.gpu.call.smoke", "cpu", "native"]
    plan = [[{"name": "smoke", "command": command, "limit": 30, "items": True}]]
    status = start(tmp_path, plan).wait(40)
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(rows) > 40 and len({row["name"] for row in rows}) == len(rows)
    assert sum(row["name"].startswith("halves of") for row in rows) == 3 and rows[-1]["name"] == "compacted"
    assert status == 0, [row for row in rows if row["ended"] != "ok"]


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]


def test_what_needs_a_part_that_failed_is_left_out_and_says_so(tmp_path):
    plan = [
        [part("build", "raise SystemExit(2)")],
        [part("smoke", "", needs="build"), part("facts", "")],
        [part("model", "", needs="smoke")],
    ]
    assert start(tmp_path, plan).wait(40) == 1
    found = {row["part"]: (row["ended"], row.get("why")) for row in rows_of(tmp_path)}
    assert found["smoke"] == ("left out", "build: exit status 2") and found["facts"][0] == "ok"
    assert found["model"] == ("left out", "smoke: left out")


TESTS = """
import os, time
def test_good(): pass
def test_wrong(): assert 1 == 2
def test_hangs(): time.sleep(99)
def test_dies(): os._exit(11)
def test_sticky(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_last(): pass
"""


def test_tests_have_a_line_each_and_go_on_behind_one_that_hangs_or_dies(tmp_path):
    (tmp_path / "test_injected.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu.call.told"]
    command += ["--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path / "test_injected.py")]
    tests = {"name": "tests", "command": command, "limit": 60, "patience": 3.0, "items": True}
    assert start(tmp_path, [[tests]]).wait(60) == 1
    found = {row["name"].split("::")[-1]: row["ended"] for row in rows_of(tmp_path)}
    assert found == {"test_good": "ok", "test_wrong": "failed", "test_hangs": "hung", "test_dies": "died (11)",
                     "test_sticky": "failed", "test_last": "ok"}  # fmt: skip


def test_shards_share_all_tests(tmp_path):
    (tmp_path / "test_many.py").write_text("".join(f"def test_{i}(): pass\n" for i in range(7)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu.call.told"]
    command += ["--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path / "test_many.py")]
    plan = [{"name": f"{i}", "command": [*command, "--shard", f"{i}/3"], "limit": 30, "items": True} for i in range(3)]
    assert start(tmp_path, [plan]).wait(40) == 0
    assert sorted(row["name"][-1] for row in rows_of(tmp_path)) == list("0123456")


def test_measurements_fill_the_record_of_a_benchmark(tmp_path):
    command = [sys.executable, "-m", "bench.gpu.call.measure"]
    plan = [
        [{"name": what, "command": [*command, what, "--device", "cpu"], "limit": 60, "items": True}]
        for what in ("facts", "model")
    ]
    assert start(tmp_path, plan).wait(100) == 0, [row for row in rows_of(tmp_path) if row["ended"] != "ok"]
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["copy_bytes_per_second"] > 0 and found["launch_us"] > 0 and found["without"] == {}
    assert found["meta"]["date"] and found["device"]["torch"]
    assert len(found["latency"]) == 3 and len(found["bandwidth"]) > 3
    assert all(row["us"] > 0 for section in ("latency", "bandwidth") for row in found[section])


def test_parts_are_run_alone_and_unknown_ones_named(tmp_path):
    plan = [[part("one", ""), part("two", "", needs="one")]]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(ROOT / ".ci" / "gpu.py"), "--out", str(tmp_path / "out")]
    command += ["--plan", str(tmp_path / "plan.json"), "--parts"]
    assert subprocess.run([*command, "two"], cwd=tmp_path, check=False).returncode == 0
    assert [row["part"] for row in rows_of(tmp_path)] == ["two"]
    wrong = subprocess.run([*command, "three"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert wrong.returncode == 2 and "expected some of one, two, got three" in wrong.stderr


def test_the_plan_names_files_that_exist_and_fits_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "asked", lambda *command, limit=0.0: ("9.0", ""))
    monkeypatch.setattr(Path, "symlink_to", lambda *_: None)
    stages = plan.stages(ROOT, tmp_path, "first")
    parts = {p.name: p for stage in stages for p in stage}
    named = {word for p in parts.values() for word in p.command if word.endswith(".py")}
    assert len(named) > 10 and all((ROOT / word).exists() for word in named)
    assert "-DDEQFAST_CUDA_ARCHS=90-real" in parts["configure"].command
    assert all(p.needs is None or p.needs in parts for p in parts.values())
    assert sum(name.startswith("triton-") for name in parts) == 14
    assert [p.name for stage in plan.stages(ROOT, tmp_path, "sanitize") for p in stage] == [
        "memcheck", "racecheck", "profile",
    ]  # fmt: skip


def test_a_torch_without_a_gpu_is_fatal_and_said_at_once(tmp_path):
    command = [sys.executable, "-m", "bench.gpu.call", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 1
    assert "torch sees no GPU" in (tmp_path / "summary.md").read_text()
