"""The parts of a call, the most telling first; no network, no make."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu.call.process import Part


def tool(name: str) -> str | None:
    """A program on the PATH or in a CUDA toolkit at its usual place, the newest."""
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/local/cuda*/bin/{name}"), reverse=True)), None)


def fatal() -> str | None:
    """Why nothing can be run here: torch or the GPU is missing; anything else is a result."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        return f"{sys.executable} cannot import torch: {done.stderr.strip()[-300:]}"
    return None if done.stdout.strip().endswith("True") else f"torch sees no GPU: {done.stdout.strip()}"


def stages(root: Path, mode: str) -> list[list[Part]]:
    """``mode``: "first", or "sanitize" on a tree that a first call built."""
    smoke = [sys.executable, "-m", "bench.gpu.call.smoke", "cuda"]
    if mode == "sanitize":
        sanitizer = tool("compute-sanitizer") or "compute-sanitizer"
        own = ["--kernel-regex", "kns=deqfast", "--error-exitcode", "9"]
        return [
            [Part(name, [sanitizer, "--tool", name, *own, *smoke, "native"], 250, 120, True)]
            for name in ("memcheck", "racecheck")
        ]
    link = root / "deqfast" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "kernels")
    nvcc = tool("nvcc")
    build = str(root / "build" / "gpu")
    configure = ["cmake", "-S", str(root), "-B", build, f"-DPython_EXECUTABLE={sys.executable}", "-DDEQFAST_CUDA=on"]
    configure += ["-DDEQFAST_CUDA_ARCHS=90-real", *(["-G", "Ninja"] if shutil.which("ninja") else [])]
    compiler = {"CUDACXX": nvcc} if nvcc else {}
    compile_ = ["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)]
    return [
        [Part("configure", configure, 60, environment=compiler)],
        [
            Part("build", compile_, 240, environment=compiler),
            Part("smoke-triton", [*smoke, "triton"], 240, 60, True),
        ],
        [Part("smoke", [*smoke, "native"], 60, 20, True)],
        [Part("bench", [sys.executable, "-m", "bench.gpu", "--out", "build/bench.json", "--budget", "150"], 170)],
    ]
