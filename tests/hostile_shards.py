"""Hostile shards: a prepared set of 20 images in 4 shards with one of its files changed."""

from __future__ import annotations

import dataclasses
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hostile import Runs, case, changed
from sharded import damage, index_of, reindex, rewrite, source, write

from diffusion_pl.data.shard_format import Manifest


def prepared(place: Path, **settings) -> Path:
    return write(place / "set", sides=(8,), **settings)


def read_all(folder: Path) -> Callable[[], object]:
    return lambda: source(folder, 8).open().read(torch.arange(20))


SHARD = "shards/000001.tar"


@case(SHARD, "is damaged, its sha256 is", "prepare the data again")
def shard_cut_inside_an_image(place):
    changed(prepared(place) / SHARD, lambda data: data.__delitem__(slice(700, None)))
    return ["verify", "set"]


@case(SHARD, "bytes where", "were written")
def shard_cut_at_the_boundary_of_a_member(place):
    folder = prepared(place)
    row = index_of(folder)[7]
    changed(folder / SHARD, lambda data: data.__delitem__(slice(int(row["offset_8"]) - 512, None)))
    return read_all(folder)


@case(SHARD, "bytes where")
def shard_cut_inside_a_header(place):
    folder = prepared(place)
    changed(folder / SHARD, lambda data: data.__delitem__(slice(300, None)))
    return read_all(folder)


@case(SHARD, "is damaged")
def shard_with_one_byte_of_a_header_flipped(place):
    changed(prepared(place) / SHARD, lambda data: data.__setitem__(3, data[3] ^ 1))
    return ["verify", "set"]


@case(SHARD, "is damaged")
def shard_whose_label_member_is_another(place):
    folder = prepared(place)
    tar = folder / SHARD
    with tarfile.open(tar) as archive:
        [at, *_] = [m.offset_data for m in archive if m.name.endswith(".cls")]
    changed(tar, lambda data: data.__setitem__(at, ord("2")))
    return ["verify", "set"]


@case(SHARD, "bytes where")
def shard_of_end_blocks_alone(place):
    folder = prepared(place)
    (folder / SHARD).write_bytes(bytes(10_240))
    return read_all(folder)


@case(SHARD, "0 bytes where")
def shard_without_a_byte(place):
    folder = prepared(place)
    (folder / SHARD).write_bytes(b"")
    return read_all(folder)


@case(SHARD, "no 8 px image where the index has one")
def shard_of_garbage_of_the_right_size(place):
    folder = prepared(place)
    changed(folder / SHARD, lambda data: data.__setitem__(slice(None), b"\x5a" * len(data)))
    return read_all(folder)


@case(SHARD, "cannot be read (No such file")
def shard_that_is_gone(place):
    folder = prepared(place)
    (folder / SHARD).unlink()
    return read_all(folder)


@case("shards/000000.tar", "000000003.8.jpg", "check sum is wrong")
def shard_with_a_bit_of_a_jpeg_flipped(place):
    folder = prepared(place, encoding="jpeg")
    damage(folder, 3, 8, 200)
    return read_all(folder)


@case("000000003.8.jpg", "cannot be decoded")
def shard_with_a_jpeg_that_ends_early_and_sums_that_agree(place):
    folder = prepared(place, encoding="jpeg")
    row = index_of(folder)[3]
    at, length = int(row["offset_8"]), int(row["length_8"]) // 3
    data = (folder / "shards/000000.tar").read_bytes()[at : at + length]

    def agree(index):
        index["length_8"][3], index["crc_8"][3] = length, zlib.crc32(data)

    reindex(folder, agree)
    return read_all(folder)


@case("000009.tar", "is not in dataset.json")
def shard_too_many(place):
    folder = prepared(place)
    shutil.copy(folder / SHARD, folder / "shards/000009.tar")
    return ["verify", "set"]


@case("index.npy", "changed since the data was prepared")
def index_with_two_images_exchanged(place):
    folder = prepared(place)
    index = index_of(folder)
    index[[3, 4]] = index[[4, 3]]
    np.save(folder / "index.npy", index)
    return read_all(folder)


@case("index.npy", "not the index of")
def index_with_a_row_twice(place):
    folder = prepared(place)
    reindex(folder, lambda index: None)
    index = index_of(folder)
    np.save(folder / "index.npy", np.concatenate([index, index[-1:]]))
    return read_all(folder)


@case("index.npy", "cannot be read")
def index_that_is_pickled(place):
    folder = prepared(place)
    np.save(folder / "index.npy", np.array([Runs()], dtype=object), allow_pickle=True)
    return read_all(folder)


@case("index.npy", "cannot be read")
def index_that_is_an_archive(place):
    folder = prepared(place)
    with (folder / "index.npy").open("wb") as file:
        np.savez(file, index=np.zeros(3))
    return read_all(folder)


@case("000000.tar", "no 8 px image where the index has one")
def index_that_leads_beyond_the_end_of_all_files(place):
    folder = prepared(place)
    reindex(folder, lambda index: index["offset_8"].__setitem__(3, 2**64 - 1))
    return read_all(folder)


@case("dataset.json", "is not in shards/")
def description_whose_shard_lies_elsewhere(place):
    folder = prepared(place)
    shards = Manifest.read(folder).shards
    rewrite(folder, shards=[dataclasses.replace(shards[0], file="shards/../../etc"), *shards[1:]])
    return read_all(folder)


@case("dataset.json", "must be a whole number (got '9')")
def description_with_words_for_numbers(place):
    folder = prepared(place)
    rewrite(folder, classes="9")
    return read_all(folder)


@case("dataset.json", "changed since it was written")
def description_with_a_key_twice(place):
    folder = prepared(place)
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace("{", '{"count": 1, "x": 2,', 1))
    return read_all(folder)


@case("dataset.json", "not JSON")
def description_nested_without_end(place):
    folder = prepared(place)
    (folder / "dataset.json").write_text("[" * 100_000)
    return read_all(folder)


@case("dataset.json", "not a JSON object")
def description_that_is_a_list(place):
    folder = prepared(place)
    (folder / "dataset.json").write_text("[1]")
    return read_all(folder)


@case("no such file or folder")
def pattern_that_matches_no_shards(place):
    return ["prepare", "nothing-*.tar", "out", "--resolutions", "8"]
