"""What the documentation says runs, files that it names are there, and what scripts write is up to date."""

import functools
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import deqfast

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MIGRATION = "docs/migration.md"
# A block that no test runs has its reason before it: <!-- not run: why -->
BLOCK = re.compile(r"^(?:<!-- not run: \S.*? -->\n+)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"^<!-- not run:")
API = "docs/api.md"
# What the examples of docstrings take for given.
GIVEN = """
import torch, deqfast as dq
W = 0.3 * torch.eye(N)
x, z, z0 = torch.ones(4, N), torch.ones(4, N), torch.zeros(4, N)
def f(z): return torch.tanh(z @ W + 1)
def block(z, x): return torch.tanh(z @ W + x)
def field(z, x): return block(z, x) - z
cell = block
"""
SWAP = "import torch; W = 0.3 * torch.eye(8); z0 = torch.ones(4, 8)\ndef f(z): return torch.tanh(z @ W + 1)\n"


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    text = (ROOT / page).read_text()
    found = [m for m in BLOCK.finditer(text) if m[1] == language and not NOT_RUN.match(m[0])]
    return [(text[: m.start(2)].count("\n") + 1, m[2]) for m in found]


def pages_with(*languages: str) -> list[str]:
    names = [str(page.relative_to(ROOT)) for page in PAGES]
    return [name for name in names if any(blocks(name, language) for language in languages)]


def wrong_with(source: str, namespace: dict, page: str, line: int) -> str:
    """What a block raises as it runs, an assertion of its own or any other error; nothing if it runs to its end."""
    try:
        exec(compile("\n" * (line - 1) + source, str(ROOT / page), "exec"), namespace)
    except Exception:
        return traceback.format_exc()
    return ""


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_block_says_what_it_is_and_no_other_kind_goes_unrun():
    for page in PAGES:
        text = page.read_text()
        languages = {match[1] for match in BLOCK.finditer(text)}
        assert languages <= {"python", "sh", "text", *(["diff"] if page.name == "README.md" else [])}, page.name
        assert len(re.findall("^ *```", text, re.MULTILINE)) == 2 * len(BLOCK.findall(text)), page.name


def test_pages_whose_python_is_run_are_these_at_least():
    assert {"README.md", "docs/guide.md", "docs/joint.md", MIGRATION, API} <= set(pages_with("python"))


@pytest.mark.parametrize("page", [page for page in pages_with("python") if page != API])
# torch.compile looks at .grad of whatever a graph receives, and hides the warning for that where it is no error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    if page == MIGRATION:
        pytest.importorskip("torchdeq")
        pytest.importorskip("scipy")
    namespace: dict = {"__name__": "documentation"}
    for line, source in blocks(page, "python"):
        wrong = wrong_with(source, namespace, page, line)
        assert not wrong, wrong


@pytest.mark.parametrize(("line", "source"), blocks(API, "python"))
def test_examples_of_docstrings_run(line, source):
    width = re.search(r"Linear\((\d+)", source)
    namespace: dict = {"__name__": "documentation", "N": int(width[1]) if width else 8}
    exec(GIVEN, namespace)
    wrong = wrong_with(source, namespace, API, line)
    assert not wrong, wrong


def test_a_block_that_fails_is_told_of_with_its_line():
    assert wrong_with("x = 1\nassert x == 1", {}, API, 7) == ""
    told = wrong_with("x = 1\nassert x == 2", {}, API, 7)
    assert "AssertionError" in told and "line 8" in told


@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands_name_targets_modules_and_files_that_exist(page):
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for _, source in blocks(page, "sh"):
        lines = source.replace("\\\n", " ").replace(" && ", "\n").splitlines()
        for line in lines:
            words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
            if not words:
                continue
            assert words[0] in ("make", "pip", "python", "torchrun", "sbatch", "docker"), line
            if words[0] == "make":
                assert set(words[1:]) <= targets, line
            if words[0] in ("torchrun", "sbatch"):
                assert (ROOT / next(word for word in words if word.endswith((".py", ".sbatch")))).exists(), line
            if words[:2] == ["docker", "build"]:
                assert (ROOT / words[words.index("-f") + 1]).exists(), line
            if words[0] == "python":
                where = words[2].replace(".", "/") if words[1] == "-m" else words[1]
                known = words[1:3] == ["-m", "http.server"]  # Python's own
                assert known or (ROOT / where).exists() or (ROOT / f"{where}.py").exists(), line


def test_commands_of_the_migration_page_run(tmp_path):
    pytest.importorskip("torchdeq")
    assert {match[1] for match in BLOCK.finditer((ROOT / MIGRATION).read_text())} == {"python", "sh"}
    for _, source in blocks(MIGRATION, "python"):
        if source.startswith("# my_model.py"):
            (tmp_path / "my_model.py").write_text(source)
    commands = [line.split() for _, source in blocks(MIGRATION, "sh") for line in source.splitlines()]
    assert len(commands) == 2
    for command in commands:
        assert command.pop(0) == "python"
        command = [sys.executable, *command, "--rounds", "3", "--seconds", "0"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
        assert done.returncode == 0, done.stderr
        assert re.search("^(use|keep) ", done.stdout, re.MULTILINE), done.stdout
    assert (tmp_path / "comparison.png").stat().st_size


def test_migration_page_names_options_that_exist():
    """Of every call in a table: ``dq.name(option=...)``."""
    text = (ROOT / MIGRATION).read_text()
    calls = re.findall(r"dq\.((?:\w+\.)*\w+)\(([^()`]*)\)", "\n".join(re.findall(r"`[^`\n]+`", text)))
    assert len(calls) > 30
    for name, arguments in calls:
        if name.startswith("compat.torchdeq") and not hasattr(deqfast.compat, "torchdeq"):
            continue
        known = inspect.signature(functools.reduce(getattr, name.split("."), deqfast)).parameters
        for option in re.findall(r"(\w+)=", arguments):
            taken = known if name != "root" else inspect.signature(deqfast.fixed_point).parameters
            assert option in taken, (name, option)


def environment() -> dict[str, str]:
    """Of a process that starts elsewhere: this package comes first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_readme_swap_gives_the_same_fixed_point():
    ((line, diff),) = blocks("README.md", "diff")
    new: dict[str, Any] = {}
    old: dict[str, Any] = {}
    for namespace, sign in ((new, "+"), (old, "-")):
        source = "\n".join(row[1:] for row in diff.splitlines() if row[:1] in (sign, " "))
        exec(SWAP, namespace)
        if sign == "-":
            pytest.importorskip("torchdeq")
        wrong = wrong_with(source, namespace, "README.md", line)
        assert not wrong, wrong
    assert (new["z"] - old["z"]).abs().max() < 1e-2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"`((?:deqfast|csrc|kernels|tests|docs|examples|bench)/[\w./]+\.\w+)`", text):
        assert (ROOT / target).exists(), target


def test_api_reference_is_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "docs" / "make_api.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_api_reference_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    assert not [name for name in deqfast.__all__ if not re.search(rf"^### (dq\.)?{name}$", text, re.MULTILINE)]


def test_readme_figures_come_from_result_files(tmp_path):
    demo = {
        "date": "2001-02-03",
        "options": {"epochs": "30"},
        "machine": {"processor": "a processor", "threads": 2, "python": "3.11"},
        "versions": {"torch": "2", "torchdeq": None},
        "runs": [run("deqfast", 1.0), run("torchdeq Anderson", 3.25)],
    }
    (tmp_path / "digits.json").write_text(json.dumps(demo))
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    arguments = ["--results", str(tmp_path), "--demo", str(tmp_path / "digits.json"), "--readme", str(readme)]
    make_readme = script("make_readme")
    make_readme.main(arguments)
    once = readme.read_text()
    assert "| torchdeq Anderson | 97.0 % | 12.0 + 9.0 | 0.600 | 3.25x | 3e-04 / 4e-04 |" in once
    assert (
        "`python examples/digits.py --epochs 30` on a processor (2 torch threads), 2001-02-03; python 3.11, torch 2."
        in once
    )
    make_readme.main(arguments)
    assert readme.read_text() == once


def run(name: str, ratio: float) -> dict:
    times = {part: [0.1, 0.2, 0.3] for part in ("forward_s", "backward_s", "rest_s")}
    counts = {"calls": [12.0], "vjps": [9.0], "accuracy": [0.5, 0.97]}
    residuals = {"forward_residual": {"worst": 3e-4}, "backward_residual": {"worst": 4e-4}}
    return {"name": name, "rtol": 1e-4, "ratio_to_deqfast": ratio, **times, **counts, **residuals}


def test_readme_keeps_its_text_where_nothing_was_measured(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("untouched")
    arguments = ["--results", str(tmp_path), "--demo", str(tmp_path / "none.json"), "--readme", str(readme)]
    with pytest.raises(SystemExit, match="nothing measured"):
        script("make_readme").main(arguments)
    assert readme.read_text() == "untouched"


def test_cell_that_would_end_early_is_refused():
    with pytest.raises(ValueError, match=r"no \|, which ends it, got '\|x\|'"):
        script("measured_page").table(["a", "b"], [["1", "|x|"]])
