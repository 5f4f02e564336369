"""What the scripts that fill measured pages share: tables, targets, where figures come from, and the filling."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SILENT = ("quick", "device")  # options that the command need not show


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    for cell in (cell for line in lines for cell in line):
        if "|" in cell:
            raise ValueError(f"a cell must have no |, which ends it, got {cell!r}")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of(record: Mapping[str, Any], name: str) -> str:
    """One of the record's tables."""
    found = record["tables"][name]
    return table(found["header"], found["rows"])


def targets(record: Mapping[str, Any]) -> str:
    """What was asked and what came out, missed targets in bold."""
    rows = [[t["what"], t["target"], t["measured"], "met" if t["met"] else "**missed**"] for t in record["targets"]]
    return table(["target", "asked", "measured", ""], rows)


def notes(record: Mapping[str, Any]) -> str:
    """A list."""
    return "\n".join(f"- {note}" for note in record["notes"])


def provenance(record: Mapping[str, Any], script: str, silent: Sequence[str] = SILENT) -> str:
    """Command, device, versions, date."""
    machine, options = record["machine"], record["options"]
    given = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items() if key not in silent)
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    threads = f"{machine['threads']} torch thread" + ("s" if machine["threads"] != 1 else "")
    packages = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    return (
        f"`python {script} {given}` on {device} ({threads}), {record['date']}, "
        f"{record['seconds']:.0f} s in all; python {machine['python']}, {packages}."
    )


def fill(text: str, name: str, body: str, page: str) -> str:
    """``text`` with ``body`` between the markers of ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{page}: expected {begin} and {end} once each")
    return re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n{body}\n{end}", text, flags=re.DOTALL)


def one_page(
    name: str, block: Callable[[Mapping[str, Any], str | None], str], document: str, arguments: Sequence[str] | None
) -> None:
    """Rewrite docs/``name``.md with what out/``name``.json has, and copy its picture to docs/img/.

    Args:
        name: of page, record and picture, and of the markers between which the page is filled.
        block: the text of a record and the path of a picture or None.
        document: the script's docstring.
        arguments: of the command line.

    Raises:
        SystemExit: nothing was measured in full, or the page has no markers.
    """
    parser = argparse.ArgumentParser(description=document.split(":")[0] + ".")
    parser.add_argument("--results", type=Path, default=ROOT / "out" / f"{name}.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / f"{name}.md")
    options = parser.parse_args(arguments)
    record = json.loads(options.results.read_text()) if options.results.is_file() else {"quick": True}
    if record["quick"]:
        raise SystemExit(f"nothing measured: no full run in {options.results}")
    picture = options.page.parent / "img" / f"{name}.png"
    if record["picture"]:
        picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(options.results.parent / record["picture"], picture)
    body = block(record, f"img/{name}.png" if picture.is_file() else None)
    options.page.write_text(fill(options.page.read_text(), name, body, options.page.name))
    print(f"filled {options.page.name} from {options.results}")
