"""HTML by functions that escape every text, and the document around it.

The document asks for nothing: its Content-Security-Policy forbids every request, and allows images
of `data:` addresses, its own style and its own script, both named by their digests.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffusion_pl.names import shown

_VOID = frozenset({"img", "input", "meta"})  # without an end tag


class Html(str):
    """Markup; any other text is escaped where it is put into a tag."""

    __slots__ = ()


@dataclass(frozen=True)
class Part:
    """A part of a page.

    Args:
        name: its address on the page.
        title: its heading.
        inside: markup or text.
    """

    name: str
    title: str
    inside: Sequence[object]


def text(value: object) -> Html:
    """A value as markup: markup as it is, all else escaped, invisible characters written out."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(shown(str(value))))


def joined(parts: Iterable[object]) -> Html:
    """Parts one after another."""
    return Html("".join(map(text, parts)))


def tag(name: str, /, *inside: object, **attributes: object) -> Html:
    """An element.

    Args:
        name: of the element.
        inside: texts, which are escaped, or markup.
        attributes: `class_` is class, `data_at` is data-at; None leaves one out, True has no value.
    """
    said = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(shown(str(value)))}"')
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in _VOID else f"</{name}>"
    return Html(f"<{name}{said}>{joined(inside)}{end}")


def paragraph(*inside: object, kind: str | None = None) -> Html:
    """A paragraph; of the kinds `note` and `problem`."""
    return tag("p", *inside, class_=kind)


def part(name: str, title: str, *inside: object) -> Part:
    """A part of the page."""
    return Part(name, title, inside)


def section(part: Part) -> Html:
    """A part of the page with its heading, at the address #name."""
    return tag("section", tag("h2", part.title), *part.inside, id=part.name)


def table(head: Sequence[object], rows: Iterable[tuple[str | None, Sequence[object]]]) -> Html:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        head: titles of the columns.
        rows: class of the row, or None, and its cells; the first is its title.
    """
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = [
        tag(
            "tr",
            tag("th", cells[0], scope="row"),
            *(tag("td", cell) for cell in cells[1:]),
            class_=kind,
        )
        for kind, cells in rows
    ]
    return tag("div", tag("table", top, tag("tbody", *body)), class_="wide", tabindex=0)


def image(content: bytes, about: str, kind: str = "png") -> Html:
    """An image within the page.

    Args:
        content: of the file.
        about: what is on it, for those who do not see it.
        kind: png or webp.
    """
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return tag("img", src=source, alt=about)


def figure(inside: object, caption: object, kind: str | None = None) -> Html:
    """A figure with its caption below."""
    return tag("figure", inside, tag("figcaption", caption), class_=kind)


def slider(frames: Sequence[tuple[str, Html]], label: str) -> Html:
    """Images under one slider, the last one in view; one image stands without a slider.

    Args:
        frames: caption and image of each.
        label: what the slider moves through.
    """
    last = len(frames) - 1
    stack = [
        tag("div", image, data_caption=caption, hidden=None if place == last else True)
        for place, (caption, image) in enumerate(frames)
    ]
    move = tag("input", type="range", min=0, max=last, value=last, step=1, aria_label=label)
    return tag(
        "figure",
        tag("div", *stack, class_="frames"),
        move if last else "",
        tag("figcaption", tag("output", frames[last][0])),
        class_="slider",
    )


def document(title: str, *inside: object) -> str:
    """The whole page."""
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(STYLE)}'; "
        f"script-src '{_digest(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    body = tag("body", tag("main", *inside), tag("script", Html(SCRIPT)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


SCRIPT = """
for (const figure of document.querySelectorAll("figure.slider")) {
  const input = figure.querySelector("input");
  if (!input) continue;
  const frames = figure.querySelector(".frames").children;
  const show = () => {
    for (let i = 0; i < frames.length; i++) frames[i].hidden = i !== Number(input.value);
    figure.querySelector("output").textContent = frames[input.value].dataset.caption;
  };
  input.addEventListener("input", show);
  show();
}
"""

STYLE = """
:root { --back: #fff; --ink: #1c2024; --soft: #5b6570; --line: #d5dae0; --mark: #fff3c4;
  --bad: #b3261e; --panel: #f6f7f9;
  --c0: #1f6fb4; --c1: #c8500a; --c2: #2a7f3b; --c3: #8a3fb0; --c4: #a8201a; --c5: #0e7f86;
  --c6: #7a5c00; --c7: #b0307a; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --ink: #e4e7ea; --soft: #9aa5b1; --line: #343b43; --mark: #4a3d0c;
    --bad: #ff8a80; --panel: #1c2126;
    --c0: #6cb2eb; --c1: #f5a05a; --c2: #78cf8a; --c3: #cf9bea; --c4: #ff8a80; --c5: #5fd0d6;
    --c6: #dcc060; --c7: #f08cc0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .5rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
a { color: var(--c0); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; margin: .5rem 0; }
.note, figcaption { color: var(--soft); font-size: .875rem; }
.problem { color: var(--bad); border-left: 3px solid var(--bad); padding-left: .6rem; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; min-width: 60%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem .3rem;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
td { overflow-wrap: break-word; min-width: 4rem; max-width: 26rem; }
thead th { color: var(--soft); white-space: nowrap; }
tbody th { font-weight: 600; min-width: min(13rem, 38vw); max-width: 18rem;
  overflow-wrap: break-word; }
tr.differs td { background: var(--mark); }
tr.group th { padding-top: 1rem; color: var(--soft); }
details summary { cursor: pointer; padding: .4rem 0; }
.cards { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .9rem; min-width: 0; }
.card h3 { margin: 0 0 .4rem; }
dl { margin: 0; font-size: .875rem; }
dt { color: var(--soft); margin-top: .35rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.plots { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: .5rem 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, "DejaVu Sans", sans-serif; }
svg .axis { stroke: var(--line); } svg .grid { stroke: var(--line); stroke-width: .5; }
svg .curve { fill: none; stroke-width: 1.6; } svg .dashed { stroke-dasharray: 5 4; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; list-style: none; padding: 0;
  margin: .2rem 0; font-size: .875rem; }
.legend li { overflow-wrap: anywhere; min-width: 0; }
.legend li::before { content: ""; display: inline-block; width: 1rem; height: 0;
  border-top: 3px solid currentcolor; margin-right: .4rem; vertical-align: middle; }
.legend li.dashed::before { border-top-style: dashed; }
.legend span { color: var(--ink); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); }
.curve { stroke: currentcolor; } .dot { fill: currentcolor; }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; }
.slider { max-width: 36rem; } .slider img { width: 100%; }
.slider input { width: 100%; margin: .5rem 0 0; }
.strips { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.strips img { width: 100%; max-width: 24rem; }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); }
.tiles img { width: 100%; }
"""
