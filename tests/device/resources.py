"""Asserts, from what ptxas printed (-Xptxas=-v) while the CUDA kernels were compiled, that none spills.

python tests/device/resources.py build/cuda/resources.txt
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

FUNCTION = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'|Function properties for (\S+)")
USE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def main(path: str) -> int:
    """Print a summary an architecture; 1 if a kernel spills or there is none."""
    kernels: dict[str, int] = defaultdict(int)
    registers: dict[str, int] = defaultdict(int)
    spilled: list[str] = []
    name, arch = "", ""
    for line in Path(path).read_text().splitlines():
        if found := FUNCTION.search(line):
            if found[2]:
                arch = found[2]
                kernels[arch] += 1
            name = found[1] or found[3]
        if (found := USE.search(line)) and (int(found[2]) or int(found[3])):
            spilled.append(f"{name} ({arch}): {found[2]} bytes spill stores, {found[3]} bytes spill loads")
        if found := REGISTERS.search(line):
            registers[arch] = max(registers[arch], int(found[1]))
    for text in spilled:
        print(text)
    for arch, count in kernels.items():
        print(f"{arch}: {count} kernels, at most {registers[arch]} registers, {len(spilled)} spill in all")
    return 1 if spilled or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
