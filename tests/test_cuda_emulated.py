"""The CUDA kernels, run on one CPU thread by an emulator of blocks, agree with the CPU kernels step by step."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("c++")
FLAGS = ["-std=c++17", "-O2", "-fno-math-errno", f"-I{ROOT}/csrc/cuda/emulate", f"-I{ROOT}/csrc/include"]
STRICT = ["-Wall", "-Wextra", "-Werror"]


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("op", "cases"), [("anderson", 286), ("broyden", 125)])
def test_emulated_steps_agree_with_the_cpu_kernels(tmp_path, op, cases):
    kernels = sorted((ROOT / "csrc/cuda").glob(f"{op}*.cu"))
    sources = [(ROOT / f"csrc/cpu/{op}.cpp", ["-DDEQFAST_ISA=baseline"])]
    sources += [(kernel, [*STRICT, "-x", "c++"]) for kernel in kernels]
    sources += [(ROOT / f"tests/cuda/{op}_emulated.cpp", STRICT)]
    objects = []
    for source, extra in sources:
        objects.append(str(tmp_path / f"{source.name}.o"))
        subprocess.run([COMPILER, *FLAGS, *extra, "-c", str(source), "-o", objects[-1]], check=True)
    program = str(tmp_path / "emulated")
    subprocess.run([COMPILER, *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(f"0 of {cases} cases differ")
