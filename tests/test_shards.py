"""Prepared shards as a source: the images that went in, in any order, by their bytes alone."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders import loader
from sharded import damage, index_of, noise, pixels, source, write

from diffusion_pl.data import tars
from diffusion_pl.data.dataset import reduced
from diffusion_pl.data.fingerprint import fingerprint, image_digests


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("sets") / "noise")


def open_tars(below: Path) -> int:
    """Tars of a folder that this process holds open; it may hold others, of other tests."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.endswith(".tar") and Path(link).is_relative_to(below) for link in links)


@pytest.mark.parametrize("cache", ["disk", "memory"])
@pytest.mark.parametrize("encoding", ["png", "raw", "webp"])
def test_images_come_back_as_they_went_in(tmp_path, encoding, cache):
    folder = write(tmp_path / "set", encoding=encoding)
    for side in (16, 8):
        images = source(folder, cache=cache).open(side)
        truth = pixels(range(20), side)
        assert torch.equal(images.read(torch.arange(20)), truth)
        assert images.labels.tolist() == [i % 3 for i in range(20)]
        assert images.classes == 3
        digests = image_digests(truth.numpy())
        assert images.fingerprint == fingerprint(digests, truth.shape, images.labels.numpy())
        assert (images.name, images.shards) == (f"noise-{side}", (6, 6, 6, 2))


def test_images_in_memory_need_no_shards_any_more(tmp_path):
    folder = write(tmp_path / "set")
    images = source(folder, cache="memory").open()
    shutil.rmtree(folder)
    assert torch.equal(images.read(torch.arange(20)), pixels(range(20), 16))
    assert images.shards == (6, 6, 6, 2)


def test_jpeg_decodes_to_what_prepare_took_the_fingerprint_of(tmp_path):
    folder = write(tmp_path / "set", encoding="jpeg")
    # Opening in memory compares the fingerprints of what the two ways of decoding give.
    images = source(folder, cache="memory").open().read(torch.arange(20)).float()
    assert (images - pixels(range(20), 16)).abs().mean() < 20


def test_images_come_in_the_order_asked_for_with_repeats(made):
    images = source(made).open()
    wanted = torch.tensor([19, 0, 7, 7, 12, 0])
    truth = np.stack([noise(i, 16) for i in wanted.tolist()])
    assert torch.equal(images.read(wanted), torch.from_numpy(truth))
    assert images.read(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 16, 16)


def test_unlabelled_sets_have_no_labels(tmp_path):
    images = source(write(tmp_path / "set", labels=False)).open()
    assert images.labels is None
    assert images.classes == 0


def test_a_batch_reads_the_bytes_of_its_resolution_alone(made, monkeypatch):
    taken = []

    def counted(descriptor, buffers, offset):
        read = preadv(descriptor, buffers, offset)
        taken.append((offset, read))
        return read

    preadv = os.preadv
    images = source(made).open(8)
    monkeypatch.setattr(os, "preadv", counted)
    images.read(torch.arange(20))
    rows = index_of(made)
    assert sorted(taken) == sorted(
        zip(rows["offset_8"].tolist(), rows["length_8"].tolist(), strict=True)
    )


def test_shards_stay_open_within_the_limit_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "OPEN_FILES", 3)
    images = source(write(tmp_path / "set", shard_images=1)).open()
    assert torch.equal(images.read(torch.arange(20)), pixels(range(20), 16))
    assert open_tars(tmp_path) == 20  # the limits of a process are tried in test_open_files
    del images
    assert open_tars(tmp_path) == 0


def test_threads_and_forked_processes_read_the_same_open_files(made):
    images = source(made).open()
    images.read(torch.arange(20))
    truth = pixels(range(20), 16)
    wrong = []

    def check() -> None:
        for turn in range(20):
            order = torch.randperm(20, generator=torch.Generator().manual_seed(turn))
            if not torch.equal(images.read(order), truth[order]):
                wrong.append(turn)
        if wrong and multiprocessing.parent_process():
            os._exit(1)

    threads = [threading.Thread(target=check) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=check) for _ in range(2)]
    for process in processes:
        process.start()
    check()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert not wrong


def test_images_travel_to_another_process_without_their_index(made):
    images = source(made).open()
    images.read(torch.arange(3))
    sent = pickle.dumps(images)
    assert b"offset_16" not in sent  # the index has such columns
    assert torch.equal(pickle.loads(sent).read(torch.arange(20)), pixels(range(20), 16))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_loader_of_shards_resumes_exactly_with_any_workers(made, workers):
    images = source(made, window=2).open()
    resumed = loader(images, 6, 9, seed=3, start=5, num_workers=workers)
    whole = [resumed[step] for step in range(9)]
    rest = list(resumed)
    for old, new in zip(whole[5:], rest, strict=True):
        assert all(torch.equal(old[key], new[key]) for key in ("image", "label", "index"))


def test_a_prepared_resolution_is_not_reduced_from_another(made):
    small = source(made).open(8).read(torch.arange(20))
    assert not torch.equal(reduced(source(made).open(), 8).read(torch.arange(20)), small)


def test_memory_does_not_grow_over_epochs(made):
    images = source(made).open()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def epochs(count: int) -> None:
        for first in range(0, 1000 * count, 50):
            images.read(torch.arange(first, first + 50) % 20)

    epochs(1)
    before = resident()
    epochs(3)
    # 3,000 images decoded are 2.3 MB, their files as much; an open file or a row kept for each of
    # them would show.
    assert resident() - before < 1_000_000


def test_a_broken_image_is_replaced_by_the_next_good_one_of_its_label(tmp_path):
    folder = write(tmp_path / "set")
    for image in (4, 7, 19):
        damage(folder, image, 16)
    images = source(folder, skip_broken=3).open()
    wanted = torch.tensor([4, 19, 5])
    with pytest.warns(UserWarning, match="replaced by the next good image: .*000000004"):
        found = images.read(wanted)
    # A second warning would be an error.
    assert torch.equal(images.read(wanted), found)
    # 4 and 7 have label 1, as has 10; after 19 comes 1.
    truth = np.stack([noise(10, 16), noise(1, 16), noise(5, 16)])
    assert torch.equal(found, torch.from_numpy(truth))
    assert images.broken == 3


def test_one_broken_image_too_many_stops(tmp_path):
    folder = write(tmp_path / "set")
    for image in (4, 5):
        damage(folder, image, 16)
    images = source(folder, skip_broken=1).open()
    with pytest.warns(UserWarning, match="replaced"):
        images.read(torch.tensor([4]))
    with pytest.raises(
        ValueError, match="2 broken images, data.dataset.skip_broken is 1: .*000000005"
    ):
        images.read(torch.tensor([5]))


def test_the_last_of_a_label_has_no_replacement(tmp_path):
    folder = write(tmp_path / "set", count=4)
    damage(folder, 1, 16)
    images = source(folder, skip_broken=2).open()
    with (
        pytest.warns(UserWarning, match="replaced"),
        pytest.raises(ValueError, match="000000001.16.png: its check sum is wrong"),
    ):
        images.read(torch.tensor([1]))


def test_broken_images_may_be_kept_in_memory_when_they_are_replaced(tmp_path):
    folder = write(tmp_path / "set")
    damage(folder, 2, 8)
    with pytest.warns(UserWarning, match="replaced"):
        images = source(folder, cache="memory", skip_broken=1).open(8)
    assert torch.equal(images.read(torch.tensor([2]))[0], torch.from_numpy(noise(5, 8)))
