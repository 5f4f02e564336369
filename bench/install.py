"""What wheels and installs cost: ``python -m bench.install --dist .venv-dist/bin/python --out FILE``; minutes.

Each wheel is made twice, from two copies of the tree: the same input must give the same file. With ``--cuda`` both
copies lie at one place, one after the other, because what nvcc compiles carries a hash of its path.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .meta import Bystanders, describe

ROOT = Path(__file__).resolve().parents[1]
# Of Python's collector, which walks all of torch's objects when it happens to be due, the time is told apart.
IMPORT = """
import gc, time
begin = time.perf_counter()
import torch
spent, started = 0.0, 0.0
def collecting(phase, _):
    global spent, started
    started, spent = (time.perf_counter(), spent) if phase == "start" else (0, spent + time.perf_counter() - started)
gc.callbacks.append(collecting)
middle = time.perf_counter()
import deqfast
print(middle - begin, time.perf_counter() - middle, spent)
"""


def timed(command: Sequence[str | Path], cwd: Path, **environment: str) -> dict[str, Any]:
    """Seconds on the clock and of the processor that the command took, and cores that others kept busy meanwhile."""
    left_out = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "SOURCE_DATE_EPOCH")
    env = {name: value for name, value in os.environ.items() if name not in left_out} | environment
    before, others, begin = resource.getrusage(resource.RUSAGE_CHILDREN), Bystanders(), time.monotonic()
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"seconds": time.monotonic() - begin, "processor_s": processor, "busy_elsewhere": others.cores()}
    return found | {"output": done.stdout + done.stderr}


def unpacked(sdist: Path, folder: Path) -> Path:
    """A tree of the source archive's files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


def wheel_twice(dist: Path, sdist: Path, places: Sequence[Path], cuda: str) -> dict[str, Any]:
    """The cost of the first of two wheels, their size, and whether they are the same file."""
    hashes, rows, wheels = [], [], []
    for place in places:
        tree = unpacked(sdist, place)
        rows.append(timed([dist, ".ci/wheel.py"], tree, DEQFAST_CUDA=cuda, SOURCE_DATE_EPOCH="1000000000"))
        (wheel,) = (tree / "dist").glob("*.whl")
        hashes.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
        wheels.append((wheel.name, wheel.stat().st_size, largest(wheel)))
    name, size, module = wheels[0]
    return {
        **{key: rows[0][key] for key in ("seconds", "processor_s", "busy_elsewhere")},
        "file": name,
        "bytes": size,
        "module_bytes": module,
        "sha256": hashes,
        "same": len(set(hashes)) == 1,
    }


def largest(wheel: Path) -> int:
    """Bytes of the module, unpacked."""
    return max(info.file_size for info in zipfile.ZipFile(wheel).infolist())


def environment(base: Path, folder: Path, *requirements: str) -> Path:
    """A new environment's Python, with these installed."""
    subprocess.run([base, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    if requirements:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    return python


def install(python: Path, tree: Path, *options: str) -> dict[str, Any]:
    """The cost of ``pip install -v .``, and what it said first."""
    row = timed([python, "-m", "pip", "install", "-v", *options, "."], tree)
    said = [line.strip() for line in row.pop("output").splitlines() if line.strip().startswith("deqfast: ")]
    return {**row, "said": [line.replace(str(python.parents[1]), "VENV") for line in said]}


def imports(python: Path, cwd: Path, processes: int) -> dict[str, Any]:
    """Median seconds of importing torch, and then deqfast, in fresh processes, and of the collector in the latter."""
    others = Bystanders()
    pairs = [timed([python, "-c", IMPORT], cwd)["output"].split() for _ in range(processes + 1)][1:]
    torch_s, own_s, gc_s = (statistics.median(float(pair[i]) for pair in pairs) for i in range(3))
    found = {"processes": processes, "torch_s": torch_s, "deqfast_s": own_s, "collector_s": gc_s}
    return {**found, "busy_elsewhere": others.cores()}


def measure(options: argparse.Namespace, scratch: Path) -> Iterator[Mapping[str, Any]]:
    """All that has been measured so far, row after row; every environment and tree lies below ``scratch``."""
    dist, base = options.dist.absolute(), Path(sys.executable).absolute()
    timed([dist, ROOT / ".ci" / "wheel.py", "--sdist-only", "--out", scratch, "--work", scratch / "work"], scratch)
    (sdist,) = scratch.glob("*.tar.gz")
    wheels: dict[str, Any] = {}
    installs: dict[str, Any] = {}
    found = {"sdist_bytes": sdist.stat().st_size, "wheels": wheels, "installs": installs}
    wheels["CPU kernels"] = wheel_twice(dist, sdist, [scratch / "one", scratch / "two" / "deeper"], "off")
    yield found
    full = environment(base, scratch / "full", options.torch, "numpy")
    installs[f"{options.torch}, a build without CUDA"] = install(full, unpacked(sdist, scratch / "install"))
    found["imports"] = imports(full, scratch, options.processes)
    yield found
    bare = environment(base, scratch / "bare")
    installs["no torch (`--no-deps`)"] = install(bare, unpacked(sdist, scratch / "install"), "--no-deps")
    yield found
    if options.cuda:
        wheels["CPU and CUDA kernels"] = wheel_twice(dist, sdist, [scratch / "one"] * 2, "on")
        yield found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write a results file."""
    parser = argparse.ArgumentParser(prog="python -m bench.install", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--dist", type=Path, required=True, help="a Python that has what `make wheel` needs")
    parser.add_argument("--torch", default="torch==2.13.0", help="the torch beside which the package is installed")
    parser.add_argument("--cuda", action="store_true", help="the wheel with CUDA kernels too (needs nvcc)")
    parser.add_argument("--processes", type=int, default=11, help="fresh processes for the time of an import")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    command = "python -m bench.install" + (" --cuda" if options.cuda else "") + f" --torch {options.torch}"
    others = Bystanders()
    with tempfile.TemporaryDirectory() as scratch:
        for found in measure(options, Path(scratch)):
            options.out.write_text(json.dumps({"meta": describe(command, others), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
