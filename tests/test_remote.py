"""Shards at an address: fetched whole, checked, shared, bounded, and fetched again."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from loaders import loader
from servers import s3, served, upload
from sharded import edit, pixels, source, write

from diffusion_pl.data.order import Order
from diffusion_pl.io import cache as remote
from diffusion_pl.io.cache import Cache


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("sets") / "noise")


@pytest.fixture
def server(made):
    with served(made) as server:
        yield server


@pytest.fixture
def files(tmp_path):
    """A server of ten files of 1,000 bytes, and their digests."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.tar").write_bytes(os.urandom(1000))
    with served(folder) as server:
        server.digests = [
            hashlib.sha256((folder / f"{n}.tar").read_bytes()).hexdigest() for n in range(10)
        ]
        yield server


def fetch(cache, server, number):
    digest = server.digests[number]
    return cache.fetch(f"{server.url}/{number}.tar", f"{digest}.tar", 1000, digest)


def kept(cache, server=None):
    """The names in a cache; with a server, of its files."""
    names = [path.name for path in cache.folder.iterdir() if path.name != ".lock"]
    for number, digest in enumerate(server.digests if server else ()):
        names = [name.replace(digest, str(number)) for name in names]
    return sorted(names)


def at(url, tmp_path, **settings):
    return source(url, cache_folder=str(tmp_path / "cache"), **settings)


@pytest.mark.parametrize("ranges", [True, False])
def test_images_over_http_are_those_of_the_folder(made, tmp_path, ranges):
    with served(made, ranges) as server:
        for side in (16, 8):
            images = at(server.url, tmp_path).open(side)
            assert torch.equal(images.read(torch.arange(20)), pixels(range(20), side))
            assert images.fingerprint == source(made).open(side).fingerprint
        # Each shard once for both resolutions.
        assert sorted(name for name in server.asked if name.endswith(".tar")) == [
            f"{number:06d}.tar" for number in range(4)
        ]


def test_forked_workers_fetch_each_shard_once_between_them(server, tmp_path):
    images = at(server.url, tmp_path).open()
    images.read(torch.tensor([0]))
    found = list(loader(images, 5, 8, num_workers=2))
    expected = Order(20, 0)(0, 40)
    truth = pixels(range(20), 16)[expected]
    assert torch.equal(torch.cat([batch["image"] for batch in found]), truth)
    assert sorted(name for name in server.asked if name.endswith(".tar")) == [
        f"{number:06d}.tar" for number in range(4)
    ]


@pytest.mark.parametrize("flaw", ["half", "damage", -503])
@pytest.mark.parametrize("ranges", [True, False])
def test_what_fails_once_is_fetched_again(made, tmp_path, flaw, ranges, monkeypatch):
    monkeypatch.setattr(remote, "Cache", partial(Cache, backoff=0.01))
    monkeypatch.setattr(remote, "read", partial(remote.read, backoff=0.01))
    with served(made, ranges) as server:
        server.flaws["000001.tar"] = flaw
        server.flaws["index.npy"] = flaw
        server.flaws["dataset.json"] = "half" if flaw == "damage" else flaw  # it has no digest
        images = at(server.url, tmp_path).open()
        assert torch.equal(images.read(torch.arange(20)), pixels(range(20), 16))
        assert not server.flaws
        assert server.asked.count("000001.tar") >= 2
        assert server.asked.count("dataset.json") == 2
        assert server.asked.count("000002.tar") == 1


def test_a_copy_goes_on_where_it_broke_off(files, tmp_path):
    files.flaws["0.tar"] = "half"
    path = fetch(Cache(tmp_path / "cache", 5000, backoff=0.05), files, 0)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == files.digests[0]
    assert files.ranges_asked == [None, "bytes=500-"]


def test_a_server_that_never_gives_it_is_named_in_one_line(files, tmp_path):
    cache = Cache(tmp_path / "cache", 5000, attempts=3, backoff=0.01)
    url = f"{files.url}/3.tar"
    with pytest.raises(ValueError, match=f"^{url}: cannot be fetched in 3 attempts") as told:
        cache.fetch(url, "3.tar", 1000, "0" * 64)
    assert "another sha256" in str(told.value)
    assert "\n" not in str(told.value)
    assert files.asked.count("3.tar") == 3
    assert kept(cache) == []
    with pytest.raises(ValueError, match=r"absent.tar: the server has no such file"):
        cache.fetch(f"{files.url}/absent.tar", "absent.tar", 1000, "0" * 64)


def test_attempts_wait_twice_as_long_each_time(files, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    cache = Cache(tmp_path / "cache", 5000, attempts=4, backoff=0.5)
    with pytest.raises(ValueError, match="in 4 attempts"):
        cache.fetch(f"{files.url}/3.tar", "3.tar", 1000, "0" * 64)
    assert waits == [0.5, 1.0, 2.0]


def test_an_address_of_an_unknown_kind_is_not_asked_again(tmp_path):
    with pytest.raises(ValueError, match="gopher://x/dataset.json: cannot be opened"):
        at("gopher://x", tmp_path).prepare()


def test_a_remote_set_that_is_not_prepared_or_of_another_format(made, tmp_path):
    folder = write(tmp_path / "set")
    with served(folder) as server:
        with pytest.raises(ValueError, match=f"{server.url}/no: not prepared"):
            at(f"{server.url}/no", tmp_path).prepare()
        edit(folder, format=7)
        with pytest.raises(ValueError, match=f"{server.url}/dataset.json: format 7"):
            at(server.url, tmp_path).prepare()


def test_a_set_that_is_prepared_anew_is_seen(tmp_path):
    with served(tmp_path) as server:
        for name, count in (("old", 20), ("new", 14)):
            write(tmp_path / name, count)
        (tmp_path / "set").symlink_to(tmp_path / "old")
        assert len(at(f"{server.url}/set", tmp_path).open()) == 20
        (tmp_path / "set").unlink()
        (tmp_path / "set").symlink_to(tmp_path / "new")
        images = at(f"{server.url}/set", tmp_path).open()
        assert torch.equal(images.read(torch.arange(14)), pixels(range(14), 16))


def test_the_cache_keeps_what_was_used_last_within_its_bytes(files, tmp_path):
    cache = Cache(tmp_path / "cache", 3000)
    for number in (0, 1, 2, 0, 3):
        fetch(cache, files, number)
        time.sleep(0.01)
    assert kept(cache, files) == ["0.tar", "2.tar", "3.tar"]
    assert files.asked == ["0.tar", "1.tar", "2.tar", "3.tar"]


def test_the_shards_of_a_window_must_fit_in_the_cache(server, tmp_path, made):
    sizes = sorted((path.stat().st_size for path in (made / "shards").iterdir()), reverse=True)
    two = sum(sizes[:2])
    at(server.url, tmp_path, window=2, cache_bytes=two).prepare()
    for window, bytes in ((3, two), (0, two), (2, two - 1)):
        with pytest.raises(ValueError, match="raise it or lower data.dataset.window"):
            at(server.url, tmp_path, window=window, cache_bytes=bytes).prepare()


def test_a_small_cache_serves_all_shards_and_leaves_no_removed_one_open(server, tmp_path, made):
    most = max(path.stat().st_size for path in (made / "shards").iterdir())
    data = at(server.url, tmp_path, window=1, cache_bytes=2 * most)
    images = data.open()
    for turn in range(3):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(turn))
        assert torch.equal(images.read(order), pixels(range(20), 16)[order])
    folder = tmp_path / "cache"
    assert sum(path.stat().st_size for path in folder.glob("*.tar")) <= 2 * most
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    removed = [link for link in links if str(folder) in link and link.endswith("(deleted)")]
    assert len(removed) <= 1


def test_what_is_larger_than_the_cache_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="1,000 bytes, and data.dataset.cache_bytes is 999"):
        fetch(Cache(tmp_path / "cache", 999), files, 0)


def size_of(entry):
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return 0


def _fetch_all(folder, url, digests, turn):
    cache = Cache(folder, 3000, backoff=0.01)
    for number in (*range(turn, 10), *range(turn)):
        name = f"{digests[number]}.tar"
        path = cache.fetch(f"{url}/{number}.tar", name, 1000, digests[number])
        with suppress(FileNotFoundError):  # another process made room
            assert hashlib.sha256(path.read_bytes()).hexdigest() == digests[number]
        with (folder / ".lock").open() as lock:
            # Room is made and taken under this lock, so what is seen here is of one moment.
            fcntl.flock(lock, fcntl.LOCK_EX)
            sizes = [size_of(entry) for entry in os.scandir(folder)]
        assert sum(sizes) <= 3000


def test_processes_share_a_cache_smaller_than_what_they_want(files, tmp_path):
    context = multiprocessing.get_context("fork")
    folder = tmp_path / "cache"
    folder.mkdir()
    arguments = [(folder, files.url, files.digests, turn) for turn in (0, 2, 5, 7)]
    processes = [context.Process(target=_fetch_all, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert not [name for name in kept(Cache(folder, 3000)) if name.endswith(".part")]


def test_many_at_once_ask_for_a_file_once(files, tmp_path):
    cache = Cache(tmp_path / "cache", 3000)
    threads = [threading.Thread(target=fetch, args=(cache, files, 5)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files.asked == ["5.tar"]
    assert kept(cache, files) == ["5.tar"]


def test_what_a_killed_process_left_is_fetched_or_removed(files, tmp_path):
    cache = Cache(tmp_path / "cache", 3000)
    cache.folder.mkdir()
    for number in (0, 1):
        (cache.folder / f"{files.digests[number]}.tar.part").write_bytes(b"x" * 1500)
    assert fetch(cache, files, 0).read_bytes()[:1] != b""
    assert kept(cache, files) == ["0.tar", "1.tar.part"]
    fetch(cache, files, 2)
    assert kept(cache, files) == ["0.tar", "2.tar"]


def test_a_part_that_is_removed_while_it_is_waited_for_is_begun_anew(files, tmp_path):
    cache = Cache(tmp_path / "cache", 3000)
    cache.folder.mkdir()
    part = cache.folder / f"{files.digests[0]}.tar.part"
    with part.open("wb") as other, ThreadPoolExecutor(1) as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = pool.submit(fetch, cache, files, 0)
        time.sleep(0.2)
        part.unlink()
        fcntl.flock(other, fcntl.LOCK_UN)
        path = waiting.result()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == files.digests[0]


def _fetch_with_little_disk(folder, url, digest, told):
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    try:
        Cache(folder, 5000).fetch(f"{url}/0.tar", "0.tar", 1000, digest)
    except ValueError as error:
        told.put(str(error))


def test_a_disk_that_does_not_take_it_is_told_in_one_line(files, tmp_path):
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    folder = tmp_path / "cache"
    process = context.Process(
        target=_fetch_with_little_disk, args=(folder, files.url, files.digests[0], told)
    )
    process.start()
    process.join()
    text = told.get()
    assert text.startswith(f"{folder}: {files.url}/0.tar cannot be kept here (File too large)")
    assert "data.dataset.cache_folder" in text
    assert "\n" not in text
    assert kept(Cache(folder, 5000)) == []


def test_a_cache_that_cannot_be_made_is_told(files, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="cannot be kept here"):
        fetch(Cache(tmp_path / "cache", 5000), files, 0)


def test_images_from_s3_are_those_of_the_folder(made, tmp_path, monkeypatch):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    with s3() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        upload(url, made, "sets/noise")
        images = at("s3://bucket/sets/noise/", tmp_path).open()
        assert torch.equal(images.read(torch.arange(20)), pixels(range(20), 16))
        with pytest.raises(ValueError, match="s3://bucket/sets/nothing: not prepared"):
            at("s3://bucket/sets/nothing", tmp_path).open()
