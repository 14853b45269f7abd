"""Shards that are not what they should be: each one line that says which file and what to do."""

from __future__ import annotations

import io
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sharded import damage, edit, index_of, pixels, reindex, rewrite, source, write

from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.member_images import decode_into, raw_header
from diffusion_pl.training.opening import open_for


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "set")


def complaint(what, *words):
    with pytest.raises(ValueError, match=".") as told:
        what()
    text = str(told.value)
    assert "\n" not in text
    assert "broken images" not in text
    for word in words:
        assert word in text, text


def read(folder, side=16, **settings):
    return source(folder, **settings).open(side).read(torch.arange(20))


def test_a_folder_that_was_not_prepared(tmp_path):
    complaint(source(tmp_path).prepare, str(tmp_path), "not prepared", "diffusion_pl prepare")
    complaint(source(tmp_path / "nothing").open, "not prepared")


def test_a_folder_that_is_not_finished(folder):
    (folder / "dataset.json").unlink()
    complaint(source(folder).prepare, "interrupted", "again to finish")


def test_a_resolution_that_is_absent(folder):
    complaint(source(folder, resolution=32).prepare, "prepared at 16, 8 px (got", "--resolutions")


def test_opening_at_a_resolution_that_is_absent(folder):
    complaint(lambda: source(folder).open(4), "prepared at 16, 8 px (got 4)")


def test_a_foreign_format_and_an_edited_description(folder):
    edit(folder, count=21)
    complaint(source(folder).prepare, "dataset.json", "changed since it was written")
    edit(folder, format=2)
    complaint(source(folder).prepare, "format 2, this program reads 1")


def test_fewer_images_than_a_batch(folder):
    network = SimpleNamespace(channels=3, classes=0, check_resolution=lambda *sides: None)
    open_for(network, DataConfig(source(folder), batch_size=20))
    fewer = DataConfig(source(folder), batch_size=21)
    complaint(lambda: open_for(network, fewer), "20 images are less than a batch of 21")


def test_channels_that_are_not_there(folder):
    complaint(
        source(folder, channels=1).prepare, "images of 3 channels; set data.dataset.channels=3"
    )


@pytest.mark.parametrize(
    "settings",
    [{"cache": "tape"}, {"window": -1}, {"skip_broken": -1}],
)
def test_settings_out_of_range(folder, settings):
    [name] = settings
    complaint(source(folder, **settings).prepare, f"data.dataset.{name}", "got")


def test_a_shard_that_was_cut_short_or_is_gone(folder):
    path = folder / "shards/000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    complaint(source(folder).open, "shards/000001.tar", "bytes where")
    path.unlink()
    complaint(source(folder).open, "shards/000001.tar", "cannot be read (No such file")


def test_a_shard_that_is_cut_short_while_it_is_read(folder):
    images = source(folder).open()
    path = folder / "shards/000000.tar"
    path.write_bytes(path.read_bytes()[: int(index_of(folder)[0]["offset_16"]) + 50])
    complaint(
        lambda: images.read(torch.tensor([0])),
        "shards/000000.tar: 000000000.16.png: the shard ends within it",
    )


def test_a_byte_that_changed(folder):
    name = damage(folder, 8, 8)
    assert torch.equal(read(folder), pixels(range(20), 16))
    complaint(lambda: read(folder, 8), name, "000000008.8.png", "check sum is wrong")


@pytest.mark.parametrize("byte", [60, 300])
def test_a_byte_that_changed_in_uncompressed_pixels_or_their_header(tmp_path, byte):
    folder = write(tmp_path / "raw", encoding="raw")
    damage(folder, 8, 8, byte)
    complaint(lambda: read(folder, 8), "000000008.8.npy", "check sum is wrong")


def test_an_index_that_was_changed(folder):
    index = index_of(folder)
    index["label"] = 0
    np.save(folder / "index.npy", index)
    complaint(source(folder).open, "index.npy", "changed since the data was prepared")


def test_an_index_that_is_absent_or_of_other_data(folder, tmp_path):
    other = write(tmp_path / "other", count=19)
    shutil.copy(other / "index.npy", folder / "index.npy")
    complaint(source(folder).open, "not the index of")
    (folder / "index.npy").unlink()
    complaint(source(folder).open, "index.npy", "cannot be read")


def test_shards_of_other_data_of_the_same_size(folder):
    shutil.copy(folder / "shards/000001.tar", folder / "shards/000002.tar")
    size = (folder / "shards/000001.tar").stat().st_size
    if size == source(folder)._described()[1].shards[2].bytes:
        complaint(lambda: read(folder), "000002.tar", "check sum is wrong")
    else:
        complaint(lambda: read(folder), "000002.tar", "bytes where")


def test_an_index_in_another_order_than_the_shards(folder):
    def exchange(index):
        index["shard"][[0, 19]] = index["shard"][[19, 0]]

    reindex(folder, exchange)
    complaint(source(folder).open, "not in the order of the shards")


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_beyond_the_classes(folder, label):
    def change(index):
        index["label"][5] = label

    reindex(folder, change)
    complaint(source(folder).open, "labels beyond the 3 classes")


def test_an_image_that_is_missing_at_one_resolution(folder):
    def forget(index):
        index["length_8"][5] = 0

    reindex(folder, forget)
    assert torch.equal(read(folder), pixels(range(20), 16))
    complaint(lambda: read(folder, 8), "000000.tar", "000000005.8.png", "0 bytes long")


def test_an_offset_that_leads_to_another_resolution(folder):
    def mislead(index):
        for name in ("offset", "length", "crc"):
            index[f"{name}_8"][5] = index[f"{name}_16"][5]

    reindex(folder, mislead)
    complaint(lambda: read(folder, 8), "000000.tar", "no 8 px image where the index has one")


def test_what_decodes_to_other_pixels_than_were_prepared(folder):
    rewrite(folder, fingerprints={16: "0" * 64, 8: "0" * 64})
    complaint(lambda: source(folder, cache="memory").open(), "decode to others than were prepared")


def test_what_does_not_fit_in_memory(folder, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 50)
    complaint(
        lambda: source(folder, cache="memory").open(), "do not fit", "set data.dataset.cache=disk"
    )


def test_uncompressed_pixels_of_another_shape_or_size(tmp_path):
    folder = write(tmp_path / "raw", encoding="raw")
    row = index_of(folder)[3]
    path = folder / "shards/000000.tar"
    data = bytearray(path.read_bytes())
    at = int(row["offset_8"])
    data[at : at + 128] = raw_header((3, 4, 16))
    path.write_bytes(data)

    def agree(index):
        index["crc_8"][3] = zlib.crc32(data[at : at + int(row["length_8"])])
        index["length_8"][4] -= 1

    reindex(folder, agree)
    complaint(lambda: source(folder).open(8).read(torch.tensor([3])), "not the array it should be")
    complaint(lambda: source(folder).open(8).read(torch.tensor([4])), "319 bytes in place of 320")


def test_the_header_of_an_array_is_numpy_s():
    for shape in ((3, 8, 8), (1, 256, 256), (3, 1024, 1024)):
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(shape, np.uint8))
        assert raw_header(shape) == buffer.getvalue()[:128]


def encoded(format, size=(8, 8), mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, size, 7).save(buffer, format, **options)
    return bytearray(buffer.getvalue())


FORMATS = {"png": {}, "webp": {"lossless": True}, "jpeg": {"quality": 95, "progressive": True}}


@pytest.mark.parametrize("encoding", FORMATS)
def test_files_cut_in_their_headers_are_no_images(encoding):
    data = encoded(encoding, **FORMATS[encoding])
    image = np.zeros((3, 8, 8), np.uint8)
    for length in (0, 1, 9, 20, 33):
        with pytest.raises(ValueError, match="in place of RGB|cannot be decoded"):
            decode_into(image, data[:length], encoding)


def test_interlaced_and_palette_images_are_not_what_prepare_writes():
    image = np.zeros((3, 8, 8), np.uint8)
    for other in (encoded("png", mode="P"), encoded("png", mode="L"), encoded("png", mode="RGBA")):
        complaint(lambda other=other: decode_into(image, other, "png"), "another kind of file")


@pytest.mark.parametrize("encoding", FORMATS)
def test_an_image_of_another_size_or_format_is_not_decoded(encoding):
    image = np.zeros((3, 8, 8), np.uint8)
    for size in ((8, 9), (9, 8)):
        data = encoded(encoding, size, **FORMATS[encoding])
        complaint(
            lambda data=data: decode_into(image, data, encoding),
            f"{size[0]} x {size[1]} pixels in place of RGB {encoding} of 8 x 8",
        )
    other = encoded("bmp")
    complaint(lambda: decode_into(image, other, encoding), "another kind of file")


@pytest.mark.parametrize("encoding", FORMATS)
def test_an_image_that_ends_early_cannot_be_decoded(encoding):
    rough = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).save(buffer, encoding, **FORMATS[encoding])
    image = np.zeros((3, 64, 64), np.uint8)
    half = bytearray(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    complaint(lambda: decode_into(image, half, encoding), "cannot be decoded")


def test_deeper_images_are_not_what_prepare_writes():
    deep = encoded("png")
    deep[24] = 16
    image = np.zeros((3, 8, 8), np.uint8)
    complaint(lambda: decode_into(image, deep, "png"), "another kind of file")


def test_grey_images_decode_to_one_channel():
    image = np.zeros((1, 8, 8), np.uint8)
    decode_into(image, encoded("png", mode="L"), "png")
    assert (image == 7).all()
