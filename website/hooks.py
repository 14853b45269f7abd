"""Hooks of mkdocs: README.md as the first page, the notebook, and the source files that pages link.

Links stay as they are read in the repository; here they are turned to pages of the site, so that
the site stands by itself: what it links is in it, and its pages load nothing from elsewhere.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from website.source import LINK, ROOT, line_of, linked, named

LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash"}


class _Loads(HTMLParser):
    """Collects what a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "link" and given.get("rel") in ("canonical", "prev", "next"):
            return
        names = ("href",) if tag == "link" else ("src", "srcset", "data", "poster")
        self.found += [given[name] or "" for name in names if name in given]


def loaded_from_elsewhere(html: str) -> list[str]:
    """The addresses from which a page loads scripts, styles, images or fonts."""
    parser = _Loads()
    parser.feed(html)
    styles = re.findall(r"url\(\s*['\"]?([^'\")]+)", html)
    return [each for each in [*parser.found, *styles] if re.match(r"(https?:)?//", each)]


def notebook(path: Path) -> str:
    """A notebook's cells as Markdown."""
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    return "\n\n".join(
        f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
        for cell, text in zip(cells, texts, strict=True)
    )


def readme() -> str:
    """README.md with its links as from docs/."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\]\((?!https?:|#|docs/)", "](../", text)
    return text.replace("](docs/", "](")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "index.md", content=readme()))
    for path in sorted(Path(config.docs_dir).glob("*.ipynb")):
        if (copied := files.get_file_from_path(path.name)) is not None:
            files.remove(copied)
        files.append(File.generated(config, f"{path.stem}.md", content=notebook(path)))
    style = (ROOT / "website" / "site.css").read_text()
    files.append(File.generated(config, "site.css", content=style))
    found = {
        linked(file.src_uri, match)
        for file in files.documentation_pages()
        for match in LINK.finditer(file.content_string)
    }
    for path in sorted(path for path in found if path is not None):
        files.append(File.generated(config, f"source/{path}.md", content=_source(path)))
    return files


def _source(path: str) -> str:
    """A page with a file of the repository."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    text = (ROOT / path).read_text()
    settings = "search:\n  exclude: true\nhide: [toc, navigation]"
    fence = "~" * 8
    return (
        f'---\n{settings}\n---\n# {path}\n\n{fence} {{.{language} linenums="1"}}\n{text}\n{fence}\n'
    )


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to source files and the notebook to pages of the site."""

    def to_source(match: re.Match[str]) -> str:
        path = linked(page.file.src_uri, match)
        if path is None:
            return match[0]
        name = named(match["text"], path)
        anchor = f"#__codelineno-0-{line_of(path, name)}" if name else ""
        up = "../" * page.file.src_uri.count("/")
        return f"[{match['text']}]({up}source/{path}.md{anchor})"

    if page.file.src_uri.startswith("source/"):
        return markdown
    markdown = LINK.sub(to_source, markdown)
    markdown = re.sub(r"\]\(([\w./-]*)\.ipynb\)", r"](\1.md)", markdown)
    return re.sub(r"^```python (\S+\.py)$", r'```python title="\1"', markdown, flags=re.MULTILINE)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let mkdocs know the lines of source files as places that a link may lead to."""
    if page.file.src_uri.startswith("source/"):
        page.present_anchor_ids |= set(re.findall(r'id="(__codelineno[\d-]+)"', html))
        page.present_anchor_ids |= set(re.findall(r'name="(__codelineno[\d-]+)"', html))
    return html


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """See that no page loads anything from elsewhere."""
    site = Path(config.site_dir)
    found = [
        f"{path.relative_to(site)}: loads {each}"
        for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")])
        for each in loaded_from_elsewhere(path.read_text())
    ]
    if found:
        raise PluginError("\n".join(found))
