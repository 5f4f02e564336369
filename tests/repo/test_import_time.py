"""Importing the package touches no GPU: no context in a process that may fork, none for programs that need none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Whatever asks a driver for anything goes through one of these names, or through the extension module (below).
ASKED = """
import torch
calls = []

def refuse(module, name):
    def call(*args, **kwargs):
        calls.append(f"{module.__name__}.{name}")
        raise AssertionError(f"{module.__name__}.{name} was called")
    setattr(module, name, call)

for name in dir(torch._C):
    if name.startswith("_cuda") and callable(getattr(torch._C, name)):
        refuse(torch._C, name)
for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "current_stream",
             "get_device_capability", "get_device_name", "get_device_properties", "synchronize"):
    refuse(torch.cuda, name)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)


def test_import_makes_no_cuda_context():
    done = python("import torch, deqfast; print(torch.cuda.is_initialized())")
    assert done.stdout == "False\n", done.stderr


def test_import_asks_no_driver_for_anything():
    done = python(f"{ASKED}\nimport deqfast\nassert not calls, calls\nprint('imported')")
    assert done.stdout == "imported\n", done.stderr


def test_what_asks_a_driver_is_seen():
    done = python(f"{ASKED}\ntry: torch.cuda.is_available()\nexcept AssertionError: print(calls)")
    assert done.stdout == "['torch.cuda.is_available']\n", done.stderr


def test_import_leaves_the_rest_of_torch_and_optional_packages_alone():
    """What costs time and is asked for when it is used."""
    late = (
        "torch._dynamo",
        "torch._inductor",
        "triton",
        "matplotlib",
        "scipy",
        "tqdm",
        "deqfast.compat",
        "deqfast.compare",
    )
    done = python(
        f"import sys, torch; before = set(sys.modules); import deqfast; new = set(sys.modules) - before; "
        f"print([name for name in {late} if name in new])"
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the loader of glibc says what it looks for")
def test_module_looks_for_the_driver_when_it_is_asked_for_a_device_and_not_before():
    """The CUDA runtime within it loads libcuda at its first call."""
    native = pytest.importorskip("deqfast._C", reason="the extension is not built")
    if native.build_info()["cuda"] in (None, "emulated"):
        pytest.skip("the extension has no CUDA kernels")
    load = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("deqfast._C", {native.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)"""
    imported = python(load, LD_DEBUG="libs")
    asked = python(f"{load}\nprint(module.cuda_why_not(0))", LD_DEBUG="libs")
    assert imported.returncode == asked.returncode == 0, asked.stderr[-1000:]
    assert "libcuda.so" not in imported.stderr
    assert "libcuda.so" in asked.stderr
