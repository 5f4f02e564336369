"""Which files' code names something: comments and docstrings may speak of it, code has to be changed with it."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON, CPP = {".py"}, {".cpp", ".cu", ".cuh", ".h"}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def sources(*folders: str) -> Iterator[Path]:
    """The source files below these folders of the tree, and those that are named themselves."""
    for folder in folders:
        place = ROOT / folder
        found = sorted(place.rglob("*")) if place.is_dir() else [place]
        linked = ROOT / "deqfast" / "kernels"  # `make inplace` links kernels/ there
        yield from (f for f in found if (f.suffix in PYTHON | CPP or f == place) and linked not in f.parents)


def code_of(file: Path) -> str:
    """Its text without comments and docstrings."""
    text = file.read_text()
    if file.suffix in CPP:
        return _COMMENT.sub("", text)
    if file.suffix in PYTHON:
        return " ".join(_python_words(text))
    return re.sub(r"#[^\n]*", "", text)


def _python_words(text: str) -> Iterator[str]:
    opens = True  # a statement, which a string of its own would document
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            opens = True
        elif token.type not in (tokenize.COMMENT, tokenize.NL):
            if not (opens and token.type == tokenize.STRING):
                yield token.string
            opens = False


def files_naming(pattern: str, *folders: str) -> set[str]:
    """Paths, from the tree's top, of the files whose code has a match of the pattern."""
    found = re.compile(pattern)
    return {str(file.relative_to(ROOT)) for file in sources(*folders) if found.search(code_of(file))}
