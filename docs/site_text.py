"""What docs/site_hooks.py does to texts, apart from mkdocs: links that follow a page, and what a page must not have."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from html.parser import HTMLParser

CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)]*)?\))")
PICTURE = re.compile(r"^!\[[^\]]*\]\([^)]+\)\n\n", re.MULTILINE)
WIDE = 6  # columns
# Elements that load what they name. A link to another host is nothing that a browser follows by itself.
LOADING = {"audio", "embed", "iframe", "img", "input", "link", "object", "script", "source", "track", "video"}
ADDRESSES = {"data", "href", "poster", "src", "srcset"}
ELSEWHERE = re.compile(r"(?:https?:)?//")
STYLE = re.compile(r"(?:@import\s+|url\()\s*[\"']?((?:https?:)?//[^\"')\s]+)")
# Markdown that was taken for text.
LEFT = re.compile(r"^(?:[-*+] |1\. |\| .*\|$|#+ |```)|\]\(|\*\*[^*\n]+\*\*", re.MULTILINE)


def moved(markdown: str, page: str, outside: Mapping[str, str]) -> str:
    """``markdown`` of ``page``, with links that fit where the site has both ends.

    Paths are from the root of the repository. ``outside`` says where the site has a file that does not lie in docs/;
    the others are where docs/ has them. A link to anything else stays as it is, for mkdocs to refuse.
    """
    here = posixpath.dirname(_place(page, outside) or page)

    def link(match: re.Match[str]) -> str:
        target = _place(posixpath.normpath(posixpath.join(posixpath.dirname(page), match[2])), outside)
        return match[0] if target is None else match[1] + posixpath.relpath(target, here or ".") + match[3]

    pieces = CODE.split(markdown)
    return "".join(piece if number % 2 else LINK.sub(link, piece) for number, piece in enumerate(pieces))


def _place(path: str, outside: Mapping[str, str]) -> str | None:
    if path in outside:
        return outside[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def opened(markdown: str, buttons: str) -> str:
    """The first page: after the paragraph below its title come ``buttons`` and its first picture."""
    picture = PICTURE.search(markdown)
    title, paragraph, rest = (PICTURE.sub("", markdown, count=1) if picture else markdown).split("\n\n", 2)
    return "\n\n".join([title, paragraph, buttons, *([picture[0].strip()] if picture else []), rest])


def widened(html: str) -> str:
    """Tables of many columns stand in an element of the class ``wide``."""

    def table(match: re.Match[str]) -> str:
        return match[0] if match[0].count("<th") - 1 < WIDE else f'<div class="wide">{match[0]}</div>'

    return re.sub(r"<table>.*?</table>", table, html, flags=re.DOTALL)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.paragraphs: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in LOADING:
            self.loads += [value or "" for name, value in attrs if name in ADDRESSES]
        self.loads += [found for name, value in attrs if name == "style" for found in STYLE.findall(value or "")]
        if tag in ("p", "li", "td", "h1", "h2", "h3", "h4"):
            self.paragraphs.append("")
        if tag in ("code", "pre", "script", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.loads += STYLE.findall(data)
        if self.paragraphs and not self.open:
            self.paragraphs[-1] += data


def _read(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    return page


def loads_from_elsewhere(html: str) -> list[str]:
    """Addresses on other hosts that a browser asks for when it shows ``html``."""
    return [address for address in _read(html).loads if ELSEWHERE.match(address.strip())]


def styles_from_elsewhere(css: str) -> list[str]:
    """The same of a style sheet."""
    return STYLE.findall(css)


def left_over(html: str) -> list[str]:
    """Paragraphs in which Markdown still stands: what is a list, a table or a link on a code host, and not here."""
    return [text for text in _read(html).paragraphs if LEFT.search(text.strip())]
