"""Fills the measured tables into docs/federated.md: ``python docs/make_federated.py``.

Takes out/federated.json (``make federated``), and copies its picture to docs/img/. A run with ``--quick`` is left out.
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
SILENT = ("quick", "device")  # options that the command need not show
BEGIN, END = "<!-- federated:begin -->", "<!-- federated:end -->"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def block(record: Mapping[str, Any], picture: str | None) -> str:
    """Targets, tables, notes, picture, and where it all comes from."""
    targets = [[t["what"], t["target"], t["measured"], "met" if t["met"] else "**missed**"] for t in record["targets"]]
    parts = [f"![{record['title']}]({picture})"] if picture else []
    parts.append(table(["target", "asked", "measured", ""], targets))
    parts.append(table(record["tables"]["fused"]["header"], record["tables"]["fused"]["rows"]))
    parts.append("\n".join(f"- {note}" for note in record["notes"]))
    parts.append("One client's training, an epoch each in turns, to the same tolerance or until the budget is used up:")
    parts.append(table(record["tables"]["timed"]["header"], record["tables"]["timed"]["rows"]))
    parts.append(provenance(record))
    return "\n\n".join(parts)


def provenance(record: Mapping[str, Any]) -> str:
    """Command, device, versions, date."""
    machine, options = record["machine"], record["options"]
    given = " ".join(f"--{key} {value}" for key, value in options.items() if key not in SILENT)
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    threads = f"{machine['threads']} torch thread" + ("s" if machine["threads"] != 1 else "")
    packages = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    return (
        f"`python examples/federated/run.py {given}` on {device} ({threads}), {record['date']}, "
        f"{record['seconds']:.0f} s in all; python {machine['python']}, {packages}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite docs/federated.md with what has been measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--results", type=Path, default=ROOT / "out" / "federated.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "federated.md")
    options = parser.parse_args(arguments)
    record = json.loads(options.results.read_text()) if options.results.is_file() else {"quick": True}
    if record["quick"]:
        raise SystemExit(f"nothing measured: no full run in {options.results}")
    picture = options.page.parent / "img" / "federated.png"
    if record["picture"]:
        picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(options.results.parent / record["picture"], picture)
    text = options.page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{options.page.name}: expected {BEGIN} and {END} once each")
    body = f"{BEGIN}\n{block(record, 'img/federated.png' if picture.is_file() else None)}\n{END}"
    options.page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: body, text, flags=re.DOTALL))
    print(f"filled {options.page.name} from {options.results}")


if __name__ == "__main__":
    main()
