"""What CHANGELOG.md says of a version: a release without its section fails (``make check-release``).

The version is that of pyproject.toml; one that is given, as a tag has it, must be the same.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def section(text: str, version: str) -> str:
    """The dated section of ``version``, without its heading."""
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    found = re.findall(rf"{heading}\n(.*?)(?=^## |^\[[^\]]+\]: |\Z)", text, re.MULTILINE | re.DOTALL)
    if len(found) != 1:
        raise SystemExit(f"CHANGELOG.md: expected one section '## [{version}] - YYYY-MM-DD', found {len(found)}")
    if not re.search(r"^- \S", found[0], re.MULTILINE):
        raise SystemExit(f"CHANGELOG.md: the section of {version} says nothing")
    return str(found[0]).strip()


def left_unreleased(text: str) -> int:
    """Entries that stand above every version: they would be released without being named."""
    found = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    return len(re.findall(r"^- ", found[1], re.MULTILINE)) if found else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the section, for the notes of a release."""
    parser = argparse.ArgumentParser(prog="python .ci/changelog.py", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument(
        "version", nargs="?", help="of the release, 0.1.0 or v0.1.0; that of pyproject.toml if left out"
    )
    parser.add_argument("--changelog", type=Path, default=ROOT / "CHANGELOG.md")
    parser.add_argument("--project", type=Path, default=ROOT / "pyproject.toml")
    options = parser.parse_args(arguments)
    (declared,) = re.findall(r'^version = "(.+)"$', options.project.read_text(), re.MULTILINE)
    version = (options.version or declared).removeprefix("v")
    if version != declared:
        raise SystemExit(f"pyproject.toml: expected version {version}, that of the release, got {declared}")
    text = options.changelog.read_text()
    notes = section(text, version)
    if count := left_unreleased(text):
        raise SystemExit(f"CHANGELOG.md: {count} entries stand under [Unreleased]: expected under [{version}]")
    print(notes)


if __name__ == "__main__":
    main()
