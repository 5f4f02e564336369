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


def start(tmp_path, plan):
    (tmp_path / "plan.json").write_text(json.dumps(plan))
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
    assert status == 0, [row for row in rows if row["ended"] != "ok"]


def test_a_torch_without_a_gpu_is_fatal_and_said_at_once(tmp_path):
    command = [sys.executable, "-m", "bench.gpu.call", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 1
    assert "torch sees no GPU" in (tmp_path / "summary.md").read_text()
