"""Servers of shards that tests start: over HTTP, and one that speaks S3."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder and counts what it was asked for; each name in `flaws` fails once."""

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        self.asked: list[str] = []
        self.flaws: dict[str, int | str] = {}
        self.ranges = ranges
        self.ranges_asked: list[str | None] = []
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        flaw = None
        if not head:
            self.server.asked.append(path.name)
            self.server.ranges_asked.append(self.headers.get("Range"))
            flaw = self.server.flaws.pop(path.name, None)
        if isinstance(flaw, int) and flaw < 0:
            self.send_error(-flaw)
            return
        wanted = self.headers.get("Range") if self.server.ranges else None
        first, last = 0, len(data) - 1
        if wanted:
            start, end = wanted.removeprefix("bytes=").split("-")
            first, last = int(start), min(int(end), last) if end else last
        body = data[first : last + 1]
        if flaw == "damage":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(206 if wanted else 200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body[: len(body) // 2] if flaw == "half" else body)


@contextlib.contextmanager
def served(folder: Path, ranges: bool = True) -> Iterator[Server]:
    with Server(folder, ranges) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """The address of an S3 server with a bucket `bucket` open to the test's credentials."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A process of its own, whose warnings are not the tests'.
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                request = urllib.request.Request(f"{url}/bucket", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "moto's server did not start"
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def upload(url: str, folder: Path, prefix: str) -> None:
    """Put a folder's files into the bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            request = urllib.request.Request(
                f"{url}/bucket/{prefix}/{path.relative_to(folder)}",
                path.read_bytes(),
                {"Content-Type": "application/octet-stream"},
                method="PUT",
            )
            urllib.request.urlopen(request, timeout=10).close()
