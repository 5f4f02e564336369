"""Writes docs/api.md from the docstrings: ``python docs/make_api.py``; with ``--check`` it only says whether it is due.

A name belongs to the API when ``deqfast.__all__`` has it. Sections of Google-style docstrings become paragraphs and
lists, Python examples become code.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import deqfast  # noqa: E402
from deqfast import info  # noqa: E402
from deqfast.compare import Comparison, compare  # noqa: E402

GROUPS = {
    "Solving": [
        "fixed_point",
        "root",
        "Solution",
        "States",
        "RandomStates",
        "Status",
        "RowCount",
        "ConvergenceError",
        "CouplingWarning",
    ],
    "Joint solves": ["joint_solve", "JointSolution", "Envelope", "joint_step_size", "project"],
    "Solvers": ["Anderson", "Broyden", "Picard", "SolverState"],
    "Gradients": ["Implicit", "Phantom", "OneStep", "Unroll", "BackwardReport", "GradientWarning"],
    "Several processes": ["BatchShard", "restore", "RankError"],
    "Weight-tied models": ["unroll"],
    "Layers and the Jacobian": ["DEQ", "ConvergenceWarning", "jacobian_penalty", "spectral_radius"],
}
# Of dq.nn, and in no other place.
MODULES = ["FullGraph", "StepMasked", "ICNN", "LyapunovProjection"]  # of dq.nn
# How the package talks to itself; and what torch.nn.Module calls.
INTERNAL = {"workspace", "uses_previous", "attach", "solves", "advance", "answer", "release", "extra_repr"}
INTERNAL |= {"copies_z", "update", "previous", "restart", "resume", "finish", "known_running", "failed", "judge"}
INTERNAL |= {"replay", "made", "take_over", "part", "take_part", "description", "shared"}
SECTIONS = ("Args", "Attributes", "Returns", "Raises")


def page() -> str:
    """The whole of docs/api.md."""
    groups = {title: [name for name in names if name in deqfast.__all__] for title, names in GROUPS.items()}
    known = {name for names in groups.values() for name in names}
    groups["Other"] = sorted(set(deqfast.__all__) - known)
    parts = [
        "# API",
        "Written by `python docs/make_api.py` from the docstrings; edit nothing here. `import deqfast as dq`.",
    ]
    groups = {title: names for title, names in groups.items() if names}
    for title, names in groups.items():
        parts.append(
            f"[{title}](#{_anchor(title)}): " + ", ".join(f"[`{name}`](#{_anchor(_title(name))})" for name in names)
        )
    for title, names in groups.items():
        parts.append(f"## {title}")
        for name in names:
            parts += _entry(name, getattr(deqfast, name))
    parts.append("## Masks a step and stable dynamics")
    for name in MODULES:
        parts += _entry(f"nn.{name}", getattr(deqfast.nn, name))
    module = sys.modules[compare.__module__]
    parts += [
        "## `python -m deqfast.compare`",
        *_docstring(module),
        _signature("dq.compare", compare),
        *_docstring(compare),
    ]
    parts += ["### Comparison", *_docstring(Comparison)]
    for member, value in _members(Comparison):
        parts += [f"#### Comparison.{member}", *_docstring(value)]
    parts += ["## `python -m deqfast.info`", inspect.getdoc(info) or ""]
    for name in ("report", "facts"):
        function = getattr(info, name)
        parts += [_signature(f"deqfast.info.{name}", function), *_docstring(function)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(name: str) -> str:
    """Anchors know no capitals: of two names that differ by those, the small one says where it is from."""
    clashes = [other for other in deqfast.__all__ if other.lower() == name and other != name]
    return f"dq.{name}" if clashes else name


def _entry(name: str, thing: Any) -> Iterator[str]:
    yield f"### {_title(name)}"
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):
        yield from _docstring(thing)
        comments = {name: f": {comment}" for name, comment in _comments(thing).items()}
        yield "\n".join(f"- `{m.name}` = {m.value}{comments.get(m.name, '')}" for m in thing)
        return
    if inspect.ismodule(thing):
        yield from _docstring(thing)
        for function in thing.__all__:
            yield f"#### {name}.{function}"
            yield _signature(f"dq.{name}.{function}", getattr(thing, function))
            yield from _docstring(getattr(thing, function))
        return
    is_error = inspect.isclass(thing) and issubclass(thing, (Exception, Warning))
    made_by_caller = name not in ("Solution", "JointSolution", "SolverState") and not is_error
    if made_by_caller:
        yield _signature(f"dq.{name}", thing)
    yield from _docstring(thing)
    if inspect.isclass(thing) and not is_error:
        for member, value in _members(thing):
            if isinstance(value, property):
                yield f"#### {name}.{member}"
                yield from _docstring(value)
            else:
                yield f"#### {name}.{member}()"
                yield _signature(member, value, method=True)
                yield from _docstring(value)


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of deqfast's own, in the order of their definition, base classes last."""
    seen = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("deqfast"):
            continue
        for member, value in vars(base).items():
            if member.startswith("_") or member in seen or member in INTERNAL:
                continue
            if isinstance(value, property) or inspect.isfunction(value):
                seen.add(member)
                if member != "solve" or cls.__name__ == "DEQ":
                    yield member, value


def _signature(name: str, thing: Any, method: bool = False) -> str:
    signature = inspect.signature(thing)
    shown = [p for p in signature.parameters.values() if not (method and p.name == "self")]
    words, star = [], False
    for p in shown:
        if p.kind is p.KEYWORD_ONLY and not star:
            words.append("*")
            star = True
        star = star or p.kind is p.VAR_POSITIONAL
        prefix = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        default = "" if p.default is p.empty else f"={p.default!r}"
        words.append(prefix + p.name + default)
    text = f"{name}({', '.join(words)})"
    if len(text) > 84:
        text = (
            f"{name}(\n" + textwrap.fill(", ".join(words), 80, initial_indent="    ", subsequent_indent="    ") + "\n)"
        )
    return f"```text\n{text}\n```"


def _docstring(thing: Any) -> Iterator[str]:
    text = inspect.getdoc(thing) or ""
    if dataclasses.is_dataclass(thing) and text.startswith(f"{getattr(thing, '__name__', '')}("):
        return  # made by dataclass from the fields
    for block in re.split(r"\n\s*\n", text):
        head, _, body = block.partition("\n")
        if head.rstrip(":") in SECTIONS and head.endswith(":"):
            yield f"**{head.rstrip(':')}**"
            yield _items(textwrap.dedent(body), head.rstrip(":"))
        elif block == "::":
            continue
        elif block.startswith("    "):
            yield _code(textwrap.dedent(block))
        else:
            yield _prose(re.sub("::$", ":", block))


def _code(text: str) -> str:
    """A block of Python, or of formulas."""
    try:
        ast.parse(text)
    except SyntaxError:
        return f"```text\n{text}\n```"
    return f"```python\n{text}\n```"


def _items(body: str, section: str) -> str:
    entries: list[str] = []
    for line in body.splitlines():
        if entries and (line.startswith(" ") or section == "Returns"):
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    if section == "Returns":
        return _prose(" ".join(entries))
    out = []
    for entry in entries:
        name, colon, rest = entry.partition(": ")
        out.append(f"- `{name}`: {_prose(rest)}" if colon else f"- {_prose(entry)}")
    return "\n".join(out)


def _prose(text: str) -> str:
    """Docstring markup as Markdown; what Markdown would take for markup of its own is escaped outside of code."""
    pieces = re.split(r"(``.+?``)", " ".join(text.split()))
    plain = (re.sub(r"([*<])", r"\\\1", p) if not p.startswith("``") else p.replace("``", "`") for p in pieces)
    return "".join(plain)


def _comments(cls: type) -> dict[str, str]:
    """The comment beside each member of an enum."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, (node,) = source.splitlines(), ast.parse(source).body
    found = {}
    for statement in getattr(node, "body", []):
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            _, hash_sign, comment = lines[statement.lineno - 1].partition("  # ")
            if hash_sign:
                found[statement.targets[0].id] = comment
    return found


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write docs/api.md, or check it."""
    parser = argparse.ArgumentParser(prog="python docs/make_api.py", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is out of date")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "api.md")
    options = parser.parse_args(arguments)
    new = page()
    if options.check:
        if not options.out.is_file() or options.out.read_text() != new:
            raise SystemExit(f"{options.out.name} is out of date: run `python docs/make_api.py`")
        return
    options.out.write_text(new)
    print(f"wrote {options.out.name}")


if __name__ == "__main__":
    main()
