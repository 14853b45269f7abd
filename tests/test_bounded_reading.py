"""Servers that are silent, drip, have no end or send elsewhere: given up soon, in one line."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import threading
import time
from contextlib import contextmanager, suppress

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from servers import served
from sharded import pixels, source, write

from diffusion_pl.io import cache as remote
from diffusion_pl.io import download
from diffusion_pl.io.cache import Cache
from diffusion_pl.io.download import Patience, fetch

# A second in place of a minute.
SHORT = Patience(silence=0.3, slowest=1000, window=0.3, total=0.8)
SECONDS = 8.0  # that reading may take then, on a busy machine


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for module in (download, remote):
        monkeypatch.setattr(module, "PATIENCE", SHORT)


class Rude(http.server.BaseHTTPRequestHandler):
    """A server that does not behave."""

    kind = ""

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked += 1
        with suppress(OSError):  # whoever asked has left
            getattr(self, self.kind)()

    def head(self, length=None, code=200, **more):
        self.send_response(code)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()

    def silent(self):
        self.server.stop.wait(60)

    def silent_within(self):
        self.head(5000)
        self.wfile.write(b"x" * 100)
        self.server.stop.wait(60)

    def drips(self):
        self.head(5000)
        while not self.server.stop.wait(0.05):
            self.wfile.write(b"x")

    def drips_its_head(self):
        while not self.server.stop.wait(0.05):
            self.wfile.write(b"H")

    def a_byte_each_time(self):
        if "Range" in self.headers:
            start = self.headers["Range"][6:-1]
            self.head(5000, 206, **{"Content-Range": f"bytes {start}-4999/5000"})
        else:
            self.head(5000)
        self.wfile.write(b"x")

    def endless(self):
        self.head()
        while not self.server.stop.is_set():
            self.server.sent += self.connection.send(b" " * 65536)

    def endless_in_its_part(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.head(code=206, **{"Content-Range": f"bytes {start}-4999/5000"})
        while not self.server.stop.is_set():
            self.server.sent += self.connection.send(b" " * 65536)

    def elsewhere(self):
        self.head(0, 302, Location="ftp://127.0.0.1/file")

    def round_and_round(self):
        self.head(0, 302, Location=self.path)

    def nothing(self):
        self.head(0)


KINDS = [name for name in vars(Rude) if not name.startswith(("_", "do_", "log", "head", "kind"))]


@contextmanager
def rude(kind):
    handler = type("Handler", (Rude,), {"kind": kind})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads, server.asked, server.sent = True, 0, 0
        server.stop = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.stop.set()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_of_a_rude_server_is_one_line_soon(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_pl.data.shards.LARGEST_MANIFEST", 10_000)
    with rude(kind) as server:
        begun = time.monotonic()
        with pytest.raises(ValueError, match=f"^{server.url}/dataset.json: ") as told:
            source(server.url, cache_folder=str(tmp_path / "cache")).prepare()
        assert time.monotonic() - begun < SECONDS
        # What the kernel holds on both sides is a few MiB; nobody asked for gigabytes.
        assert server.sent < 30_000_000
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nothing"])
def test_a_shard_of_a_rude_server_is_one_line_soon(kind, tmp_path):
    cache = Cache(tmp_path / "cache", 10_000, attempts=3, backoff=0.01)
    with rude(kind) as server:
        begun = time.monotonic()
        with pytest.raises(ValueError, match=f"^{server.url}/x.tar: cannot be fetched"):
            cache.fetch(f"{server.url}/x.tar", f"{'0' * 64}.tar", 5000, "0" * 64)
        assert time.monotonic() - begun < SECONDS
        assert server.sent < 30_000_000
    assert [path.name for path in cache.folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nothing"])
def test_a_download_from_a_rude_server_is_one_line_soon(kind, tmp_path):
    with rude(kind) as server:
        begun = time.monotonic()
        with pytest.raises(ValueError, match="cannot be fetched|what arrived is damaged"):
            fetch(server.url, tmp_path / "x", "0" * 64, attempts=3, backoff=0.01, largest=10_000)
        assert time.monotonic() - begun < SECONDS
        assert server.sent < 30_000_000
    assert not (tmp_path / "x").exists()


def test_a_header_of_the_users_goes_to_no_other_machine(tmp_path, monkeypatch):
    """What the user has set for a server is sent there, and not where it redirects to."""
    seen = []

    class Asked(Rude):
        kind = "asked"

        def asked(self):
            seen.append((self.path, self.headers["Authorization"]))
            if self.path == "/set/dataset.json":
                self.head(0, 302, Location="/moved")
            elif self.path == "/moved":
                self.head(0, 302, Location=self.server.url.replace("127.0.0.1", "localhost"))
            else:
                self.head(2)
                self.wfile.write(b"{}")

    monkeypatch.setitem(
        fsspec.config.conf, "http", {"client_kwargs": {"headers": {"Authorization": "Bearer 1"}}}
    )
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asked) as server:
        server.asked, server.url = 0, f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        assert remote.read(f"{server.url}/set/dataset.json", 100) == b"{}"
        server.shutdown()
    assert seen == [("/set/dataset.json", "Bearer 1"), ("/moved", "Bearer 1"), ("/", None)]


def test_a_slow_server_that_gets_on_is_waited_for(tmp_path):
    content = bytes(range(256)) * 20

    class Slow(Rude):
        kind = "slow"

        def slow(self):
            self.head(len(content))
            for start in range(0, len(content), 512):
                time.sleep(0.1)  # 5 kB a second
                self.wfile.write(content[start : start + 512])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        server.asked = 0
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        digest = hashlib.sha256(content).hexdigest()
        cache = Cache(tmp_path / "cache", 10_000)
        url = f"http://127.0.0.1:{server.server_port}/x"
        assert cache.fetch(url, f"{digest}.tar", len(content), digest).read_bytes() == content
        assert server.asked == 1
        server.shutdown()


class Stuck(MemoryFileSystem):
    """A library that waits for ever for its server."""

    protocol = "stuck"
    store = {}  # noqa: RUF012 - as fsspec's own
    stop = threading.Event()

    def _open(self, path, mode="rb", **more):
        self.stop.wait(60)
        raise OSError("stopped")


def test_a_library_that_waits_for_ever_is_left(tmp_path):
    fsspec.register_implementation("stuck", Stuck, clobber=True)
    begun = time.monotonic()
    with pytest.raises(ValueError, match="^stuck://set/dataset.json: cannot be fetched.*no answer"):
        source("stuck://set", cache_folder=str(tmp_path / "cache")).prepare()
    assert time.monotonic() - begun < SECONDS
    Stuck.stop.set()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sets") / "noise")


@pytest.fixture
def filled(made, tmp_path):
    """A server, and the cache that has all of its shards."""
    with served(made) as server:
        data = source(server.url, cache_folder=str(tmp_path / "cache"))
        data.open().read(torch.arange(20))
        server.asked.clear()
        yield server, data, sorted((tmp_path / "cache").glob("*.tar"))


def spoil_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:700])


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def fifo(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut, zeros, link, fifo])
def test_a_cached_shard_that_is_damaged_is_fetched_again(filled, damage):
    server, data, shards = filled
    damage(shards[1])
    assert torch.equal(data.open().read(torch.arange(20)), pixels(range(20), 16))
    assert len([name for name in server.asked if name.endswith(".tar")]) == 1
    assert shards[1].is_file() and not shards[1].is_symlink()


def test_every_damaged_byte_of_the_pixels_is_noticed_and_fetched_again(filled):
    server, data, shards = filled
    for shard in shards:  # not in every place is there a pixel
        zeros(shard)
    images = data.open()
    assert torch.equal(images.read(torch.arange(20)), pixels(range(20), 16))
    assert len([name for name in server.asked if name.endswith(".tar")]) == len(shards)
    server.asked.clear()
    assert torch.equal(images.read(torch.arange(20)), pixels(range(20), 16))
    assert not server.asked


def test_a_shard_that_is_damaged_where_it_comes_from_is_named(made, tmp_path, monkeypatch):
    folder = shutil.copytree(made, tmp_path / "set")
    with served(folder) as server:
        data = source(server.url, cache_folder=str(tmp_path / "cache"))
        images = data.open()
        images.read(torch.arange(20))
        for shard in [*(folder / "shards").iterdir(), *(tmp_path / "cache").glob("*.tar")]:
            zeros(shard)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        with pytest.raises(ValueError, match="cannot be fetched.*another sha256"):
            images.read(torch.arange(20))


@pytest.mark.parametrize("damage", [spoil_byte, cut])
def test_a_cached_index_that_is_damaged_is_fetched_again(filled, damage, tmp_path):
    server, data, _ = filled
    [index] = (tmp_path / "cache").rglob("index.npy")
    damage(index)
    assert torch.equal(data.open().read(torch.arange(20)), pixels(range(20), 16))
    assert server.asked.count("index.npy") == 1


def test_locks_follow_no_links(filled, tmp_path):
    _, data, shards = filled
    precious = tmp_path / "precious"
    precious.write_text("mine")
    lock = tmp_path / "cache" / ".lock"
    lock.unlink()
    lock.symlink_to(precious)
    shards[0].unlink()
    with pytest.raises(ValueError, match=r"\.lock: is a link or not a regular file"):
        data.open().read(torch.arange(20))
    lock.unlink()
    part = shards[0].with_name(f"{shards[0].name}.part")
    part.unlink(missing_ok=True)
    part.symlink_to(precious)
    with pytest.raises(ValueError, match=r"\.part: is a link or not a regular file"):
        data.open().read(torch.arange(20))
    assert precious.read_text() == "mine"


def test_a_cache_removes_nothing_that_it_did_not_write(filled, made, tmp_path):
    server, _, shards = filled
    mine = [tmp_path / "cache" / name for name in ("000001.tar", "photo.png", "thesis.tar.part")]
    for path in mine:
        path.write_bytes(b"x" * 100_000)
    sizes = [path.stat().st_size for path in shards]
    cache = Cache(tmp_path / "cache", max(sizes), backoff=0.01)
    digest = shards[0].name[:64]
    shards[0].unlink()
    listed = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path.name
        for path in (made / "shards").glob("*.tar")
    }
    cache.fetch(f"{server.url}/shards/{listed[digest]}", shards[0].name, sizes[0], digest)
    assert [path.name for path in (tmp_path / "cache").glob("?" * 64 + ".tar")] == [shards[0].name]
    assert all(path.stat().st_size == 100_000 for path in mine)
