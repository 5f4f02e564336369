"""The GPU benchmark: `python -m bench.gpu --out FILE.json`, under four minutes on an H200.

Sections: copy bandwidth; steps alone (bandwidth, latency, narrow histories, joint); whole solves and training steps
against rivals in turns; the loop on the device. `--quick` takes fewer rounds; `--dry` takes the same paths on CPU
tensors of a few numbers, which tests the script and measures nothing. torchdeq need not be installed:
DEQFAST_BENCH_PATH names a folder or a wheel (several, separated as in PYTHONPATH) that is put on the path; without one
its rows say so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import meta
from bench.gpu import solves, steps, training
from bench.gpu.device import Place
from bench.report.gpu import target_rows
from deqfast import ops
from deqfast.ops.native import extension as native

BUDGET = 220.0  # seconds after which no further row is begun


def backends(place: Place) -> tuple[list[str], dict[str, str]]:
    """The ones that serve the device, native first, and why others do not."""
    reasons = {name: ops.why_not(name, place.device) for name in ("native", "triton")}
    found = [name for name, why in reasons.items() if why is None]
    if not place.cuda:
        found = [*found, "reference"][:1]
    return found, {name: why for name, why in reasons.items() if why is not None}


def device_facts(place: Place) -> dict[str, Any]:
    """Names and versions of what the figures belong to."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    facts["build"] = None if native._C is None else dict(native._C.build_info())
    if place.cuda:
        properties = torch.cuda.get_device_properties(place.device)
        facts.update(name=properties.name, memory=properties.total_memory, processors=properties.multi_processor_count)
        facts["driver"] = _driver()
    else:
        facts["name"] = "CPU, a dry run"
    return facts


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def sections(place: Place, found: list[str], record: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is measured, by name, the most wanted first."""
    rounds = 3 if place.quick or not place.cuda else 9
    taken = 96 if place.cuda else 16

    def bandwidth() -> float:
        return record["copy_bytes_per_second"]

    return {
        "copy_bytes_per_second": lambda: steps.copy_bandwidth(place, 5),
        "latency": lambda: steps.measure(
            place, steps.latency_cases(place, found), bandwidth(), taken, 2 * rounds
        ),
        "bandwidth": lambda: steps.measure(
            place, steps.bandwidth_cases(place, found), bandwidth(), 8, rounds
        ),
        "histories": lambda: steps.measure(place, steps.history_cases(place, found), bandwidth(), 8, rounds),
        "joint": lambda: steps.measure(place, steps.joint_cases(place, found), bandwidth(), 8, rounds),
        "device_loop": lambda: solves.loop_on_device(place, found, rounds),
        "solves": lambda: solves.whole_solves(place, found, rounds),
        "training": lambda: training.measure(place, found, rounds),
    }  # fmt: skip


def run(place: Place, command: str) -> dict[str, Any]:
    """Every section that fits the budget; one that fails or does not fit is named, and the others go on."""
    found, missing = backends(place)
    record: dict[str, Any] = {"kind": "gpu", "dry": not place.cuda, "quick": place.quick, "without": {}}
    record.update(backends=found, missing_backends=missing, device=device_facts(place))
    bystanders, begin = meta.Bystanders(), time.monotonic()
    if not found:
        record["without"]["everything"] = "no backend but the reference serves this device"
    else:
        for name, measure in sections(place, found, record).items():
            start = time.monotonic()
            if place.late(name):
                continue
            try:
                record[name] = measure()
            except Exception as error:
                record["without"][name] = f"{type(error).__name__}: {str(error).strip()[:400]}"
            print(f"{name:24s}{record['without'].get(name, 'done')}  {time.monotonic() - start:.1f} s", flush=True)
    record["without"].update({what: "the time was up" for what in place.left_out})
    record["seconds"] = time.monotonic() - begin
    record["meta"] = meta.describe(command, bystanders)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a trial, not a measurement")
    parser.add_argument("--dry", action="store_true", help="on CPU tensors of a few numbers: tries the script only")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds after which no further row is begun")
    options = parser.parse_args(arguments)
    sys.path[1:1] = filter(None, os.environ.get("DEQFAST_BENCH_PATH", "").split(os.pathsep))
    if not options.dry and not torch.cuda.is_available():
        print("torch sees no CUDA device; --dry tries the script on the CPU", file=sys.stderr)
        return 1
    place = Place("cpu" if options.dry else "cuda", options.budget, options.quick)
    command = "python -m bench.gpu" + (" --quick" if options.quick else "") + (" --dry" if options.dry else "")
    record = run(place, command)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(f"{figure}: {value}" for figure, value in target_rows(record)))
    return 1 if record["without"] else 0
