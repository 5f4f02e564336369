"""`python -m bench.gpu.call --out FOLDER --plan FILE`: runs a plan of parts, stage after stage, and always sums up."""

from __future__ import annotations

import time

START = time.monotonic()

import argparse  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from pathlib import Path  # noqa: E402

from bench.gpu.call.plan import fatal, stages  # noqa: E402
from bench.gpu.call.process import Children, Part, run  # noqa: E402
from bench.gpu.call.record import Record  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


class Stopped(Exception):
    """SIGTERM or SIGINT."""


def stop(number: int, frame: object) -> None:
    raise Stopped(signal.Signals(number).name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.call", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mode", choices=("first", "sanitize"), default="first")
    parser.add_argument("--plan", type=Path, help="stages as JSON: lists of the fields of a part")
    parser.add_argument("--limit", type=float, default=590.0, help="seconds for everything")
    options = parser.parse_args()
    record, children, state = Record(options.out, START), Children(), "ended"
    if options.plan:
        plan = [[Part(**part) for part in stage] for stage in json.loads(options.plan.read_text())]
    elif why := fatal():
        record.add("facts", "torch and GPU", "failed", why=why)
        record.save("nothing can run here")
        return 1
    else:
        plan = stages(ROOT, options.mode)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    ended: dict[str, str] = {}

    def take(part: Part) -> None:
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
