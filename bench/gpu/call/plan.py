"""The parts of a call, the most telling first; no network, no make."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu.call.process import Part

STEPS = ("anderson", "broyden", "low_precision", "picard", "joint_map", "joint_step", "joint_finish", "middle_sizes")
SOLVES = ("device", "device_joint", "device_gradients", "device_graphs")
TRITON_PROCESSES = 14
MODES = ("first", "sanitize")


def tool(name: str) -> str | None:
    """A program on the PATH or in a CUDA toolkit at its usual place, the newest."""
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/local/cuda*/bin/{name}"), reverse=True)), None)


def asked(*command: str, limit: float = 60.0) -> tuple[str, str]:
    """What a program prints, and why it did not (empty: it did)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{type(error).__name__}: {error}"
    return done.stdout.strip(), "" if done.returncode == 0 else done.stderr.strip()[-300:] or str(done.returncode)


def fatal() -> str | None:
    """Why nothing can be run here: torch or the GPU is missing; anything else is a result."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    said, why = asked(sys.executable, "-c", code, limit=120.0)
    if why:
        return f"{sys.executable} cannot import torch: {why}"
    return None if said.endswith("True") else f"torch sees no GPU: {said}"


def architecture() -> str:
    """Of the first device, as CMake takes it: 90-real."""
    said, why = asked("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return (said.splitlines()[0].strip().replace(".", "") if said and not why else "90") + "-real"


def _pytest(name: str, what: list[str], *more: str, limit: float = 200.0, **environment: str) -> Part:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu.call.told"]
    part = Part(name, [*command, *what, *more], limit, 60.0, items=True, environment=environment)
    part.needs = None if "triton" in name else "build"
    return part


def tests(triton: bool) -> list[Part]:
    """Steps by file on the device, tests of the device, Triton's compiler: each a process or several."""
    files = {name: f"tests/ops/test_{name}.py" for name in STEPS}
    parts = [
        _pytest(f"steps-{name}", [path], "-k", "not triton", DEQFAST_TEST_DEVICE="cuda") for name, path in files.items()
    ]
    parts += [_pytest(f"tests-{name}", [f"tests/device/test_{name}.py"]) for name in SOLVES]
    if triton:
        for i in range(TRITON_PROCESSES):
            shard = f"{i}/{TRITON_PROCESSES}"
            what = [*files.values(), "tests/ops/test_triton_compile.py"]
            parts.append(_pytest(f"triton-{i}", what, "-k", "triton", "--shard", shard, DEQFAST_TEST_DEVICE="cuda"))
    return parts


def sanitize(out: Path, smoke: list[str]) -> list[list[Part]]:
    """On a tree that a first call built: the cases under the sanitizer, and one profile of each kernel."""
    # A tensor an allocation: what lies beyond its end is nobody's, and the sanitizer sees it.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer, profiler = tool("compute-sanitizer") or "compute-sanitizer", tool("ncu") or "ncu"
    own = ["--kernel-regex", "kns=deqfast", "--error-exitcode", "9"]
    found = [
        [Part(name, [sanitizer, "--tool", name, *own, *smoke, "native"], 250, 120, items=True, environment=alone)]
        for name in ("memcheck", "racecheck")
    ]
    # By default a pattern is held against the function's name alone, which has no namespace.
    profile = [profiler, "--kernel-name-base", "mangled", "--kernel-name", "regex:deqfast"]
    profile += ["--set", "basic", "--csv", "--launch-count", "400"]
    profile += ["--log-file", str(out / "kernels.csv"), *smoke, "native"]
    return [*found, [Part("profile", profile, 200, 120, items=True)]]


def stages(root: Path, out: Path, mode: str) -> list[list[Part]]:
    """Parts of a stage run side by side; where times are taken a part is alone."""
    python = [sys.executable, "-m"]
    smoke = [*python, "bench.gpu.call.smoke", "cuda"]
    if mode == "sanitize":
        return sanitize(out, smoke)
    link = root / "deqfast" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "kernels")
    nvcc, build = tool("nvcc"), str(root / "build" / "gpu")
    configure = ["cmake", "-S", str(root), "-B", build, f"-DPython_EXECUTABLE={sys.executable}", "-DDEQFAST_CUDA=on"]
    configure += [f"-DDEQFAST_CUDA_ARCHS={architecture()}", *(["-G", "Ninja"] if shutil.which("ninja") else [])]
    compiler = {"CUDACXX": nvcc} if nvcc else {}
    compile_ = ["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)]
    triton = not asked(sys.executable, "-c", "import triton")[1]
    measure = [*python, "bench.gpu.call.measure"]
    built = Part("build", compile_, 240, environment=compiler, needs="configure")
    side = [Part("smoke-triton", [*smoke, "triton"], 240, 60, items=True)] if triton else []
    return [
        [Part("facts", [*measure, "facts"], 60, 40, items=True)],
        [Part("configure", configure, 60, environment=compiler)],
        [built, *side],
        [Part("smoke", [*smoke, "native"], 60, 20, items=True, needs="build")],
        [Part("model", [*measure, "model"], 40, 20, items=True, needs="build")],
        tests(triton),
        [Part("sections", [*measure, "sections"], 180, 100, items=True, needs="build")],
    ]
