"""Fills the measured tables into docs/lyapunov.md: ``python docs/make_lyapunov.py``.

Takes out/lyapunov.json (``make examples``), and copies its picture to docs/img/. A run with ``--keep`` is left out.
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
    parts += [measured.targets(record), "Accuracy in per cent, means of the seeds, with the least and the most:"]
    parts += [measured.table_of(record, "robust"), "What V does:", measured.table_of(record, "stable")]
    parts += [measured.notes(record), measured.provenance(record, "examples/lyapunov.py")]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite docs/lyapunov.md with what has been measured."""
    measured.one_page("lyapunov", block, __doc__ or "", arguments)


if __name__ == "__main__":
    main()
