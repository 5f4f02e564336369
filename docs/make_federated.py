"""Fills the measured tables into docs/federated.md: ``python docs/make_federated.py``.

Takes out/federated.json (``make federated``), and copies its picture to docs/img/. A run with ``--quick`` is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import measured_page as measured


def block(record: Mapping[str, Any], picture: str | None) -> str:
    """Targets, tables, notes, picture, and where it all comes from."""
    parts = [f"![{record['title']}]({picture})"] if picture else []
    parts += [measured.targets(record), measured.table_of(record, "fused"), measured.notes(record)]
    parts.append("One client's training, an epoch each in turns, to the same tolerance or until the budget is used up:")
    parts.append(measured.table_of(record, "timed"))
    parts.append(measured.provenance(record, "examples/federated/run.py"))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite docs/federated.md with what has been measured."""
    measured.one_page("federated", block, __doc__ or "", arguments)


if __name__ == "__main__":
    main()
