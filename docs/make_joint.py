"""Fills the measured tables into docs/joint.md: ``python docs/make_joint.py``.

Takes out/joint_*.json (``make examples``), and copies their pictures to docs/img/. An example that has not been run, or
only with ``--quick``, leaves its part of the page as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("joint_generation", "joint_inverse", "joint_adversarial", "joint_metalearning")
SILENT = ("quick", "device", "seed", "threads")  # options that the command need not show


def fill(text: str, name: str, body: str) -> str:
    """``text`` with ``body`` between the markers of ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"the page: expected {begin} and {end} once each")
    return re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def block(record: Mapping[str, Any], picture: str | None) -> str:
    """What one example measured: table, notes, targets, picture, and where it comes from."""
    parts = [table(record["header"], record["rows"])]
    parts.append("\n".join(f"- {note}" for note in record["notes"]))
    targets = [[t["what"], t["target"], t["measured"], "met" if t["met"] else "**missed**"] for t in record["targets"]]
    parts.append(table(["target", "asked", "measured", ""], targets))
    if picture:
        parts.append(f"![{record['title']}]({picture})")
    parts.append(provenance(record))
    return "\n\n".join(parts)


def provenance(record: Mapping[str, Any]) -> str:
    """Command, device, versions, date."""
    machine, options = record["machine"], record["options"]
    given = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items() if key not in SILENT)
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    threads = f"{machine['threads']} torch thread" + ("s" if machine["threads"] != 1 else "")
    packages = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    return (
        f"`python examples/{record['name']}.py {given} --seed {options['seed']}` on {device} ({threads}), "
        f"{record['date']}, {record['seconds']:.0f} s in all; python {machine['python']}, {packages}."
    )


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
        text = fill(text, name, block(record, f"img/{name}.png" if target.is_file() else None))
        done.append(name)
    if not done:
        raise SystemExit(f"nothing measured: no full run of an example in {options.results}")
    options.page.write_text(text)
    print(f"filled {', '.join(done)} into {options.page.name}")


if __name__ == "__main__":
    main()
