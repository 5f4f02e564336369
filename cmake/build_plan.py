"""What an install compiles, and why: setup.py says it first, cuda.cmake asks for it where ``DEQFAST_CUDA`` is "auto".

Standard library only, and nothing of deqfast: it runs in the isolated environment of a build, where the torch that the
package will meet cannot be imported. It is looked for on disk and read, never run.
"""

from __future__ import annotations

import ast
import itertools
import os
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

CHOICES = ("auto", "on", "off", "emulate")


class Torch(NamedTuple):
    """An installed torch, by its version.py: the CUDA that it was built for, None for a CPU or ROCm build."""

    version: str
    cuda: str | None
    folder: Path


class Decision(NamedTuple):
    """Whether the CUDA kernels are compiled, and why."""

    compiled: bool
    why: str


def package_folders(environment: Mapping[str, str]) -> list[Path]:
    """Where the target's torch may lie, nearest first.

    Without isolation it can be imported. pip's isolated builds run the target's own Python, whose folders still say
    where it is though nothing is imported from there. Other front ends make a new environment; the active one is named
    by ``VIRTUAL_ENV`` or ``CONDA_PREFIX``, and the last guess is the Python that environments are made from.
    """
    here = [Path(entry) for entry in sys.path if entry]
    own = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    own += [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    prefixes = [environment.get("VIRTUAL_ENV"), environment.get("CONDA_PREFIX"), sys.base_prefix]
    others = [sorted(Path(prefix).glob("lib*/python3*/*-packages")) for prefix in prefixes if prefix]
    return list(dict.fromkeys([*here, *map(Path, own), *itertools.chain(*others)]))


def find_torch(folders: Iterable[Path]) -> Torch | None:
    """The first torch in ``folders``; a folder whose torch does not say its version is passed over."""
    for folder in folders:
        try:
            tree = ast.parse((folder / "torch" / "version.py").read_text())
        except (OSError, SyntaxError, ValueError):
            continue
        values: dict[str, Any] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                values |= {target.id: node.value.value for target in targets if isinstance(target, ast.Name)}
        if isinstance(values.get("__version__"), str):
            return Torch(values["__version__"], values.get("cuda"), folder / "torch")
    return None


def has_driver(root: Path = Path("/")) -> bool:
    """Whether NVIDIA's driver is here: its tool, its device, its module, or the device that Windows lends to Linux."""
    signs = ("dev/nvidiactl", "dev/dxg", "proc/driver/nvidia/version")
    return shutil.which("nvidia-smi") is not None or any((root / sign).exists() for sign in signs)


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """Where CMake will look for nvcc too."""
    toolkit = environment.get("CUDA_PATH")
    inside = os.path.join(toolkit, "bin") if toolkit else None
    return environment.get("CUDACXX") or shutil.which("nvcc") or (shutil.which("nvcc", path=inside) if inside else None)


def cuda_decision(choice: str, nvcc: bool, torch: Torch | None, driver: bool) -> Decision:
    """What ``DEQFAST_CUDA=choice`` means here; ``ValueError`` for any other than the four."""
    if choice not in CHOICES:
        raise ValueError(f"DEQFAST_CUDA must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice != "auto":
        return Decision(choice == "on", f"DEQFAST_CUDA={choice}")
    if not nvcc:
        return Decision(False, "no nvcc was found")
    if torch is not None:
        what = f"torch {torch.version} in {torch.folder.parent}"
        if torch.cuda is None:
            return Decision(False, f"{what} has no CUDA")
        return Decision(True, f"{what} has CUDA {torch.cuda}")
    if driver:
        return Decision(True, "no torch was found, but NVIDIA's driver")
    return Decision(False, "neither torch nor NVIDIA's driver was found")


def said(environment: Mapping[str, str], decision: Decision) -> list[str]:
    """The first lines of an install's build: what takes the time, and how to have it otherwise."""
    lines = ["deqfast: compiling the CPU kernels, minutes on two cores; DEQFAST_SKIP_BUILD=1 compiles nothing"]
    if "DEQFAST_CUDA" in environment.get("CMAKE_ARGS", ""):
        return [*lines, "deqfast: CUDA kernels as CMAKE_ARGS says"]
    if decision.compiled:
        what = f"deqfast: compiling the CUDA kernels, 7 to 15 minutes of one core: {decision.why}"
        return [*lines, what, "deqfast: DEQFAST_CUDA=off leaves them out, DEQFAST_CUDA_ARCHS=90-real compiles fewer"]
    if decision.why == "DEQFAST_CUDA=emulate":
        return [*lines, f"deqfast: compiling the CUDA kernels for CPU tensors, as tests want them ({decision.why})"]
    how = "" if "=" in decision.why else "; DEQFAST_CUDA=on compiles them"
    return [*lines, f"deqfast: no CUDA kernels: {decision.why}{how}"]


def here(environment: Mapping[str, str], choice: str, nvcc: bool) -> Decision:
    """The decision on this machine, for the environment that a build was started from."""
    torch = find_torch(package_folders(environment)) if choice == "auto" else None
    return cuda_decision(choice, nvcc, torch, has_driver())


def announce(environment: Mapping[str, str] = os.environ) -> None:
    """Print what a build that begins will compile. pip shows it with ``-v``, or when the build fails."""
    try:
        decision = here(environment, environment.get("DEQFAST_CUDA", "auto"), find_nvcc(environment) is not None)
    except ValueError as error:
        raise SystemExit(f"deqfast: {error}") from None
    print("\n".join(said(environment, decision)), flush=True)


if __name__ == "__main__":  # for CMake, which has found nvcc
    answer = here(os.environ, "auto", nvcc=True)
    print("on" if answer.compiled else "off", answer.why, sep="\n")
