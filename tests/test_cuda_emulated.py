"""The CUDA kernels, run on one CPU thread by an emulator of blocks, agree with the CPU kernels step by step."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("c++")
FLAGS = ["-std=c++17", "-O2", "-fno-math-errno", f"-I{ROOT}/csrc/cuda/emulate", f"-I{ROOT}/csrc/include"]


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_emulated_anderson_steps_agree_with_the_cpu_kernels(tmp_path):
    objects = []
    for source, extra in (
        ("csrc/cpu/anderson.cpp", ["-DDEQFAST_ISA=baseline"]),
        ("csrc/cuda/anderson.cu", ["-x", "c++"]),
        ("tests/cuda/anderson_emulated.cpp", []),
    ):
        objects.append(str(tmp_path / f"{Path(source).name}.o"))
        subprocess.run([COMPILER, *FLAGS, *extra, "-c", str(ROOT / source), "-o", objects[-1]], check=True)
    program = str(tmp_path / "emulated")
    subprocess.run([COMPILER, *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("0 of 152 cases differ")
