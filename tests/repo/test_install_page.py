"""The table of docs/install.md is what was measured, and says of each target whether it was met."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("make_install", ROOT / "docs" / "make_install.py")
make_install = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_install)
ROW = {"seconds": 120.0, "processor_s": 180.0, "busy_elsewhere": 0.1}
META = {"command": "python -m bench.install", "device": "a processor", "cores": 2, "date": "2001-02-03 04:05 UTC"}


def record(*, size: int = 2_000_000, seconds: float = 120.0, own: float = 0.05, same: bool = True) -> dict:
    row = {**ROW, "seconds": seconds}
    wheel = {**row, "bytes": size, "module_bytes": 5_000_000, "sha256": ["a" * 64, "b" * 64], "same": same}
    return {
        "meta": {**META, "versions": {"python": "3.11", "torch": "2"}},
        "sdist_bytes": 1_500_000,
        "wheels": {"CPU kernels": wheel},
        "installs": {"no torch": row},
        "imports": {"processes": 11, "torch_s": 1.25, "deqfast_s": own, "collector_s": 0.03, "busy_elsewhere": 0.0},
    }


def test_table_says_what_was_met_and_where_it_comes_from():
    text = make_install.block(record())
    assert "| wheel, CPU kernels | 2.00 MB; module 5.00 MB unpacked | under 20 MB: met |" in text
    assert "2.0 min (3.0 of the processor, others kept 0.1 cores busy) | under 3 min: met |" in text
    assert "| the same file, made twice | yes, aaaaaaaaaaaaaaaa... | yes |" in text
    assert (
        "0.050 s after torch's 1.25 s, 0.030 s of it Python's collector on torch's objects | under 0.1 s: met |" in text
    )
    assert "`python -m bench.install` on a processor (2 cores), 2001-02-03 04:05 UTC; python 3.11, torch 2." in text
    assert text.endswith("The wheel with CUDA kernels was not made in this run.")


@pytest.mark.parametrize(
    ("options", "missed"),
    [({"size": 21_000_000}, 1), ({"seconds": 200.0}, 1), ({"seconds": 400.0}, 2), ({"own": 0.11}, 1)],
)
def test_a_missed_target_is_said_to_be(options, missed):
    assert make_install.block(record(**options)).count("**missed**") == missed
    assert make_install.block(record(same=False)).count("**no**") == 1


def test_no_time_is_judged_that_others_had_a_part_in():
    found = record(seconds=4000.0, own=0.5)
    for row in (found["wheels"]["CPU kernels"], found["installs"]["no torch"], found["imports"]):
        row["busy_elsewhere"] = 0.5
    text = make_install.block(found)
    assert "missed" not in text
    assert "under 3 min: not told, the machine was not free; 1.5 if shared by two cores |" in text
    assert text.count("not told") == 3


def test_page_is_filled_from_the_newest_results_and_the_rest_stays(tmp_path):
    page = tmp_path / "install.md"
    page.write_text("before\n<!-- install:begin -->\nold\n<!-- install:end -->\nafter\n")
    arguments = ["--results", str(tmp_path), "--page", str(page)]
    with pytest.raises(SystemExit, match="nothing measured"):
        make_install.main(arguments)
    (tmp_path / "2001-01-01-install.json").write_text(json.dumps(record(own=0.07)))
    (tmp_path / "2001-02-03-install.json").write_text(json.dumps(record()))
    for _ in range(2):
        make_install.main(arguments)
    text = page.read_text()
    assert text.startswith("before\n<!-- install:begin -->\n|") and text.endswith("<!-- install:end -->\nafter\n")
    assert "0.050 s" in text and "0.070 s" not in text and "old" not in text


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(SystemExit, match=r"install\.md: expected"):
        make_install.filled("no marks", "body")


def test_page_names_every_variable_that_a_build_or_a_run_reads():
    page = (ROOT / "docs" / "install.md").read_text()
    read = set()
    for name in ("CMakeLists.txt", "setup.py", *(str(path) for path in (ROOT / "cmake").iterdir() if path.is_file())):
        text = (ROOT / name).read_text()
        read |= set(re.findall(r"ENV\{(\w+)\}", text)) | set(re.findall(r"environ(?:ment)?\.get\(\"(\w+)\"", text))
    for path in [*(ROOT / "deqfast").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]:
        read |= set(re.findall(r"(?:environ(?:\.get)?[\[(]|getenv\()\"(DEQFAST_\w+)\"", path.read_text()))
    assert {"DEQFAST_CUDA", "DEQFAST_SKIP_BUILD", "DEQFAST_CPU_ISA", "DEQFAST_BACKEND", "CUDACXX"} <= read
    assert not [name for name in sorted(read) if f"`{name}" not in page]
