"""What is installed, what serves which device, and why something does not: ``python -m deqfast.info``."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

import deqfast

from . import ops
from .ops.anderson import AndersonWorkspace
from .ops.broyden import BroydenWorkspace
from .ops.native import extension as native

# Each with the workspace that its step needs.
OPS = {"anderson_step": AndersonWorkspace, "broyden_step": BroydenWorkspace, "joint_step": AndersonWorkspace}
ENVIRONMENT = {
    "DEQFAST_BACKEND": 'what backend="auto" means',
    "DEQFAST_CPU_ISA": "instruction set of the CPU kernels",
    "DEQFAST_POOL_MB": "memory that waits for the next solve, MB",
}


def facts() -> dict[str, Any]:
    """Everything that ``report`` prints, as plain values."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {
        "deqfast": deqfast.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "build": None if native._C is None else dict(native._C.build_info()),
        "cpu_isa": _cpu_isa(),
        "devices": [_device(device) for device in devices],
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("DEQFAST_")},
    }


def report() -> str:
    """A page of text: versions, build, what serves each device and why the rest does not, overrides in effect."""
    found = facts()
    lines = _columns([(name, str(found[name])) for name in ("deqfast", "python", "torch", "system")])
    lines += ["", *_build_lines(found)]
    for device in found["devices"]:
        lines += ["", *_device_lines(device)]
    return "\n".join([*lines, "", *_environment_lines(found["environment"])])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print ``report()``, or with ``--json`` the same facts for a program."""
    parser = argparse.ArgumentParser(prog="python -m deqfast.info", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    print(json.dumps(facts(), indent=1) if options.json else report())


def _cpu_isa() -> str | None:
    if native._C is None:
        return None
    try:
        return str(native._C.cpu_isa())
    except ValueError as error:  # DEQFAST_CPU_ISA names none that can run
        return str(error)


def _device(device: torch.device) -> dict[str, Any]:
    try:
        auto = ops.choose("auto", device).name
    except ValueError as error:  # DEQFAST_BACKEND
        auto = f"an error: {error}"
    reasons = {backend.name: ops.why_not(backend.name, device) for backend in ops.backends()}

    def answer(backend: ops.Backend, op: str) -> str:
        return reasons[backend.name] or ("yes" if OPS[op] in backend.steps else f"it has no {op}")

    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "auto": auto,
        "ops": {op: {backend.name: answer(backend, op) for backend in ops.backends()} for op in OPS},
    }


def _build_lines(found: dict[str, Any]) -> list[str]:
    build = found["build"]
    if build is None:
        return _columns([("native", f"not built: {native._IMPORT_ERROR}"), ("threads", str(found["threads"]))])
    rows = [
        ("native", f"{build['version']}, {build['build_type']}, {build['compiler']}, pybind11 {build['pybind11']}"),
        ("CPU kernels", f"{found['cpu_isa']} (built: {', '.join(build['isas'])})"),
        ("threads", f"{found['threads']}{'' if build['openmp'] else ', not used: built without OpenMP'}"),
    ]
    return _columns(rows)


def _device_lines(device: dict[str, Any]) -> list[str]:
    name = f" ({device['name']})" if device["name"] else ""
    lines = [f'{device["device"]}{name}: backend="auto" is {device["auto"]}']
    rows = list(device["ops"].items())
    if all(row == rows[0][1] for _, row in rows):
        rows = [("every op", rows[0][1])]
    width = max(len(op) for op, _ in rows) + 2
    lines.append("  " + " " * width + "".join(f"{backend:11s}" for backend in rows[0][1]).rstrip())
    for op, row in rows:
        marks = ("yes" if why == "yes" else "no" for why in row.values())
        lines.append("  " + f"{op:{width}s}" + "".join(f"{mark:11s}" for mark in marks).rstrip())
    refusals = dict.fromkeys((backend, why) for _, row in rows for backend, why in row.items() if why != "yes")
    return lines + [f"  {backend}: no, {why}" for backend, why in refusals]


def _environment_lines(environment: dict[str, str]) -> list[str]:
    if not environment:
        return [f"environment  none of {', '.join(ENVIRONMENT)} is set"]
    rows = [(f"{name}={value}", ENVIRONMENT.get(name, "not read at run time")) for name, value in environment.items()]
    return ["environment", *("  " + line for line in _columns(rows))]


def _columns(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:{width}s}{value}" for name, value in rows]


if __name__ == "__main__":
    main()
