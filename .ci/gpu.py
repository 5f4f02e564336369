"""Everything that wants a GPU, in one go: `make gpu`, or `python .ci/gpu.py`, under ten minutes.

Needs no network and no pip: PYTHON's torch, CMake, Ninja and nvcc build the module into deqfast/ for this device.
Then the tests of the steps run on the device, the tests that need one, the sanitizer over a small program, and the
benchmark, alone. Every part has a time limit and writes a log; a part that fails does not stop the others, and the exit
status says so. Results: bench/results/<date>-<device>/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 590.0  # seconds for everything
BENCH_LIMIT = 230.0
STEPS = [
    "tests/ops/test_anderson.py",
    "tests/ops/test_broyden.py",
    "tests/ops/test_low_precision.py",
    "tests/ops/test_picard.py",
]
STEPS += ["tests/ops/test_joint_map.py", "tests/ops/test_joint_step.py", "tests/ops/test_joint_finish.py"]
SOLVES = ["tests/device/test_device.py", "tests/device/test_device_joint.py", "tests/device/test_device_gradients.py"]


@dataclass
class Part:
    """A command, its time limit in seconds, and how it ended."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    ended: str = "not run"
    ok: bool = False
    seconds: float = 0.0
    told: str = ""


def ask(*command: str) -> str | None:
    """What a program prints, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def missing() -> list[str]:
    """What this machine lacks for a run."""
    lacking = []
    if ask("nvidia-smi", "-L") is None:
        lacking.append("a GPU: nvidia-smi is not there or finds none")
    seen = ask(sys.executable, "-c", "import torch; print(torch.cuda.is_available(), torch.version.cuda)")
    if seen is None:
        lacking.append(f"torch: {sys.executable} cannot import it; name another interpreter with PYTHON=")
    elif not seen.startswith("True"):
        lacking.append(f"torch with a CUDA device: is_available() and version.cuda are {seen}")
    if ask(sys.executable, "-c", "import pytest, hypothesis, scipy") is None:
        lacking.append("pytest, hypothesis and scipy")
    for tool in ("cmake", "ninja", "nvcc"):
        if shutil.which(tool) is None:
            lacking.append(f"{tool} on the PATH")
    return lacking


def versions() -> dict[str, str | None]:
    """What the results belong to."""
    code = "import torch; print(torch.__version__)"
    triton = "import triton; print(triton.__version__)"
    query = "name,driver_version,compute_cap,memory.total,compute_mode,clocks.max.sm,power.limit"
    return {
        "gpu": ask("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "python": sys.version.split()[0],
        "torch": ask(sys.executable, "-c", code),
        "triton": ask(sys.executable, "-c", triton),
        "nvcc": (ask("nvcc", "--version") or "").split("\n")[-1],
        "cmake": (ask("cmake", "--version") or "").split("\n")[0],
        "compute-sanitizer": shutil.which("compute-sanitizer"),
        "commit": ask("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }


def architecture() -> str:
    """Of the first device, as CMake takes it: 90-real."""
    found = (ask("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or "9.0").splitlines()[0]
    return found.strip().replace(".", "") + "-real"


def stages(out: Path, arch: str, triton: bool, sanitizer: str | None) -> list[list[Part]]:
    """Parts that may share the machine stand in one stage; the benchmark is alone."""
    build = ROOT / "build" / "gpu"
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += ["-DDEQFAST_CUDA=on", f"-DDEQFAST_CUDA_ARCHS={arch}"]
    device = {"DEQFAST_TEST_DEVICE": "cuda"}
    tests = [pytest("tests-device", out, SOLVES, 200)]
    tests += [pytest("tests-graphs", out, ["tests/device/test_device_graphs.py"], 200)]
    tests += [pytest("steps-native", out, [*STEPS, "-k", "not triton"], 200, device)]
    if triton:
        tests += [pytest("steps-triton", out, [*STEPS, "-k", "triton"], 200, device)]
        tests += [pytest("compile-triton", out, ["tests/ops/test_triton_compile.py"], 200)]
    smoke = [sys.executable, str(ROOT / "tests" / "device" / "device_smoke.py")]
    # A tensor an allocation: what lies beyond its end is nobody's, and the sanitizer sees it.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checks = [Part("smoke", smoke, 60)]
    if sanitizer:
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *smoke, "cuda", "native"]
            if tool == "memcheck":
                command[1:1] = ["--report-api-errors", "no"]
            checks.append(Part(tool, command, 100, alone))
    bench = [sys.executable, "-m", "bench.gpu", "--out", str(out / "gpu.json")]
    return [
        [Part("configure", configure, 60)],
        [Part("build", ["cmake", "--build", str(build)], 240)],
        tests,
        checks,
        [Part("bench", bench, BENCH_LIMIT)],
    ]


def pytest(name: str, out: Path, what: list[str], limit: float, environment: dict[str, str] | None = None) -> Part:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / name}.xml", *what]
    return Part(name, command, limit, environment or {})


def start(part: Part, out: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", **part.environment}
    with (out / f"{part.name}.log").open("wb") as log:
        log.write((" ".join(part.command) + "\n\n").encode())
        log.flush()
        return subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def run_stage(stage: list[Part], out: Path, end: float) -> None:
    """Start the parts together and wait for each, no longer than it may take."""
    begin = time.monotonic()
    running = []
    for part in stage:
        if end - begin < 5:
            part.ended = "not run: the time was up"
            continue
        try:
            running.append((part, start(part, out)))
        except OSError as error:
            part.ended = f"did not start: {error}"
    while running:
        time.sleep(0.2)
        now = time.monotonic()
        for part, process in list(running):
            status = process.poll()
            if status is None and now < min(begin + part.limit, end):
                continue
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            part.seconds = time.monotonic() - begin
            part.ok = status == 0
            part.ended = "ok" if part.ok else "out of time" if status is None else f"exit status {status}"
            part.told = tell(part, out)
            running.remove((part, process))
            print(f"{part.name:16s}{part.ended:24s}{part.seconds:6.0f} s  {part.told}", flush=True)


def tell(part: Part, out: Path) -> str:
    """One line out of a part's results: counts of tests, or the last line of its log."""
    report = out / f"{part.name}.xml"
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        if suite is not None:
            counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
            return ", ".join(f"{count} {name}" for name, count in counts.items())
    lines = (out / f"{part.name}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1][:120] if lines else ""


def link_kernels() -> None:
    """deqfast/kernels, as an install would lay it out."""
    link = ROOT / "deqfast" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "kernels")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python .ci/gpu.py", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument("--skip", nargs="*", default=[], help="parts to leave out")
    options = parser.parse_args()
    lacking = missing()
    if lacking:
        print("This needs a GPU and the tools to build for it. Missing here:", file=sys.stderr)
        print("\n".join(f"  {what}" for what in lacking), file=sys.stderr)
        return 1
    end = time.monotonic() + options.limit
    found = versions()
    slug = re.sub(r"[^a-z0-9]+", "-", (found["gpu"] or "gpu").splitlines()[0].split(",")[0].lower()).strip("-")
    out = ROOT / "bench" / "results" / f"{datetime.now(timezone.utc):%Y-%m-%d}-{slug}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "versions.json").write_text(json.dumps(found, indent=1) + "\n")
    link_kernels()
    plan = stages(out, architecture(), found["triton"] is not None, found["compute-sanitizer"])
    # A device that only one process may use takes one part at a time.
    if found["gpu"] and "exclusive" in found["gpu"].lower():
        plan = [[part] for stage in plan for part in stage]
    for stage in plan:
        chosen = [part for part in stage if part.name not in options.skip]
        for part in chosen:
            if part.name == "bench":
                part.command += ["--budget", str(max(20.0, min(BENCH_LIMIT, end - time.monotonic()) - 20.0))]
        later = BENCH_LIMIT if "bench" not in options.skip and not any(p.name == "bench" for p in stage) else 0.0
        run_stage(chosen, out, end - later)
    parts = [part for stage in plan for part in stage if part.name not in options.skip]
    if not found["compute-sanitizer"]:
        print("compute-sanitizer is not on the PATH: memcheck and racecheck were not run")
    summary = "\n".join(f"| {p.name} | {p.ended} | {p.seconds:.0f} s | {p.told} |" for p in parts)
    summary = "| part | ended | took | |\n|---|---|---|---|\n" + summary
    (out / "summary.md").write_text(summary + "\n")
    print(f"\n{summary}\n\n{out.relative_to(ROOT)}")
    return 0 if all(part.ok for part in parts) and found["compute-sanitizer"] else 1


if __name__ == "__main__":
    sys.exit(main())
