"""An install compiles the CUDA kernels where they can be used, and says what it does before it does it."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cmake" / "build_plan.py"
plan = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
CPU = plan.Torch("2.13.0+cpu", None, Path("/site/torch"))
GPU = plan.Torch("2.13.0+cu130", "13.0", Path("/site/torch"))
VERSION_PY = """from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip']
__version__ = '{version}'
debug = False
cuda: Optional[str] = {cuda!r}
git_version = 'abc'
hip: Optional[str] = {hip!r}
"""


def put_torch(folder: Path, version: str, cuda: str | None = None, hip: str | None = None) -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(VERSION_PY.format(version=version, cuda=cuda, hip=hip))
    return folder


def environment_of(prefix: Path) -> Path:
    return prefix / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"


@pytest.mark.parametrize(
    ("choice", "nvcc", "torch", "driver", "compiled", "why"),
    [
        ("auto", True, GPU, True, True, "torch 2.13.0+cu130 in /site has CUDA 13.0"),
        ("auto", True, GPU, False, True, "torch 2.13.0+cu130 in /site has CUDA 13.0"),
        ("auto", True, CPU, True, False, "torch 2.13.0+cpu in /site has no CUDA"),
        ("auto", True, CPU, False, False, "torch 2.13.0+cpu in /site has no CUDA"),
        ("auto", True, None, True, True, "no torch was found, but NVIDIA's driver"),
        ("auto", True, None, False, False, "neither torch nor NVIDIA's driver was found"),
        ("auto", False, GPU, True, False, "no nvcc was found"),
        ("on", True, CPU, False, True, "DEQFAST_CUDA=on"),
        ("on", False, None, False, True, "DEQFAST_CUDA=on"),  # CMake fails then, and says what it lacks
        ("off", True, GPU, True, False, "DEQFAST_CUDA=off"),
        ("emulate", True, GPU, True, False, "DEQFAST_CUDA=emulate"),
    ],
)
def test_cuda_kernels_are_compiled_where_they_can_be_used_or_are_asked_for(choice, nvcc, torch, driver, compiled, why):
    assert plan.cuda_decision(choice, nvcc, torch, driver) == (compiled, why)


def test_choices_are_those_that_cmake_takes():
    (choices,) = re.findall(r"set\(cuda_choices (.*)\)", (ROOT / "cmake" / "cuda.cmake").read_text())
    assert tuple(choices.split()) == plan.CHOICES


def test_a_choice_that_is_none_is_refused_by_name_before_anything_is_compiled(monkeypatch):
    with pytest.raises(SystemExit, match="DEQFAST_CUDA must be one of auto, on, off, emulate, got 'yes'"):
        plan.announce({"DEQFAST_CUDA": "yes"})


@pytest.mark.parametrize(("cuda", "hip"), [("13.0", None), (None, None), (None, "7.0.1")])
def test_torch_is_read_and_not_imported(tmp_path, cuda, hip):
    put_torch(tmp_path / "site", "2.14.1+x", cuda, hip)
    (tmp_path / "site" / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    found = plan.find_torch([tmp_path / "none", tmp_path / "site"])
    assert found == ("2.14.1+x", cuda, tmp_path / "site" / "torch")


def test_the_nearest_torch_that_says_its_version_counts(tmp_path):
    broken = put_torch(tmp_path / "broken", "2.0")
    (broken / "torch" / "version.py").write_text("__version__ = ")
    silent = put_torch(tmp_path / "silent", "2.0")
    (silent / "torch" / "version.py").write_text("cuda = '13.0'\n")
    near, far = put_torch(tmp_path / "near", "2.13.0+cpu"), put_torch(tmp_path / "far", "2.9.0", "12.8")
    assert plan.find_torch([broken, silent, near, far]).version == "2.13.0+cpu"
    assert plan.find_torch([broken, silent]) is None


def test_the_torch_that_tests_run_on_is_found_as_it_is():
    import torch

    found = plan.find_torch(plan.package_folders({}))
    assert found == (torch.__version__, torch.version.cuda, Path(torch.__file__).parent)


@pytest.mark.parametrize("name", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_a_build_in_an_environment_of_its_own_finds_the_torch_of_the_active_one(tmp_path, name):
    put_torch(environment_of(tmp_path / "active"), "2.13.0+cu130", "13.0")
    env = {"PATH": os.environ["PATH"], name: str(tmp_path / "active")}
    isolated = tmp_path / "isolated"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", isolated], check=True)
    done = subprocess.run([isolated / "bin" / "python", SCRIPT], env=env, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines() == [
        "on",
        f"torch 2.13.0+cu130 in {environment_of(tmp_path / 'active')} has CUDA 13.0",
    ]


def test_a_build_that_pip_isolates_finds_the_torch_of_its_target(tmp_path):
    """pip runs the target's Python with another place to import from; a sitecustomize takes the target's folders."""
    target, overlay = tmp_path / "target", tmp_path / "overlay"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", target], check=True)
    put_torch(environment_of(target), "2.13.0+cpu")
    overlay.mkdir()
    (overlay / "sitecustomize.py").write_text("import sys\nsys.path = [p for p in sys.path if '-packages' not in p]\n")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(overlay), "VIRTUAL_ENV": str(tmp_path / "other")}
    put_torch(environment_of(tmp_path / "other"), "2.9.0", "12.8")
    python = target / "bin" / "python"
    seen = subprocess.run([python, "-c", "import torch"], env=env, text=True, capture_output=True)
    assert "No module named 'torch'" in seen.stderr
    done = subprocess.run([python, SCRIPT], env=env, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines() == ["off", f"torch 2.13.0+cpu in {environment_of(target)} has no CUDA"]


@pytest.mark.parametrize("sign", ["dev/nvidiactl", "dev/dxg", "proc/driver/nvidia/version"])
def test_a_driver_is_seen_by_what_it_brings(tmp_path, monkeypatch, sign):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert not plan.has_driver(tmp_path)
    (tmp_path / sign).parent.mkdir(parents=True)
    (tmp_path / sign).touch()
    assert plan.has_driver(tmp_path)


def test_a_driver_is_seen_by_its_tool(tmp_path, monkeypatch):
    put_tool(tmp_path / "bin" / "nvidia-smi")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert plan.has_driver(tmp_path)


@pytest.mark.parametrize(("variable", "value"), [("PATH", "{}/bin"), ("CUDA_PATH", "{}"), ("CUDACXX", "{}/bin/nvcc")])
def test_nvcc_is_found_where_cmake_finds_it(tmp_path, monkeypatch, variable, value):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert plan.find_nvcc({}) is None
    put_tool(tmp_path / "bin" / "nvcc")
    environment = {variable: value.format(tmp_path)}
    monkeypatch.setenv("PATH", environment.get("PATH", "/nonexistent"))
    assert plan.find_nvcc(environment) == str(tmp_path / "bin" / "nvcc")


def put_tool(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("decision", "environment", "line"),
    [
        (("auto", True, CPU, False), {}, r"no CUDA kernels: torch 2\.13\.0\+cpu .*; DEQFAST_CUDA=on compiles them"),
        (("auto", True, None, False), {}, "no CUDA kernels: neither torch .*; DEQFAST_CUDA=on compiles them"),
        (("off", True, GPU, True), {}, "no CUDA kernels: DEQFAST_CUDA=off$"),
        (("emulate", True, GPU, True), {}, "for CPU tensors"),
        (("auto", True, GPU, False), {}, r"(?s)torch .* has CUDA 13\.0\n.*DEQFAST_CUDA=off leaves them out"),
        (("auto", True, GPU, True), {"CMAKE_ARGS": "-DDEQFAST_CUDA=off"}, "as CMAKE_ARGS says"),
    ],
)
def test_first_lines_say_what_is_compiled_and_how_to_have_it_otherwise(decision, environment, line):
    first, *rest = plan.said(environment, plan.cuda_decision(*decision))
    assert "DEQFAST_SKIP_BUILD=1 compiles nothing" in first
    assert re.search(line, "\n".join(rest)), rest


@pytest.mark.parametrize(("command", "spoken"), [("bdist_wheel", True), ("egg_info", False)])
def test_only_a_build_that_compiles_speaks(tmp_path, command, spoken):
    code = f"""
import setuptools, sys
setuptools.setup = lambda **arguments: None
sys.argv = ["setup.py", {command!r}]
__file__ = {str(ROOT / "setup.py")!r}
exec(compile(open(__file__).read(), __file__, "exec"))"""
    env = {**os.environ, "DEQFAST_CUDA": "off"}
    for skip in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**env, "DEQFAST_SKIP_BUILD": skip},
            text=True,
            capture_output=True,
            check=True,
            cwd=ROOT,
        )
        assert done.stdout.startswith("deqfast: compiling the CPU kernels") == (spoken and skip == "0")
