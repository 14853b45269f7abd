"""Markup that escapes whatever is put into it, and plots whose points lie where the axes say."""

from __future__ import annotations

import base64
import hashlib
import math
import re

import pytest
from pages import parsed

from diffusion_pl.page import html
from diffusion_pl.page.html import Html, document, image, slider, table, tag
from diffusion_pl.page.plots import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    Line,
    axis_of,
    labels,
    plot,
    short,
)

HOSTILE = "</td><script>alert(1)</script>\" onload='x' & \u202e\x1b[31m \ud800"


def test_text_and_attributes_are_escaped():
    page = parsed(tag("p", HOSTILE, title=HOSTILE))
    [paragraph] = page.find("p")
    written = HOSTILE.replace("\u202e", r"\u202e").replace("\x1b", r"\x1b")
    written = written.replace("\ud800", r"\ud800")
    assert paragraph.text == written and paragraph.attributes == {"title": written}
    assert paragraph.inside == [written]  # one text, no element


def test_markup_is_kept_and_a_text_with_it_is_not():
    inner = tag("b", "<i>")
    assert tag("p", inner) == "<p><b>&lt;i&gt;</b></p>"
    assert tag("p", str(inner)) == "<p>&lt;b&gt;&amp;lt;i&amp;gt;&lt;/b&gt;</p>"


def test_attributes_that_are_none_are_left_out():
    assert (
        tag("img", hidden=True, alt="", class_=None, data_at=0) == '<img hidden alt="" data-at="0">'
    )


def test_a_table_has_a_title_for_each_column_and_row():
    page = parsed(table(["", HOSTILE], [(None, ["a", "b"]), ("differs", ["c", HOSTILE])]))
    assert [each.attributes for each in page.find("tr")] == [{}, {}, {"class": "differs"}]
    assert len(page.find("th", scope="col")) == 2 and len(page.find("th", scope="row")) == 2
    assert not page.find("script")


def test_a_slider_shows_its_last_frame_and_one_frame_has_none():
    frames = [(f"{n}", image(b"x", "grid")) for n in range(3)]
    page = parsed(slider(frames, "images"))
    assert ["hidden" in each.attributes for each in page.find("div")[1:]] == [True, True, False]
    [move] = page.find("input")
    assert (move.attributes["min"], move.attributes["max"], move.attributes["value"]) == (
        "0", "2", "2",
    )  # fmt: skip
    assert page.find("output")[0].text == "2"
    assert not parsed(slider(frames[:1], "images")).find("input")


def test_an_image_is_within_the_page():
    [found] = parsed(image(b"\x89PNG", HOSTILE)).find("img")
    kind, _, content = found.attributes["src"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(content) == b"\x89PNG"


def test_the_policy_allows_the_page_s_own_script_and_style_alone():
    page = parsed(document(HOSTILE, "text"))
    [policy] = page.find("meta", **{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.strip().split(" ", 1) for rule in policy.attributes["content"].split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for name, rule in (("script", "script-src"), ("style", "style-src")):
        [element] = page.find(name)
        digest = hashlib.sha256(element.text.encode()).digest()
        assert rules[rule] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert "url(" not in html.STYLE and "@import" not in html.STYLE
    # An attribute style="..." would be refused by the policy.
    assert not any("style" in each.attributes for each in page.below())


@pytest.mark.parametrize(
    ("axis", "value", "share"),
    [
        (Axis(0, 10), 2.5, 0.25),
        (Axis(-5, 5), 0, 0.5),
        (Axis(1, 100, log=True), 10, 0.5),
        (Axis(1e-3, 1e3, log=True), 1, 0.5),
    ],
)
def test_a_value_lies_on_its_axis(axis, value, share):
    assert axis.share(value) == pytest.approx(share)


@pytest.mark.parametrize(
    ("axis", "wanted"),
    [
        (Axis(0, 10), [0, 2, 4, 6, 8, 10]),
        (Axis(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Axis(0.9, 100_000, log=True), [1, 10, 100, 1000, 10_000, 100_000]),
        (Axis(1, 60, log=True), [1, 2, 5, 10, 20, 50]),
        (Axis(1e-9, 1e3, log=True), [1e-9, 1e-6, 1e-3, 1, 1e3]),
    ],
)
def test_ticks_are_round(axis, wanted):
    assert axis.ticks() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 3e-7),
        (249.9, 251.3),
        (3.1, 3.4),
        (-2.0, 1e9),
        (5.0, 5.0),
        (0.0, 0.0),
        (1e-320, 1e299),
        (-1e299, 1e299),
        (0.0, 5e-324),
        (0.0, 4 * (1 - 2**-53)),
        (1e-200, 1.0),
    ],
)
def test_any_axis_has_ticks_within_it(low, high):
    for log in (None, False, True):
        axis = axis_of([low, high], log)
        assert axis.low < axis.high and axis.low <= low and axis.high >= high
        ticks = axis.ticks()
        assert 2 <= len(ticks) <= 13 and all(
            -1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick in ticks
        )


def test_an_axis_is_logarithmic_over_more_than_a_decade_of_positive_values():
    assert axis_of([1, 11]).log and not axis_of([1, 9]).log and not axis_of([0, 1000]).log


def test_points_are_drawn_where_the_axes_say():
    found = parsed(plot([Line("a", [(0, 0), (50, 5), (100, 10)])], title="t", x="x"))
    dots = [
        (float(dot.attributes["cx"]), float(dot.attributes["cy"])) for dot in found.find("circle")
    ]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert LEFT <= x0 < x1 < x2 <= RIGHT and TOP <= y2 < y1 < y0 <= BOTTOM  # upwards
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02) and y0 - y1 == pytest.approx(
        y1 - y2, abs=0.02
    )
    # The numbers beside the axis, and where their grid lies.
    rows = {
        each.text: float(each.attributes["y"]) - 4
        for each in found.find("text", **{"text-anchor": "end"})
    }
    assert rows["0"] == pytest.approx(y0) and rows["10"] == pytest.approx(y2)


def test_what_is_not_finite_is_left_out():
    points = [(1, math.nan), (2, 1.0), (math.nan, 3), (4, math.inf), (5, 2.0)]
    assert len(parsed(plot([Line("a", points)], title="t", x="x")).find("circle")) == 2
    assert plot([Line("a", [(1, math.nan)])], title="t", x="x") == ""


def test_a_long_line_is_means_of_neighbours():
    drawn = plot([Line("a", [(n, n % 2) for n in range(10_000)])], title="t", x="x")
    [curve] = parsed(drawn).find("polyline")
    heights = {pair.split(",")[1] for pair in curve.attributes["points"].split()}
    assert len(curve.attributes["points"].split()) <= 240 and len(heights) == 1  # all 1/2


def test_names_of_lines_are_escaped():
    lines = [Line(HOSTILE, [(0, 1), (1, 2)], 9, dashed=True)]
    page = parsed(plot(lines, title=HOSTILE, x=HOSTILE))
    assert not page.find("script") and len(page.find("li", **{"class": "c1 dashed"})) == 1


def test_numbers_are_short():
    given = [40_000, 2e6, 1e9, 0.05, 1e-5, 0, 1500]
    assert list(map(short, given)) == ["40k", "2M", "1G", "0.05", "1e-05", "0", "1.5k"]


@pytest.mark.parametrize(
    ("low", "high"), [(1.7015, 1.7045), (5, 5.001), (31_999.5, 32_001), (0.25, 0.2500004)]
)
def test_numbers_beside_an_axis_differ(low, high):
    ticks = axis_of([low, high]).ticks()
    said = labels(ticks)
    assert len(set(said)) == len(ticks) > 1
    units = {"k": 1e3}
    read = [float(each.rstrip("k")) * units.get(each[-1], 1) for each in said]
    assert read == pytest.approx(ticks, rel=1e-9)
    drawn = parsed(plot([Line("a", [(0, low), (1, high)])], title="t", x="x"))
    assert [each.text for each in drawn.find("text", **{"text-anchor": "end"})] == said


def test_html_of_html_is_itself():
    assert isinstance(html.text(Html("<b>")), Html) and html.text(Html("<b>")) == "<b>"
    assert re.fullmatch(r"&lt;b&gt;", html.text("<b>"))
