"""README and docs/: every link leads somewhere, every page can be reached, and the site has it."""

from __future__ import annotations

import re
from html import unescape

import markdown
import pytest
import yaml
from homes import ROOT
from markdown.extensions.toc import slugify, strip_tags

from website import keys
from website.source import LINK, line_of, named

DOCS = ROOT / "docs"
LOCAL = re.compile(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)")
FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)


def prose(page):
    return FENCED.sub("", page.read_text())


def links(page):
    return {(page.parent / target).resolve() for target, _ in LOCAL.findall(prose(page)) if target}


def pages():
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def anchors(page):
    """The ids that the site gives to the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = unescape(strip_tags(markdown.markdown(heading)))
        found.append(slugify(text, "-"))
    return found


def test_every_page_and_picture_is_there_and_linked():
    seen, wanted = set(), {ROOT / "README.md"}
    while wanted:
        page = wanted.pop()
        seen.add(page)
        assert page.is_file(), page
        if page.suffix == ".md":
            wanted |= links(page) - seen
    here = {each for each in DOCS.rglob("*") if each.is_file()}
    assert {each for each in seen if each.is_relative_to(DOCS)} == here


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_anchor_is_a_heading(page):
    for target, anchor in LOCAL.findall(prose(page)):
        other = (page.parent / target).resolve() if target else page
        if anchor:
            assert anchor in anchors(other), f"{target}#{anchor}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_linked_name_is_in_its_file(page):
    for link in LINK.finditer(prose(page)):
        path = (page.parent / link["up"] / link["path"]).resolve()
        assert path.is_file(), link[0]
        name = named(link["text"], link["path"])
        if name is not None:
            line_of(str(path.relative_to(ROOT)), name)


def test_the_site_s_navigation_names_every_page_once():
    def leaves(node):
        if isinstance(node, str):
            return [node]
        inside = node.values() if isinstance(node, dict) else node
        return [leaf for each in inside for leaf in leaves(each)]

    navigation = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    here = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
    made = [f"{path.relative_to(DOCS).with_suffix('.md')}" for path in DOCS.rglob("*.ipynb")]
    assert sorted(navigation) == sorted(["index.md", *here, *made])


def test_every_name_of_the_api_s_page_is_there():
    names = re.findall(r"^::: diffusion_pl\.(\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert {"api.experiment", "api.train", "run.Run"} <= set(names)
    for name in names:
        module, _, last = name.rpartition(".")
        line_of(f"diffusion_pl/{module.replace('.', '/')}.py", last)


def test_the_page_of_keys_is_made_of_today_s_signatures_and_says_what_each_key_means():
    text = (DOCS / "keys.md").read_text()
    assert text == keys.page(), "run `make keys`"
    assert not re.findall(r"^\| `\S+` .*\|\s*\|$", text, re.MULTILINE)
    # What is published, or stands in base.yaml, so that the generator itself is held.
    row = re.search(r"^\| `trainer.compile` \|(.*)\|$", text, re.MULTILINE)[1].split("|")
    assert row[0].strip() == "`bool` or `blocks`" and row[1].strip() == "`false`"
    assert "| `trainer.total_images` | `int` | required; base `200_000_000` |" in text
    assert "| `objective.P_mean` | `float` | `-1.2` |" in text
    assert "| `randn_like`" not in text


def test_the_readme_is_a_page_and_a_half():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
