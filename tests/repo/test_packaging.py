"""The package builds, installs and imports in every way it promises to, and says truthfully what it is."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.so", "*.so.new")
NOT_SOURCE_AT_TOP = shutil.ignore_patterns(
    ".*cache", ".git", ".venv*", ".hypothesis", "build*", "dist", "out", "*.egg-info"
)


def run(*command, env=None, cwd=None) -> str:
    """The command's output; its failure carries everything it printed.

    CUDA kernels take minutes to compile; `make check-cuda` does that.
    """
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "DEQFAST_CUDA": "off", **(env or {})},
        cwd=cwd,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def python(code, env=None, cwd=None) -> str:
    return run(sys.executable, "-c", code, env=env, cwd=cwd).strip()


def build(hook, source, out, env=None) -> Path:
    """Calls a PEP 517 hook of the build backend as an installer without isolation would; the file it made."""
    out.mkdir()
    code = f"from scikit_build_core.setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    python(code, env=env, cwd=source)
    (built,) = out.iterdir()
    return built


def imported_from(site, code, cwd):
    """What `code` stores in `result`, run with `site` as the first place to import from.

    The finder of an editable install goes: it would fill in whatever `site` lacks.
    """
    code = f"""
import json, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
{code}
print(json.dumps(result))"""
    return json.loads(python(code, env={"PYTHONPATH": str(site)}, cwd=cwd))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clean copy of the tree: builds write into it."""
    copy = tmp_path_factory.mktemp("tree") / "deqfast"

    def ignore(folder, names):
        return NOT_SOURCE(folder, names) | (NOT_SOURCE_AT_TOP(folder, names) if Path(folder) == ROOT else set())

    return shutil.copytree(ROOT, copy, ignore=ignore)


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    return build("build_sdist", source, tmp_path_factory.mktemp("sdist") / "out")


@pytest.mark.packaging
def test_sdist_holds_what_a_build_a_test_run_and_a_lawyer_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tree = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "kernels", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".py")
    }
    expected = tree | {"CMakeLists.txt", "LICENSE", "Makefile", "pyproject.toml", "setup.py", "deqfast/__init__.py"}
    assert expected <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or "__pycache__" in name]


@pytest.mark.packaging
def test_wheel_built_in_isolation_from_the_sdist_imports_from_where_it_is_installed(sdist, tmp_path):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "-w", tmp_path / "wheel", sdist)
    (wheel,) = (tmp_path / "wheel").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if re.fullmatch(r"deqfast/_C\.[^/]*so", name)]
    assert "deqfast/kernels/__init__.py" in names
    assert {name.split("/")[0] for name in names} == {"deqfast", f"deqfast-{VERSION}.dist-info"}

    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", site, wheel)
    code = "import deqfast, deqfast.kernels; from deqfast import _C; result = [_C.__file__, _C.build_info()]"
    file, info = imported_from(site, code, cwd=tmp_path)
    assert Path(file).is_relative_to(site)
    assert info["version"] == VERSION
    assert info["build_type"] == "Release"
    assert info["isas"][-1] == "baseline"


@pytest.mark.packaging
def test_skip_build_makes_a_pure_wheel_that_needs_no_compiler_and_imports(source, tmp_path):
    no_tools = {"DEQFAST_SKIP_BUILD": "1", "CC": "/nonexistent", "CXX": "/nonexistent", "PATH": "/nonexistent"}
    wheel = build("build_wheel", source, tmp_path / "wheel", env=no_tools)
    assert wheel.name == f"deqfast-{VERSION}-py3-none-any.whl"
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert not list((tmp_path / "site").rglob("*.so"))

    code = "import deqfast, deqfast.info; result = [deqfast.__file__, deqfast.info.report()]"
    file, report = imported_from(tmp_path / "site", code, cwd=tmp_path)
    assert Path(file).is_relative_to(tmp_path / "site")
    assert re.search(r"native.*not built", report)


@pytest.mark.packaging
def test_a_local_version_is_the_wheel_s_and_the_package_s(source, tmp_path):
    env = {"DEQFAST_SKIP_BUILD": "1", "DEQFAST_LOCAL_VERSION": "cu128"}
    wheel = build("build_wheel", source, tmp_path / "wheel", env=env)
    assert wheel.name == f"deqfast-{VERSION}+cu128-py3-none-any.whl"
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert imported_from(tmp_path / "site", "import deqfast; result = deqfast.__version__", cwd=tmp_path) == (
        f"{VERSION}+cu128"
    )


@pytest.mark.packaging
def test_wheels_of_the_same_sources_are_the_same_file_wherever_they_were_built(sdist, tmp_path):
    env = {"CMAKE_ARGS": "-DDEQFAST_ISAS=baseline", "SOURCE_DATE_EPOCH": "1000000000"}
    contents = []
    for place in ("one", "two/deeper"):
        with tarfile.open(sdist) as archive:
            archive.extractall(tmp_path / place, filter="data")
        (tree,) = (tmp_path / place).iterdir()
        contents.append(build("build_wheel", tree, tmp_path / place / "out", env=env).read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.packaging
def test_editable_install_puts_the_module_into_the_tree(source, tmp_path):
    quick = {"CMAKE_ARGS": "-DDEQFAST_ISAS=baseline", "SKBUILD_CMAKE_BUILD_TYPE": "Debug"}
    wheel = build("build_editable", source, tmp_path / "wheel", env=quick)
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    (module,) = (source / "deqfast").glob("_C*.so")
    try:
        info = imported_from(source, "import deqfast._C; result = deqfast._C.build_info()", cwd=tmp_path)
        assert info["isas"] == ["baseline"]
        assert info["build_type"] == "Debug"
    finally:
        module.unlink()


def test_every_place_that_states_a_version_states_the_same():
    import deqfast

    assert deqfast.__version__ == VERSION
    assert f"[{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()


def test_entries_of_the_changelog_are_dated_by_release_newest_first():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    dates = [re.fullmatch(r"\[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d)", heading).group(1) for heading in headings[1:]]
    assert dates == sorted(dates, reverse=True)


def test_native_module_says_how_it_was_built():
    native = pytest.importorskip("deqfast._C", reason="the extension is not built")
    info = native.build_info()
    assert set(info) == {"version", "compiler", "build_type", "isas", "openmp", "cuda", "cuda_archs", "pybind11"}
    assert info["version"] == VERSION
    assert native.cpu_isa() in info["isas"]


def test_native_instruction_set_can_be_lowered_and_a_wrong_one_is_refused_by_name():
    native = pytest.importorskip("deqfast._C", reason="the extension is not built")
    code = "from deqfast import _C\ntry: print(_C.cpu_isa())\nexcept ValueError as error: print(error)"
    assert native.cpu_isa() in native.build_info()["isas"]
    assert python(code, env={"DEQFAST_CPU_ISA": "baseline"}) == "baseline"
    message = python(code, env={"DEQFAST_CPU_ISA": "sse9"})
    assert message.startswith("DEQFAST_CPU_ISA: expected one of ")
    assert message.endswith("got 'sse9'")


def test_no_function_compiled_for_one_instruction_set_can_stand_in_for_another():
    """Weak symbols are merged by name: one that only newer code emits would run on processors that lack it."""
    objects = {path.parts[-4].removesuffix(".dir"): path for path in ROOT.glob("build/dev/CMakeFiles/*/csrc/cpu/*.o")}
    if "cpu_avx2" not in objects or not shutil.which("nm"):
        pytest.skip("no development build for several instruction sets here, or no nm")

    def weak(target) -> set[str]:
        found = set()
        for path in ROOT.glob(f"build/dev/CMakeFiles/{target}.dir/csrc/**/*.o"):
            for line in run("nm", "--defined-only", "--demangle", path).splitlines():
                _, kind, name = line.split(" ", 2)
                found |= {name} if kind in "WVu" else set()
        return found

    safe = weak("_C") | weak("cpu_baseline")
    for isa in ("avx2", "avx512"):
        shared = {name for name in weak(f"cpu_{isa}") if f"deqfast::cpu::{isa}::" not in name}
        assert shared <= safe, f"compiled with {isa} flags, visible to all: move these into the DEQFAST_ISA namespace"
