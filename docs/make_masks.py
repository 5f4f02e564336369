"""Fills the measured tables into docs/masks.md: ``python docs/make_masks.py``.

Takes out/masks.json of ``python examples/masks.py --sweep`` into docs/data/, if it is there; the tables and the picture
in docs/img/ are of docs/data/masks.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "examples")]

from frame import paint  # noqa: E402
from masks_figure import draw  # noqa: E402
from masks_report import differences, main_table, memory_table, reversible_table, storage_table, sweep_tables  # noqa: E402
from measured_page import fill, table  # noqa: E402

SILENT = ("device", "threads")  # options that the command need not show


def blocks(record: dict[str, Any]) -> dict[str, str]:
    """Markdown by the name of its place on the page."""
    targets = [[t["what"], t["target"], t["measured"], "met" if t["met"] else "**missed**"] for t in record["targets"]]
    return {
        **{data: table(*main_table(record, data)) for data in ("digits", "photographs", "text")},
        "differences": table(*differences(record)),
        "sweeps": "\n\n".join(table(header, rows) for header, rows in sweep_tables(record)),
        "memory": table(*memory_table(record)),
        "storage": table(*storage_table(record)),
        "reversible": table(*reversible_table(record)),
        "targets": table(["target", "asked", "measured", ""], targets),
        "provenance": provenance(record),
    }


def provenance(record: dict[str, Any]) -> str:
    """Command, device, versions, date."""
    machine = record["machine"]
    options = {key: value for key, value in record["options"].items() if key not in SILENT and value != "False"}
    given = " ".join(f"--{k.replace('_', '-')}" + ("" if v == "True" else f" {v}") for k, v in options.items())
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    packages = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    return (
        f"`python examples/masks.py {given}` on {device} ({machine['threads']} torch thread), {record['date']}, "
        f"{record['seconds'] / 60:.0f} minutes in all; python {machine['python']}, {packages}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite docs/masks.md."""
    parser = argparse.ArgumentParser(prog="python docs/make_masks.py", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--results", type=Path, default=ROOT / "out")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    new, kept = options.results / "masks.json", options.docs / "data" / "masks.json"
    if new.is_file() and json.loads(new.read_text())["options"]["sweep"] == "True":
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(new, kept)
    elif new.is_file():
        print(f"left out: {new} is not of a run with --sweep")
    if not kept.is_file():
        raise SystemExit(f"nothing measured: no {kept}")
    page = options.docs / "masks.md"
    text = page.read_text()
    record, picture = json.loads(kept.read_text()), options.docs / "img" / "masks.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    paint(lambda path: draw(path, record), picture, title_pad=8)
    for name, body in blocks(record).items():
        text = fill(text, name, body, page.name)
    page.write_text(text)
    print(f"filled the tables of {kept} into {page}")


if __name__ == "__main__":
    main()
