"""What stands on a page of HTML: its elements and texts, by Python's own parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"img", "input", "meta"}


@dataclass
class Element:
    name: str
    attributes: dict
    inside: list = field(default_factory=list)  # elements and texts

    def find(self, name, **wanted):
        """All elements of a name below this one with these attributes, in order."""
        return [
            each
            for each in self.below()
            if each.name == name and wanted.items() <= each.attributes.items()
        ]

    def below(self):
        for each in self.inside:
            if isinstance(each, Element):
                yield each
                yield from each.below()

    @property
    def text(self):
        return "".join(each if isinstance(each, str) else each.text for each in self.inside)


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, name, attributes):
        element = Element(name, dict(attributes))
        assert len(element.attributes) == len(attributes), f"<{name}>: an attribute twice"
        self.open[-1].inside.append(element)
        if name not in VOID:
            self.open.append(element)

    def handle_endtag(self, name):
        assert self.open.pop().name == name

    def handle_data(self, data):
        self.open[-1].inside.append(data)


def parsed(page):
    """The page's root; its elements are closed in order."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert len(reader.open) == 1, [each.name for each in reader.open]
    return reader.open[0]
