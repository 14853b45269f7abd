"""README and docs/: every link leads somewhere, and every page can be reached."""

from __future__ import annotations

import re

from homes import ROOT

LINK = re.compile(r"\]\(([^)#:\s]+)\)")


def links(page):
    return {(page.parent / target).resolve() for target in LINK.findall(page.read_text())}


def test_every_page_and_picture_is_there_and_linked():
    seen, wanted = set(), {ROOT / "README.md"}
    while wanted:
        page = wanted.pop()
        seen.add(page)
        assert page.is_file(), page
        if page.suffix == ".md":
            wanted |= links(page) - seen
    assert {each for each in seen if each.parent == ROOT / "docs"} == set((ROOT / "docs").iterdir())


def test_the_readme_is_a_page_and_a_half():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
