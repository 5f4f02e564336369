"""The pages on adding an op, a backend or an option name every file to be touched, and none that is not there."""

import re

import pytest
from naming import ROOT, files_naming

PAGES = ROOT / "docs" / "contributing"
CODE = ("deqfast", "csrc", "kernels", "CMakeLists.txt")
OUTSIDE = ("deqfast/compat/", "deqfast/compare/")  # users of what is there, by the names that others have for it
# An example of what a page adds, and what code that knows it says.
EXAMPLES = {
    "op": ("broyden", r"(?i)broyden", CODE),
    "backend": ("triton", r"(?i)(?<![a-z])triton", ("deqfast",)),
    "option": ("mix_every", r"\bmix_every\b", CODE),
}


def listed(page: str) -> list[str]:
    """The patterns in the first column of the page's table, of its example."""
    text = (PAGES / f"{page}.md").read_text()
    return [re.sub(r"<\w+>", EXAMPLES[page][0], found) for found in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)]


@pytest.mark.parametrize("page", EXAMPLES)
def test_every_file_on_a_page_exists(page):
    assert listed(page)
    for pattern in listed(page):
        assert list(ROOT.glob(pattern)), pattern


def naming(pattern: str, *folders: str) -> set[str]:
    return {file for file in files_naming(pattern, *folders) if not file.startswith(OUTSIDE)}


def on_page(page: str) -> set[str]:
    return {str(file.relative_to(ROOT)) for pattern in listed(page) for file in ROOT.glob(pattern)}


@pytest.mark.parametrize("page", EXAMPLES)
def test_every_file_that_knows_the_example_is_on_its_page(page):
    _, pattern, where = EXAMPLES[page]
    assert not naming(pattern, *where) - on_page(page)


@pytest.mark.parametrize("option", ["ridge", "mix_every"])
def test_an_option_of_anderson_is_named_in_eight_files(option):
    assert len(on_page("option")) == 8
    assert naming(rf"(?i)\b{option}\b", *CODE) == on_page("option")


@pytest.mark.parametrize("page", EXAMPLES)
def test_no_file_of_the_code_is_on_a_page_without_knowing_the_example(page):
    name, pattern, where = EXAMPLES[page]
    code = {file for file in on_page(page) if file.startswith(where) and name not in file}
    assert not code - naming(pattern, *where)
