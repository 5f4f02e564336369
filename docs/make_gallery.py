"""Writes docs/gallery.md from the pages of the systems: ``python docs/make_gallery.py``; ``--check`` says if it is due.

A page says what is shown of it, between ``<!-- gallery:begin -->`` and ``<!-- gallery:end -->``, in as many parts as it
likes: one picture, a table, the command that made them, and a heading with the word *paper* above what agreed with it
and what did not. Nothing is copied by hand.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parent
# Pages of docs/, in the order of the gallery; the site's navigation has them below it.
SYSTEMS = ("joint", "masks", "dynamics", "lyapunov", "federated")

BEGIN, END = "<!-- gallery:begin -->", "<!-- gallery:end -->"
PART = re.compile(f"^{BEGIN}\n(.*?)^{END}$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"^<!--.*?-->\n", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"^!\[[^\]]+\]\(img/[^)]+\)$", re.MULTILINE)
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
# What a section must have.
PARTS = {
    "one picture, ![...](img/...)": PICTURE,
    "a table": re.compile(r"^\|[-: |]+\|$", re.MULTILINE),
    "the command, `python ...` or `make ...`": re.compile(r"`(python|make) [^`]+`"),
    "a heading with the word paper": re.compile(r"^#+ .*\bpaper\b", re.MULTILINE),
}
INTRODUCTION = """# Gallery

Systems that others have published, on deqfast: each from its public names, on data that a laptop has. A picture, a
table, the command that made them, and what agreed with the paper and what did not."""
END_OF_PAGE = "Written by `python docs/make_gallery.py` from the pages of the systems; edit nothing here."


def section(name: str, text: str) -> str:
    """What the gallery shows of the page ``name``, whose text is ``text``."""
    title = re.match(r"# (.+)\n", text)
    if not title:
        raise SystemExit(f"{name}.md: expected a title, `# ...`, in its first line, got {text.partition(chr(10))[0]!r}")
    for mark in (BEGIN, END):
        found = len(re.findall(f"^{mark}$", text, re.MULTILINE))
        if not found or found != len(PART.findall(text)):
            raise SystemExit(
                f"{name}.md: expected {BEGIN} and {END} in pairs, each alone on its line, got {found} {mark}"
            )
    body = COMMENT.sub("", "\n".join(PART.findall(text)))
    for what, pattern in PARTS.items():
        found = len(pattern.findall(body))
        if not found or (pattern is PICTURE and found > 1):
            raise SystemExit(f"{name}.md: expected {what} between the marks of the gallery, got {found}")
    body = "\n\n".join([*re.findall(PICTURE, body), PICTURE.sub("", body)])
    body = "".join(piece if number % 2 else _moved(piece, name) for number, piece in enumerate(FENCED.split(body)))
    return f"## {title[1]}\n\n{body.strip()}\n\nAll of it: [{title[1]}]({name}.md)."


def _moved(text: str, name: str) -> str:
    """Headings become lines, links to headings lead to where those are."""
    text = re.sub(r"^#+ (.+)$", r"**\1**", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"\]\(#", f"]({name}.md#", text))


def page(docs: Path = DOCS, systems: Sequence[str] = SYSTEMS) -> str:
    """The whole of docs/gallery.md."""
    marked = {path.stem for path in docs.glob("*.md") if BEGIN in path.read_text()}
    if missing := sorted(marked - set(systems)):
        raise SystemExit(f"SYSTEMS: expected every page with {BEGIN}, got none of {', '.join(missing)}")
    sections = [section(name, (docs / f"{name}.md").read_text()) for name in systems]
    return "\n\n".join([INTRODUCTION, *sections, END_OF_PAGE]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write docs/gallery.md, or check it."""
    parser = argparse.ArgumentParser(
        prog="python docs/make_gallery.py", description=(__doc__ or "").split(":")[0] + "."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is out of date")
    parser.add_argument("--out", type=Path, default=DOCS / "gallery.md")
    options = parser.parse_args(arguments)
    new = page()
    if options.check:
        if not options.out.is_file() or options.out.read_text() != new:
            raise SystemExit(f"{options.out.name} is out of date: run `python docs/make_gallery.py`")
        return
    options.out.write_text(new)
    print(f"wrote {options.out.name}")


if __name__ == "__main__":
    main()
