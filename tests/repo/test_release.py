"""A release is what its workflow says: targets that exist, a changelog that names it, an index that pip can read."""

import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RELEASE = ROOT / ".github" / "workflows" / "release.yml"
TARGETS = set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def jobs(workflow: Path) -> dict:
    return yaml.safe_load(workflow.read_text())["jobs"]


def values(job: dict, name: str) -> list[str]:
    return job.get("strategy", {}).get("matrix", {}).get(name, [])


def made(job: dict) -> set[str]:
    """The make targets of a job's steps, with its matrix filled in."""
    found = set()
    for step in job["steps"]:
        for target in re.findall(r"\bmake (\S+|\$\{\{.*?\}\})", step.get("run", "")):
            filled = re.match(r"\$\{\{ *matrix\.(\w+)", step["run"].partition("make ")[2])
            found |= set(values(job, filled[1])) if filled else {target}
    return found


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_parse_and_run_targets_that_exist(workflow):
    assert jobs(workflow)
    targets = set().union(*(made(job) for job in jobs(workflow).values()))
    assert targets
    assert targets <= TARGETS, targets - TARGETS


def test_targets_that_a_matrix_names_are_seen():
    job = {"strategy": {"matrix": {"target": ["a", "b"]}}, "steps": [{"run": "make ${{ matrix.target }}"}]}
    assert made(job) == {"a", "b"}
    assert made({"steps": [{"run": "make wheel VERSION=1"}, {"uses": "x"}]}) == {"wheel"}


def test_release_runs_every_step_that_a_hand_would():
    assert set().union(*map(made, jobs(RELEASE).values())) == {"check-release", "sdist", "wheels", "try-wheel", "index"}


def test_jobs_of_the_release_need_jobs_that_exist_and_none_publishes_what_was_not_tried():
    found = jobs(RELEASE)
    for job in found.values():
        assert job["timeout-minutes"]
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(found)
    assert {"sdist", "wheels", "try"} <= set(found["publish"]["needs"])
    assert found["wheels"]["needs"] == found["sdist"]["needs"] == "changelog"


def test_only_publishing_may_write_and_it_attests_first_and_stores_no_token():
    workflow = yaml.safe_load(RELEASE.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert [name for name, job in workflow["jobs"].items() if "permissions" in job] == ["publish"]
    job = workflow["jobs"]["publish"]
    assert job["permissions"] == {"contents": "read", "id-token": "write", "attestations": "write"}
    assert "tag" in job["if"]
    used = [step["uses"].partition("@")[0] for step in job["steps"]]
    assert used[-2:] == ["actions/attest-build-provenance", "pypa/gh-action-pypi-publish"]
    assert "secrets." not in RELEASE.read_text()


def test_flavours_for_an_index_of_ones_own_are_not_published():
    found = jobs(RELEASE)
    (pattern,) = (step["with"]["pattern"] for step in found["publish"]["steps"] if "download" in step["uses"])
    uploads = [step["with"]["name"] for step in found["wheels"]["steps"] if "upload" in step.get("uses", "")]
    assert pattern == "release-*"
    assert uploads[0].startswith("${{ matrix.flavour }}-")
    others = set(values(found["wheels"], "flavour")) - {"release"}
    assert others and not [name for name in others if name.startswith("release-")]


def test_wheels_are_built_for_every_python_that_the_package_takes():
    config = project()["tool"]["cibuildwheel"]
    named = [name.partition("-")[0] for name in config["build"]]
    assert named == ["cp310", "cp311", "cp312", "cp313", "cp314", "cp314t"]
    assert values(jobs(RELEASE)["wheels"], "python") == named
    assert project()["project"]["requires-python"] == ">=3.10"
    assert config["linux"]["manylinux-x86_64-image"] == config["linux"]["manylinux-aarch64-image"] == "manylinux_2_28"


def test_wheels_leave_the_same_library_to_torch_in_every_way_of_making_them():
    wheel = script("wheel")
    assert f"--exclude {wheel.FROM_TORCH} " in project()["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    torch = pytest.importorskip("torch")
    if sys.platform == "linux":
        assert (Path(torch.__file__).parent / "lib" / wheel.FROM_TORCH).exists()


CHANGELOG = """# Changelog

## [Unreleased]
{unreleased}
## [0.2.0] - 2001-02-03

### Added

- A thing.

## [0.1.0] - 2001-01-01

- The first.

[0.2.0]: https://example.org
"""


def check(tmp_path, *arguments, version="0.2.0", unreleased="") -> None:
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG.format(unreleased=unreleased))
    (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "x"\nversion = "{version}"\n')
    files = ["--changelog", str(tmp_path / "CHANGELOG.md"), "--project", str(tmp_path / "pyproject.toml")]
    script("changelog").main([*arguments, *files])


@pytest.mark.parametrize("arguments", [[], ["0.2.0"], ["v0.2.0"]])
def test_a_version_with_its_section_passes_and_its_notes_are_printed(tmp_path, capsys, arguments):
    check(tmp_path, *arguments)
    assert capsys.readouterr().out == "### Added\n\n- A thing.\n"


def test_the_last_section_ends_where_links_begin(tmp_path, capsys):
    check(tmp_path, version="0.1.0")
    assert capsys.readouterr().out == "- The first.\n"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {"version": "0.3.0"}, r"expected one section '## \[0.3.0\] - YYYY-MM-DD', found 0"),
        ([], {"version": "0.2"}, "found 0"),
        (["v0.3.0"], {}, "expected version 0.3.0, that of the release, got 0.2.0"),
        ([], {"unreleased": "\n- Forgotten.\n"}, r"1 entries stand under \[Unreleased\]: expected under \[0.2.0\]"),
    ],
)
def test_a_release_that_the_changelog_does_not_name_fails(tmp_path, arguments, options, message):
    with pytest.raises(SystemExit, match=message):
        check(tmp_path, *arguments, **options)


def test_a_section_that_says_nothing_is_none():
    with pytest.raises(SystemExit, match=r"section of 0\.2\.0 says nothing"):
        script("changelog").section("## [0.2.0] - 2001-02-03\n\n### Added\n\n## [0.1.0] - 2001-01-01\n- x\n", "0.2.0")


def fake_wheel(folder: Path, version: str, requires: str = ">=3.10") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"Some_Name-{version}-py3-none-any.whl"
    info = f"Some_Name-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_name.py", f"version = {version!r}\n")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: Some_Name\nVersion: {version}\nRequires-Python: {requires}\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"some_name.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def install(index: Path, requirement: str, site: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--no-deps"]
    command += ["--no-cache-dir", "--index-url", index.as_uri(), "--target", str(site), requirement]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(command, env={**environment, "PIP_CONFIG_FILE": os.devnull}, text=True, capture_output=True)


def test_pip_installs_from_the_index_and_a_flavour_comes_before_the_release(tmp_path):
    for version in ("0.1.0", "0.1.0+cu128", "0.0.9"):
        fake_wheel(tmp_path / "wheels", version)
    script("index").main(["--wheels", str(tmp_path / "wheels"), "--out", str(tmp_path / "simple")])
    for requirement, version in (("some-name", "0.1.0+cu128"), ("some.name==0.0.9", "0.0.9")):
        site = tmp_path / version
        done = install(tmp_path / "simple", requirement, site)
        assert done.returncode == 0, done.stderr
        assert (site / "some_name.py").read_text() == f"version = {version!r}\n"


def test_pip_refuses_a_wheel_of_the_index_that_was_changed(tmp_path):
    fake_wheel(tmp_path / "wheels", "0.1.0")
    script("index").main(["--wheels", str(tmp_path / "wheels"), "--out", str(tmp_path / "simple")])
    (wheel,) = (tmp_path / "simple" / "some-name").glob("*.whl")
    wheel.write_bytes(fake_wheel(tmp_path / "other", "0.1.0", requires=">=3").read_bytes())
    done = install(tmp_path / "simple", "some-name", tmp_path / "site")
    assert done.returncode
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr


def test_index_is_that_of_pep_503(tmp_path):
    wheel = fake_wheel(tmp_path / "wheels", "0.1.0+cu128", requires=">=3.10,<4")
    script("index").main(["--wheels", str(tmp_path / "wheels"), "--out", str(tmp_path / "simple")])
    assert '<a href="some-name/">some-name</a>' in (tmp_path / "simple" / "index.html").read_text()
    page = (tmp_path / "simple" / "some-name" / "index.html").read_text()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert f'href="Some_Name-0.1.0%2Bcu128-py3-none-any.whl#sha256={digest}"' in page  # a plus in an address is a space
    assert 'data-requires-python="&gt;=3.10,&lt;4"' in page


def test_an_index_of_nothing_or_of_what_is_no_wheel_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected wheels, found none"):
        script("index").main(["--wheels", str(tmp_path)])
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as archive:
        archive.writestr("a.py", "")
    with pytest.raises(SystemExit, match=r"expected one \.dist-info/METADATA, got \[\]"):
        script("index").main(["--wheels", str(tmp_path), "--out", str(tmp_path / "simple")])


def archive_of(names: list[str], mtime: int, owner: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname, member.uid = 1, mtime, owner, mtime
            member.mode = 0o775 if name.endswith("run") else 0o664
            archive.addfile(member, io.BytesIO(b"x"))
    return packed.getvalue()


def test_source_archives_of_the_same_files_are_the_same():
    wheel = script("wheel")
    once = wheel.repacked(archive_of(["p/a", "p/run"], 100, "one"), 1000)
    assert once == wheel.repacked(archive_of(["p/run", "p/a"], 200, "other"), 1000)
    assert once != wheel.repacked(archive_of(["p/a", "p/b"], 100, "one"), 1000)
    with tarfile.open(fileobj=io.BytesIO(once)) as archive:
        assert [(m.name, m.mode, m.mtime) for m in archive] == [("p/a", 0o644, 1000), ("p/run", 0o755, 1000)]


def test_time_of_a_build_is_given_or_that_of_the_sources(tmp_path):
    wheel = script("wheel")
    assert wheel.epoch({"SOURCE_DATE_EPOCH": "123"}) == 123
    (tmp_path / "CHANGELOG.md").write_text("")
    os.utime(tmp_path / "CHANGELOG.md", (456, 456))
    assert wheel.epoch({}, tmp_path) == 456


def test_a_wheel_over_the_limit_is_refused(tmp_path):
    wheel = script("wheel")
    path = fake_wheel(tmp_path, "0.1.0")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in wheel.facts(path, wheel.LIMIT_MB)
    with pytest.raises(SystemExit, match=r"expected at most 0\.0001 MB"):
        wheel.facts(path, 1e-4)
