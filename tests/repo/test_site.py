"""Links of the documents lead somewhere, the gallery is what pages say, and what becomes a site is fit for it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
MARKED = "# Title\n\n<!-- gallery:begin -->\n{}\n<!-- gallery:end -->\n"
SHOWN = "| a |\n|---|\n| 1 |\n\n![p](img/p.png)\n\n`python examples/a.py` on a device\n\n"
SHOWN += "## Against the paper\n\n[all](#of-it)"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> list[str]:
    """Of the headings, by the rules of code hosts, which mkdocs.yml asks for too."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"\]\([^)]*\)", "", title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def broken_links(page: Path) -> list[str]:
    bad = []
    for path, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)]*))?\)", CODE.sub("", page.read_text())):
        target = page.parent / path if path else page
        if re.match(r"[a-z]+:", path):
            continue
        if not target.exists() or (anchor and anchors(target).count(anchor) != 1):
            bad.append(f"{path}#{anchor}" if anchor else path)
    return bad


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_to_one_heading(page):
    assert not broken_links(page)


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    (tmp_path / "other.md").write_text("# `dq.DEQ` and *more*\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#dqdeq-and-more) [c](https://example.org/x) `[d](none)` [e](none.md) "
        "[f](other.md#none) [g](#none) [h](other.md#twice)\n```python\n[i](none)\n```\n"
    )
    assert broken_links(page) == ["none.md", "other.md#none", "#none", "other.md#twice"]


def test_files_that_the_citation_names_exist():
    names = re.findall(r"docs/[\w./]+\.md", (ROOT / "CITATION.cff").read_text())
    assert names
    assert all((ROOT / name).is_file() for name in names)


def test_gallery_is_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_gallery.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_gallery_that_is_out_of_date_is_said_to_be(tmp_path):
    old = tmp_path / "gallery.md"
    old.write_text("old")
    with pytest.raises(SystemExit, match="out of date"):
        script("make_gallery").main(["--check", "--out", str(old)])
    assert old.read_text() == "old"


def test_gallery_takes_what_pages_mark_picture_first(tmp_path):
    gallery = script("make_gallery")
    (tmp_path / "masks.md").write_text(MARKED.format(SHOWN) + "\nnot shown\n")
    (tmp_path / "other.md").write_text("# Other\n")
    text = gallery.page(tmp_path, ["masks"])
    assert "## Title\n\n![p](img/p.png)\n\n| a |\n|---|\n| 1 |\n" in text
    assert "**Against the paper**\n\n[all](masks.md#of-it)\n\nAll of it: [Title](masks.md)." in text
    assert "not shown" not in text
    assert "gallery:" not in text


def test_code_stays_code_in_the_gallery(tmp_path):
    text = MARKED.format(SHOWN + "\n\n## Other\n\n```sh\n# no heading\n```")
    assert (
        script("make_gallery")
        .section("masks", text)
        .endswith("**Other**\n\n```sh\n# no heading\n```\n\nAll of it: [Title](masks.md).")
    )


def test_gallery_refuses_a_page_that_it_would_leave_out(tmp_path):
    (tmp_path / "masks.md").write_text(MARKED.format(SHOWN))
    with pytest.raises(SystemExit, match=r"SYSTEMS: .* got none of masks"):
        script("make_gallery").page(tmp_path, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MARKED.format(SHOWN.replace("![p]", "[p]")), "expected one picture"),
        (MARKED.format(SHOWN + "\n\n![q](img/q.png)"), "expected one picture"),
        (MARKED.format(SHOWN.replace("|---|", "")), "expected a table"),
        (MARKED.format(SHOWN.replace("`python", "`ruby")), "expected the command"),
        (MARKED.format(SHOWN.replace("## Against", "Against")), "expected a heading"),
        (MARKED.format(SHOWN).replace("gallery:end", "gallery:over"), "in pairs"),
        (f"# Title\n\n{SHOWN}\n", "in pairs"),
        (MARKED.format(SHOWN).replace("# Title", "Title"), "expected a title"),
    ],
)
def test_gallery_says_what_a_section_lacks(text, message):
    with pytest.raises(SystemExit, match=f"masks.md: .*{message}"):
        script("make_gallery").section("masks", text)


@pytest.mark.parametrize(
    ("page", "link", "place"),
    [
        ("README.md", "docs/guide.md#tolerances", "guide.md#tolerances"),
        ("README.md", "docs/img/digits.png", "img/digits.png"),
        ("README.md", "CONTRIBUTING.md", "contributing/index.md"),
        ("README.md", "bench/floor.py", "bench/floor.py"),
        ("CONTRIBUTING.md", "docs/contributing/op.md", "op.md"),
        ("CONTRIBUTING.md", "docs/design.md", "../design.md"),
        ("docs/guide.md", "../README.md#more", "index.md#more"),
        ("docs/contributing/op.md", "../design.md", "../design.md"),
        ("docs/guide.md", "https://example.org/docs/guide.md", "https://example.org/docs/guide.md"),
    ],
)
def test_links_follow_the_pages_into_the_site(page, link, place):
    outside = {"README.md": "index.md", "CONTRIBUTING.md": "contributing/index.md"}
    code = "`a[i](CONTRIBUTING.md)`\n```python\na[i](CONTRIBUTING.md)\n```\n"
    assert script("site_text").moved(f"[a]({link}) {code}", page, outside) == f"[a]({place}) {code}"


def test_first_page_has_buttons_and_its_first_picture_below_the_first_paragraph():
    text = "# Name\n\nWhat it is.\n\nMore.\n\n![one](1.png)\n\nmiddle\n\n![two](2.png)\n\nend\n"
    expected = "# Name\n\nWhat it is.\n\nBUTTONS\n\n![one](1.png)\n\nMore.\n\nmiddle\n\n![two](2.png)\n\nend\n"
    assert script("site_text").opened(text, "BUTTONS") == expected


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://example.org/a.js"></script>',
        '<link rel="stylesheet" href="//example.org/a.css">',
        '<link rel="preconnect" href="https://example.org/">',
        '<p>a <img alt="b" src="http://example.org/a.png"/></p>',
        '<source srcset="https://example.org/a.png 2x">',
        '<div style="background: url(https://example.org/a.png)"></div>',
        "<style>@import 'https://example.org/a.css';</style>",
        "<style>@font-face { src: url('//example.org/a.woff2') }</style>",
    ],
)
def test_what_a_browser_would_ask_another_host_for_is_seen(html):
    assert len(script("site_text").loads_from_elsewhere(f"<html><body>{html}</body></html>")) == 1


def test_what_comes_from_the_site_and_links_to_others_are_no_requests():
    html = (
        '<a href="https://example.org">a</a><img src="img/a.png"><script src="../a.js"></script><link href="a.css">'
        '<img src="data:image/png;base64,AA=="><code>url(https://example.org)</code><style>a { b: url(c.png) }</style>'
    )
    assert not script("site_text").loads_from_elsewhere(html)


@pytest.mark.parametrize(
    "html", ["<p>words:\n- item</p>", "<p>words\n| a | b |</p>", "<li>[a](b.md)</li>", "<td>**a**</td>", "<p>1. a</p>"]
)
def test_markdown_that_was_taken_for_text_is_seen(html):
    assert len(script("site_text").left_over(html)) == 1


def test_text_and_code_are_no_markdown():
    text = "<p>a - b,\n||z|| and f(**a)\n2.5 and <code>x[0](y) **kwargs**</code></p>"
    assert not script("site_text").left_over(f"{text}<pre><code>- a\n| b |</code></pre><ul><li>a</li></ul>")


def test_site_is_built_so_that_a_warning_fails_it():
    """``mkdocs build --quiet`` counts no warnings, and so refuses nothing."""
    (command,) = re.findall(r"bin/mkdocs .*|\(BIN\)/mkdocs .*", (ROOT / "Makefile").read_text())
    assert command == "(BIN)/mkdocs build"
    assert re.search(r"^strict: true$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)


def test_tables_of_many_columns_get_room():
    few, many = ("<table><thead>" + columns * "<th>a</th>" + "</thead></table>" for columns in (5, 6))
    assert script("site_text").widened(f"{few}<p>a</p>{many}") == f'{few}<p>a</p><div class="wide">{many}</div>'
