"""Fills the measured tables into docs/joint.md: ``python docs/make_joint.py``.

Takes out/joint_*.json (``make examples``), and copies their pictures to docs/img/. An example that has not been run, or
only with ``--quick``, leaves its part of the page as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import measured_page as measured

ROOT = measured.ROOT
NAMES = ("joint_generation", "joint_inverse", "joint_adversarial", "joint_metalearning")
SILENT = ("quick", "device", "threads")  # options that the command need not show


def block(record: Mapping[str, Any], picture: str | None) -> str:
    """What one example measured: table, notes, targets, picture, and where it comes from."""
    parts = [measured.table(record["header"], record["rows"])]
    parts.append(measured.notes(record))
    parts.append(measured.targets(record))
    if picture:
        parts.append(f"![{record['title']}]({picture})")
    parts.append(measured.provenance(record, f"examples/{record['name']}.py", SILENT))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite docs/joint.md with whatever has been measured."""
    parser = argparse.ArgumentParser(prog="python docs/make_joint.py", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--results", type=Path, default=ROOT / "out")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "joint.md")
    options = parser.parse_args(arguments)
    text, done = options.page.read_text(), []
    for name in NAMES:
        path = options.results / f"{name}.json"
        if not path.is_file():
            continue
        record = json.loads(path.read_text())
        if record["quick"]:
            print(f"left out: {path} comes from a quick trial")
            continue
        target = options.page.parent / "img" / f"{name}.png"
        if record["picture"]:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(options.results / record["picture"], target)
        text = measured.fill(
            text, name, block(record, f"img/{name}.png" if target.is_file() else None), options.page.name
        )
        done.append(name)
    if not done:
        raise SystemExit(f"nothing measured: no full run of an example in {options.results}")
    options.page.write_text(text)
    print(f"filled {', '.join(done)} into {options.page.name}")


if __name__ == "__main__":
    main()
