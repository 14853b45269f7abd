"""Downloads against a real server on this machine: resumed, checked, and never half in place."""

import hashlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diffusion_pl.io.download import Copy, UnwritableError, fetch

CONTENT = bytes(range(251)) * 12_000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server does, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)  # answered first, one a request
    breaks_after: list[int] = field(default_factory=list)  # bytes sent, one a request
    asked: list[str | None] = field(default_factory=list)


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            server.asked.append(wanted)
            if server.statuses:
                self.send_error(server.statuses.pop(0))
                return
            start = int(wanted[6:-1]) if wanted and server.ranges else 0
            body = server.content[start:]
            if start and not body:
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                last = len(server.content) - 1
                self.send_header("Content-Range", f"bytes {start}-{last}/{last + 1}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: server.breaks_after.pop(0)] if server.breaks_after else body)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on the loopback interface, asked without any proxy of the environment."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(state)) as http:
        state.url = f"http://127.0.0.1:{http.server_port}/file.bin"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


def test_a_file_arrives_whole_and_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "file.bin"
    assert fetch(server.url, path, DIGEST) == path
    assert path.read_bytes() == CONTENT
    fetch(server.url, path, DIGEST)
    assert server.asked == [None]
    assert list(path.parent.iterdir()) == [path]


def test_a_connection_that_breaks_off_is_resumed_where_it_broke(
    server: Server, tmp_path: Path
) -> None:
    server.breaks_after = [1_000_000, 500_000]
    path = fetch(server.url, tmp_path / "file.bin", DIGEST, backoff=0.0)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_second_call_resumes_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:777])
    assert fetch(server.url, tmp_path / "file.bin", DIGEST).read_bytes() == CONTENT
    assert server.asked == ["bytes=777-"]


def test_a_complete_part_needs_no_further_byte(server: Server, tmp_path: Path) -> None:
    """As after a crash between the last byte and the renaming."""
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch(server.url, tmp_path / "file.bin", DIGEST).read_bytes() == CONTENT


def test_who_fetches_at_the_same_time_waits_for_the_first(server: Server, tmp_path: Path) -> None:
    """As ranks do that share a folder."""
    path, got = tmp_path / "file.bin", []
    ranks = [
        threading.Thread(target=lambda: got.append(fetch(server.url, path, DIGEST).read_bytes()))
        for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert got == [CONTENT] * 4
    assert server.asked == [None]
    assert list(tmp_path.iterdir()) == [path]


def test_a_server_that_cannot_resume_begins_again(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.breaks_after = [1000]
    path = fetch(server.url, tmp_path / "file.bin", DIGEST, backoff=0.0)
    assert path.read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    path = fetch(server.url, tmp_path / "file.bin", DIGEST, backoff=0.0)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(("statuses", "requests"), [([404], 1), ([403], 1), ([503] * 9, 3)])
def test_a_refusal_says_where_to_put_the_file(
    server: Server, tmp_path: Path, statuses: list[int], requests: int
) -> None:
    server.statuses = list(statuses)
    path = tmp_path / "file.bin"
    line = rf"answers {statuses[0]} .*put it at {re.escape(str(path))}$"
    with pytest.raises(ValueError, match=line):
        fetch(server.url, path, DIGEST, attempts=3, backoff=0.0)
    assert len(server.asked) == requests
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_never_gets_on_is_given_up(server: Server, tmp_path: Path) -> None:
    server.breaks_after = [1000] + [0] * 9
    with pytest.raises(ValueError, match="broke off"):
        fetch(server.url, tmp_path / "file.bin", DIGEST, attempts=3, backoff=0.0)
    assert len(server.asked) == 4
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:1000]


def test_no_network_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.bin"
        with pytest.raises(ValueError, match=r"cannot be fetched .*put it at .*file\.bin$"):
            fetch(url, tmp_path / "file.bin", DIGEST, attempts=2, backoff=0.0)


def test_a_silent_server_is_given_up_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file.bin"
        with pytest.raises(ValueError, match="timed out"):
            fetch(url, tmp_path / "file.bin", DIGEST, attempts=2, backoff=0.0, timeout=0.1)


def test_a_wrong_digest_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"?"
    with pytest.raises(ValueError, match=f"expected {DIGEST}"):
        fetch(server.url, tmp_path / "file.bin", DIGEST)
    assert list(tmp_path.iterdir()) == []


def test_a_stale_part_is_dropped_and_the_next_call_succeeds(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"?" * 5000)
    with pytest.raises(ValueError, match="damaged or has changed"):
        fetch(server.url, tmp_path / "file.bin", DIGEST)
    assert fetch(server.url, tmp_path / "file.bin", DIGEST).read_bytes() == CONTENT


def test_a_file_of_the_user_with_another_digest_is_not_touched(
    server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="move it away"):
        fetch(server.url, path, DIGEST)
    assert path.read_bytes() == b"mine"
    assert server.asked == []


def test_a_folder_that_cannot_be_made_is_one_clear_line(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be written"):
        fetch(server.url, tmp_path / "file" / "file.bin", DIGEST)


def test_only_web_addresses_are_fetched(tmp_path: Path) -> None:
    """urllib would also read file:// addresses."""
    with pytest.raises(ValueError, match="not an http or https address"):
        fetch((tmp_path / "x").as_uri(), tmp_path / "file.bin", DIGEST)


def test_a_disk_that_refuses_a_block_is_not_the_servers_fault(tmp_path: Path) -> None:
    part = os.open(tmp_path / "x.part", os.O_RDONLY | os.O_CREAT)
    try:
        with pytest.raises(UnwritableError):
            Copy(part, 10).write(0, [b"block"])
    finally:
        os.close(part)
