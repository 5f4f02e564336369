"""What the compiled CUDA kernels use and how they reach memory; asserts that none spills and that tiles move whole.

python tests/device/resources.py LOG MODULE [LOG MODULE ...] [--write PAGE]

LOG: what ptxas printed (-Xptxas=-v) while MODULE was compiled. Its machine code says how wide the accesses are: a tile
of a kernel's widest type moves 16 bytes at a time, and what is narrower as many numbers of it. ``--write`` puts the
table into a page, between its marks.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FUNCTION = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
USE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
KERNEL = re.compile(r"(\w+_kernel)(?:<(.*)>)?\(")
ACCESS = re.compile(r"^(?:@!?U?P\w+\s+)?(LDG|STG|STS|LDS|LDL|STL|LD|ST)\b(?:\.([\w.]+))?")
STATIC_SHARED = 1024  # kStaticShared of csrc/cuda/work.h
SIZE = {"double": 8, "float": 4, "Bf16": 2, "F16": 2, "signed char": 1} | {
    "unsigned long": 8, "unsigned int": 4, "unsigned short": 2,
}  # fmt: skip
MARKS = ("<!-- resources: begin -->", "<!-- resources: end -->")


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    arch: str
    stack: int = 0
    spilled: int = 0
    registers: int = 0
    shared: int = 0
    accesses: Counter[tuple[str, int]] = field(default_factory=Counter)  # instruction, bytes a thread
    family: str = ""
    types: tuple[str, ...] = ()

    def wanted(self) -> set[tuple[str, int]]:
        """The accesses that its tiles are moved with."""
        sizes = [SIZE[name] for name in self.types if name in SIZE]
        rows = {"LDG": sizes[1:], "STG": sizes[1:]}  # of the state, then of the history
        if self.family in ("sample_kernel", "reduce_kernel", "mix_kernel"):
            rows["STG"] = {"reduce_kernel": sizes[2:], "mix_kernel": sizes[1:2]}.get(self.family, sizes[1:])
        elif self.family in ("chain_kernel", "gram_reduce_kernel", "gram_apply_kernel"):
            rows = {"LDG": sizes, "STG": [] if self.family == "gram_reduce_kernel" else sizes}
            if self.family == "chain_kernel":
                rows["STS"] = sizes[:1]
        elif self.family in ("joint_factors_kernel", "joint_sample_kernel", "joint_chunk_kernel"):
            rows["STG"] = [] if self.family == "joint_factors_kernel" else sizes[1:]
        elif self.family == "joint_copy_kernel":
            rows = {"LDG": [16], "STG": [16]}
        else:
            return set()
        group = 16 // max(size for part in rows.values() for size in part)
        return {(access, min(16, group * size)) for access, part in rows.items() for size in part}


def used(log: str) -> dict[tuple[str, str], Kernel]:
    """By name and architecture, from what ptxas printed."""
    found: dict[tuple[str, str], Kernel] = {}
    kernel = None
    for line in log.splitlines():
        if entry := FUNCTION.search(line):
            kernel = found.setdefault((entry[1], entry[2]), Kernel(entry[1], entry[2]))
        elif kernel is None:
            continue
        elif use := USE.search(line):
            kernel.stack = max(kernel.stack, int(use[1]))
            kernel.spilled += int(use[2]) + int(use[3])
        elif registers := REGISTERS.search(line):
            kernel.registers = int(registers[1])
            shared = SHARED.search(line)
            kernel.shared = int(shared[1]) if shared else 0
    return found


def tool(name: str) -> str:
    """A program of the toolkit: on the PATH, beside nvcc, or among those that Triton ships."""
    places = [shutil.which(name)]
    if compiler := shutil.which("nvcc"):
        places.append(shutil.which(name, path=str(Path(compiler).resolve().parent)))
    try:
        import triton

        places.append(shutil.which(name, path=str(Path(triton.__file__).parent / "backends/nvidia/bin")))
    except ImportError:
        pass
    for place in places:
        if place is not None:
            return place
    sys.exit(f"{name} not found: it comes with the CUDA toolkit and with Triton")


def width(suffixes: str) -> int:
    """Bytes that an access moves, from what follows its name."""
    for text, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if text in suffixes.split("."):
            return size
    return 4


def accesses(lines: Iterator[str], kernels: dict[tuple[str, str], Kernel]) -> None:
    """Count the accesses of each kernel in a listing of machine code."""
    arch, kernel = next((arch for _, arch in kernels), ""), None  # a listing of one architecture does not name it
    for line in lines:
        if "arch = " in line:
            arch = line.split("=")[1].strip()
        elif "Function : " in line:
            kernel = kernels.get((line.split(":")[1].strip(), arch))
        elif kernel is not None and (found := ACCESS.search(line.partition("*/")[2].strip())):
            kernel.accesses[found[1], width(found[2] or "")] += 1


def compiled(log: Path, module: Path) -> list[Kernel]:
    """The kernels of a module."""
    kernels = used(log.read_text())
    command = [tool("cuobjdump"), "-sass", str(module)]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as listing:
        assert listing.stdout is not None
        accesses(listing.stdout, kernels)
    if listing.returncode:
        sys.exit(f"cuobjdump could not read {module}")
    return list(kernels.values())


def described(kernels: list[Kernel]) -> None:
    """Give each kernel its family and its types."""
    names = "\n".join(kernel.name for kernel in kernels)
    plain = subprocess.run(["c++filt"], input=names, text=True, capture_output=True, check=True).stdout
    for kernel, name in zip(kernels, plain.splitlines(), strict=True):
        found = KERNEL.search(name)
        kernel.family = found[1] if found else name.rpartition("::")[2].partition("(")[0]
        parts = found[2].split(",") if found and found[2] else []
        kernel.types = tuple(part.strip().removeprefix("deqfast::cuda::") for part in parts)


def faults(kernels: list[Kernel]) -> Iterator[str]:
    """What must not be."""
    for k in kernels:
        name = f"{k.family}<{', '.join(k.types)}> ({k.arch})"
        if k.spilled:
            yield f"{name}: spills {k.spilled} bytes"
        if k.shared > STATIC_SHARED:
            yield f"{name}: {k.shared} bytes of shared memory of its own, launches leave room for {STATIC_SHARED}"
        for access, size in sorted(k.wanted() - k.accesses.keys()):
            yield f"{name}: no {access} of {size} bytes"


def span(values: list[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least} to {most}"


def rows(kernels: list[Kernel]) -> Iterator[str]:
    """The table: a row for each family and architecture."""
    yield "| kernel | sm | variants | registers | shared, bytes | spilled, bytes | 16-byte loads | 16-byte stores |"
    yield "|---|---|---|---|---|---|---|---|"
    groups = defaultdict(list)
    for k in kernels:
        groups[k.family, int(k.arch.removeprefix("sm_"))].append(k)
    for (family, arch), found in sorted(groups.items()):
        wide = [span([k.accesses[access, 16] for k in found]) for access in ("LDG", "STG")]
        use = [span([getattr(k, name) for k in found]) for name in ("registers", "shared", "spilled")]
        yield f"| `{family}` | {arch} | {len(found)} | " + " | ".join([*use, *wide]) + " |"


def write(page: Path, table: list[str], compiler: str) -> None:
    """Put the table between the marks of a page."""
    before, begin, rest = page.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        sys.exit(f"{page} has no marks {MARKS}")
    said = f"Compiled, not run: nvcc {compiler}, {datetime.date.today()}, by `make check-cuda`."
    page.write_text("\n".join([before + begin, "", said, "", *table, "", end]) + after)


def main() -> int:
    """1 if anything is at fault, or there is no kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="log and module, in turns")
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    every = []
    for log, module in zip(arguments.files[::2], arguments.files[1::2], strict=True):
        every += compiled(log, module)
    described(every)
    found = list(faults(every))
    table = list(rows(every))
    print("\n".join(table + found))
    if arguments.write:
        said = subprocess.run(["nvcc", "--version"], text=True, capture_output=True, check=True).stdout
        version = re.search(r"V([\d.]+)", said)
        write(arguments.write, table, version[1] if version else "of unknown version")
    return 1 if found or not every else 0


if __name__ == "__main__":
    sys.exit(main())
