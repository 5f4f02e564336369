"""Fills the measured tables into docs/dynamics.md: ``python docs/make_dynamics.py``.

Takes out/dynamics.json (``make examples``), and copies its picture to docs/img/. A run with ``--quick`` is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import measured_page as measured


def block(record: Mapping[str, Any], picture: str | None) -> str:
    """Picture, targets, tables, notes, and where it all comes from."""
    parts = [f"![{record['title']}]({picture})"] if picture else []
    parts += [measured.targets(record), measured.table_of(record, "robust"), measured.notes(record)]
    parts.append("Every state of a solve, means of the seeds in per cent:")
    parts.append(measured.table_of(record, "states"))
    parts.append("The attacks through the reduction one by one, what each leaves in per cent:")
    parts.append(measured.table_of(record, "through"))
    parts.append("A training step, in turns: the same weights, digits, budgets, tolerance and phantom steps:")
    parts.append(measured.table_of(record, "timed"))
    parts.append(measured.provenance(record, "examples/dynamics.py"))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite docs/dynamics.md with what has been measured."""
    measured.one_page("dynamics", block, __doc__ or "", arguments)


if __name__ == "__main__":
    main()
