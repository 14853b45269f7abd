"""A page in headless Chromium, spoken to over its debugging pipe."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
LIMIT = 120  # seconds for an answer


class Page:
    """One page.

    Args:
        reading, writing: ends of the pipe.
    """

    def __init__(self, reading, writing):
        self.reading, self.writing = reading, writing
        self.rest, self.number, self.session = b"", 0, None
        self.events = []

    def ask(self, method, **parameters):
        """Send a command and give its result."""
        self.number += 1
        said = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            said["sessionId"] = self.session
        os.write(self.writing, json.dumps(said).encode() + b"\0")
        return self.until(lambda answer: answer.get("id") == self.number)["result"]

    def until(self, fits):
        """Read on to a message; events on the way are kept."""
        end = time.monotonic() + LIMIT
        while True:
            while b"\0" in self.rest:
                line, _, self.rest = self.rest.partition(b"\0")
                message = json.loads(line)
                if "method" in message:
                    self.events.append(message)
                assert "error" not in message, message
                if fits(message):
                    return message
            assert select.select([self.reading], [], [], end - time.monotonic())[0], "no answer"
            self.rest += os.read(self.reading, 1 << 20)

    def open(self, url):
        """Go to a page, with all its events."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.events.clear()
        self.ask("Page.navigate", url=url)
        self.until(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, script):
        """The value of a script of the test's, which the page's policy does not hold back."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True,
                         awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def key(self, name):
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=name, code=name,
                     windowsVirtualKeyCode={"ArrowLeft": 37, "Home": 36}[name])  # fmt: skip

    def size(self, width, height=800, *, dark=False):
        """A window of this size, of a phone below 500 pixels."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def of(self, method):
        """The events of a kind since the page was opened."""
        return [each["params"] for each in self.events if each["method"] == method]


@contextlib.contextmanager
def chromium():
    """A page of a browser of its own; skips where Chromium is not installed."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    commands, answers = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        start = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
        with subprocess.Popen(
            ["bash", "-c", start, "bash", *words],
            pass_fds=(commands[0], answers[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as browser:
            os.close(commands[0])
            os.close(answers[1])
            try:
                yield Page(answers[0], commands[1])
            finally:
                browser.kill()
                os.close(commands[1])
                os.close(answers[0])
