"""A report in a browser: its slider moves, it asks for nothing, it fits a phone, light and dark."""

from __future__ import annotations

import http.server
import json
import threading

import pytest
from browser import chromium
from PIL import Image
from test_compare import a_run
from test_report import HOSTILE, known, measured

from diffusion_pl.cli import main

pytestmark = pytest.mark.slow  # a browser starts in seconds, on a busy machine in a minute


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of a hostile and a plain run, with grids and every plot."""
    home = tmp_path_factory.mktemp("home")
    runs = [a_run(home / name, {1000: 9.0, 2000: 5.0}) for name in ("a" * 80, "b")]
    for run in runs:
        measured(run, known(name=f"fd@250/{HOSTILE}/x", reference=HOSTILE, resize=HOSTILE))
        (run / "FAILED").write_text(HOSTILE)
        (run / "samples").mkdir()
        for images in (1000, 2000, 3000):
            picture = Image.new("RGB", (600, 600), (images // 20, 90, 0))
            picture.save(run / "samples" / f"{images:012d}.png")
    assert main(["report", *map(str, runs), "--no-draw", "--out", str(home / "x.html")]) == 0
    return home / "x.html"


@pytest.fixture(scope="module")
def page(report):
    with chromium() as page:
        page.open(report.as_uri())
        yield page


SHOWN = """[...document.querySelector("figure.slider .frames").children].map(e =>
    e.getBoundingClientRect().height > 100)"""
SAID = 'document.querySelector("figure.slider output").textContent'


def test_the_slider_moves(page):
    assert page.evaluate(SHOWN) == [False, False, True]
    assert page.evaluate(SAID) == "3,000 images seen"
    page.evaluate('document.querySelector("figure.slider input").focus()')
    page.key("ArrowLeft")
    assert page.evaluate(SHOWN) == [False, True, False]
    assert page.evaluate(SAID) == "2,000 images seen"
    page.key("Home")
    assert page.evaluate(SHOWN) == [True, False, False]
    assert page.evaluate(SAID) == "1,000 images seen"


def test_nothing_is_asked_for_and_nothing_is_complained_of(page, report):
    asked = {each["request"]["url"] for each in page.of("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:image/")} == {report.as_uri()}
    for method in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled",
                   "Page.javascriptDialogOpening"):  # fmt: skip
        assert not page.of(method), method
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    # The style is taken: the policy names its digest.
    assert page.evaluate('getComputedStyle(document.querySelector("nav")).display') == "flex"


def test_the_policy_holds_back_what_a_page_might_ask_for(page):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = json.dumps(f"http://127.0.0.1:{server.server_port}/x")
        found = page.evaluate(f"""new Promise(done => {{
            const found = [];
            document.addEventListener("securitypolicyviolation", event => {{
                found.push(event.effectiveDirective);
                if (found.length === 3) done(found.sort());
            }});
            new Image().src = {url};
            fetch({url}).catch(() => 0);
            const script = document.createElement("script");
            script.textContent = "window.hostile = 1";
            document.body.append(script);
        }})""")
        server.shutdown()
    assert found == ["connect-src", "img-src", "script-src-elem"] and not asked
    assert page.evaluate("window.hostile") is None


@pytest.mark.parametrize("width", [390, 800, 1400])
def test_it_fits_a_phone_and_a_desktop(page, width):
    page.size(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    low = """Math.min(...[...document.querySelectorAll("svg text")].map(e =>
        parseFloat(getComputedStyle(e).fontSize) * e.getCTM().a))"""
    assert page.evaluate(low) >= 9  # pixels of the numbers at the axes


def test_it_is_dark_where_the_reader_s_screen_is(page):
    def brightness(of):
        colour = page.evaluate(f"getComputedStyle(document.body).{of}")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))

    page.size(1000, dark=False)
    assert brightness("backgroundColor") > 700 and brightness("color") < 150
    page.size(1000, dark=True)
    assert brightness("backgroundColor") < 150 and brightness("color") > 600
