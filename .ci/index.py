"""A package index of files alone (PEP 503), of the wheels of a folder: ``make index``.

Any file server can hand it out, and pip takes it from a folder too.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import re
import shutil
import zipfile
from collections.abc import Sequence
from email import message_from_bytes
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
PAGE = (
    '<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>{title}</title></head><body>\n{body}\n</body></html>\n'
)


def metadata(wheel: Path) -> tuple[str, str | None]:
    """The project's normalised name, and the versions of Python that it asks for."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        if len(names) != 1:
            raise SystemExit(f"{wheel}: expected one .dist-info/METADATA, got {names}")
        found = message_from_bytes(archive.read(names[0]))
    return re.sub(r"[-_.]+", "-", found["Name"]).lower(), found["Requires-Python"]


def link(wheel: Path, python: str | None) -> str:
    """The wheel's line in its project's page, with its hash, which pip checks."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    needs = f' data-requires-python="{html.escape(python)}"' if python else ""
    return f'<a href="{quote(wheel.name)}#sha256={digest}"{needs}>{html.escape(wheel.name)}</a><br>'


def write(wheels: Sequence[Path], out: Path) -> None:
    """Pages and copies of the wheels in ``out``, which is emptied first."""
    projects: dict[str, list[str]] = {}
    shutil.rmtree(out, ignore_errors=True)
    for wheel in sorted(wheels):
        name, python = metadata(wheel)
        (out / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheel, out / name / wheel.name)
        projects.setdefault(name, []).append(link(wheel, python))
    for name, links in projects.items():
        (out / name / "index.html").write_text(PAGE.format(title=name, body="\n".join(links)))
    names = "\n".join(f'<a href="{name}/">{name}</a><br>' for name in sorted(projects))
    (out / "index.html").write_text(PAGE.format(title="Simple index", body=names))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the index of a folder's wheels."""
    parser = argparse.ArgumentParser(prog="python .ci/index.py", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "simple", help="emptied first")
    options = parser.parse_args(arguments)
    wheels = list(options.wheels.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"{options.wheels}: expected wheels, found none; make wheel")
    write(wheels, options.out)
    print(f"{options.out}: {len(wheels)} wheels")


if __name__ == "__main__":
    main()
