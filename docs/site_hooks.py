"""Makes a site of what the repository has: the pages of its top folder, the gallery's, and what no page may have."""

from __future__ import annotations

import logging
from pathlib import Path

from make_gallery import SYSTEMS
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from site_text import left_over, loads_from_elsewhere, moved, opened, styles_from_elsewhere, widened

ROOT = Path(__file__).resolve().parents[1]
# Where the site has what does not lie in docs/.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing/index.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.txt",
}
BUTTONS = {"Guide": "guide.md", "Gallery": "gallery.md", "API": "api.md", "Benchmarks": "benchmarks.md"}
# A warning ends a strict build with an error.
log = logging.getLogger("mkdocs.hooks.site")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The systems of the gallery have their pages in the navigation."""
    for entry in config.nav or []:
        if "Published systems" in entry:
            entry["Published systems"] = [f"{name}.md" for name in SYSTEMS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what does not lie in docs/."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links follow the pages; the first page shows what there is."""
    sources = {target: source for source, target in OUTSIDE.items()}
    uri = page.file.src_uri
    markdown = moved(markdown, sources.get(uri, f"docs/{uri}"), OUTSIDE)
    if uri == "index.md":
        markdown = opened(markdown, _buttons(page, files))
    return markdown


def _buttons(page: Page, files: Files) -> str:
    links: list[str] = []
    for title, target in BUTTONS.items():
        file = files.get_file_from_path(target)
        if file is None:
            raise ValueError(f"BUTTONS: expected a page of the site, got {target!r}")
        look = "md-button" if links else "md-button md-button--primary"
        links.append(f'<a class="{look}" href="{file.url_relative_to(page.file)}">{title}</a>')
    return f'<div class="home-buttons">{" ".join(links)}</div>'


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Refuses Markdown that stands in a page as text; tables of many columns get room."""
    for text in left_over(html):
        log.warning("%s: expected no Markdown in the text, got %r", page.file.src_uri, text)
    return widened(html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuses what a browser would ask another host for."""
    for address in loads_from_elsewhere(output):
        log.warning("%s: expected nothing from another host, got %s", page.file.src_uri, address)
    return output


def on_post_build(config: MkDocsConfig) -> None:
    """The same of style sheets."""
    for path in Path(config.site_dir).rglob("*.css"):
        for address in styles_from_elsewhere(path.read_text()):
            log.warning("%s: expected nothing from another host, got %s", path.name, address)
