"""Everything that wants a GPU, in one go of ten minutes: `make gpu`, `python .ci/gpu.py --out FOLDER`.

Parts run stage after stage, the most telling first, and each has a time limit; one that fails does not stop the others.
Results are written as they come, into FOLDER (by default below bench/results): summary.md, results.jsonl, gpu.json, and
one archive of them. Whatever happens, the summary is written. Needs no network, no pip and no make.
"""

from __future__ import annotations

import time

START = time.monotonic()  # of this process, or of the one that became it

import argparse  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from dataclasses import replace  # noqa: E402
from datetime import datetime, timezone  # noqa: E402
from pathlib import Path  # noqa: E402

from bench.gpu.call.plan import MODES, fatal, stages  # noqa: E402
from bench.gpu.call.process import Children, Part, run  # noqa: E402
from bench.gpu.call.record import Record  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


class Stopped(Exception):
    """SIGTERM or SIGINT."""


def stop(number: int, frame: object) -> None:
    raise Stopped(signal.Signals(number).name)


def planned(options: argparse.Namespace, parser: argparse.ArgumentParser, record: Record) -> list[list[Part]] | None:
    """What is to be run; None, and said, where nothing can be."""
    if options.plan:
        plan = [[Part(**part) for part in stage] for stage in json.loads(options.plan.read_text())]
    elif why := fatal():
        record.add("facts", "torch and GPU", "failed", why=why)
        record.save("nothing can run here")
        return None
    else:
        plan = stages(ROOT, options.out.resolve(), options.mode)
    if options.parts is None:
        return plan
    wanted, names = options.parts.split(","), [part.name for stage in plan for part in stage]
    if unknown := [name for name in wanted if name not in names]:
        record.save("nothing was run")
        parser.error(f"--parts: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    return [[replace(part, needs=None) for part in stage if part.name in wanted] for stage in plan]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.call", description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for results")
    parser.add_argument("--mode", choices=MODES, default="first", help="sanitize: on a tree that a first call built")
    parser.add_argument("--parts", help="these alone, separated by commas; what they need must be there already")
    parser.add_argument("--plan", type=Path, help="stages as JSON: lists of the fields of a part")
    parser.add_argument("--limit", type=float, default=590.0, help="seconds for everything")
    options = parser.parse_args()
    if options.out is None:
        options.out = ROOT / "bench" / "results" / f"{datetime.now(timezone.utc):%Y-%m-%d}-gpu"
    record, children, state = Record(options.out, START), Children(), "ended"
    plan = planned(options, parser, record)
    if plan is None:
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    ended: dict[str, str] = {}

    def take(part: Part) -> None:
        if part.needs is not None and ended.get(part.needs) != "ok":
            ended[part.name] = "left out"
            record.add(part.name, "all of it", "left out", why=f"{part.needs}: {ended.get(part.needs, 'not run')}")
            record.part(part.name, "left out", 0.0)
            return
        ended[part.name] = "failed"
        try:
            ended[part.name] = run(part, record, children, ROOT, START + options.limit - 5)
        except Exception as error:
            record.add(part.name, "runner", "failed", why=f"{type(error).__name__}: {error}")

    try:
        for stage in plan:
            threads = [threading.Thread(target=take, args=(part,), daemon=True) for part in stage]
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
    except Stopped as error:
        state = f"stopped by {error}"
    finally:
        children.stop()
        record.save(state)
    return 0 if state == "ended" and set(ended.values()) <= {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
