"""Hostile pictures and archives, as `prepare` and the commands that take pictures see them."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

from hostile import Runs, announce, case, changed
from PIL import Image
from prepared import cifar10, fill, noise, tarred, zipped
from prepared import file as encoded

from diffusion_pl.io.unpickle import read_plain


def preparing(name: str) -> list[str]:
    return ["prepare", name, "out", "--resolutions", "8", "--workers", "1"]


def pictured(place: Path, name: str, data: bytes) -> list[str]:
    """A folder with one good picture and this one."""
    fill(place / "photos", {"a.png": encoded(noise(0)), name: data})
    return preparing("photos")


def png(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that announces a size and has next to no contents."""

    def chunk(name: bytes, data: bytes) -> bytes:
        sum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + sum

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


# Pictures.


@case("photos/b.png", "too large to be decoded")
def picture_of_900_megapixels(place):
    return pictured(place, "b.png", png(30_000, 30_000))


@case("photos/b.png", "at most 64 megapixels")
def picture_of_81_megapixels_below_pillows_limit(place):
    return pictured(place, "b.png", png(9_000, 9_000))


@case("photos/b.png", "16,384 a side")
def picture_of_one_line_of_16_385_pixels(place):
    return pictured(place, "b.png", png(16_385, 1))


@case("photos/b.tiff", "not PNG, JPEG or WebP; convert it or remove it")
def picture_of_float_pixels_in_a_tiff(place):
    return pictured(place, "b.tiff", encoded(Image.new("F", (8, 8), 0.5), "TIFF"))


@case("photos/b.png", "not a PNG, JPEG or WebP image")
def picture_of_float_pixels_under_a_good_name(place):
    return pictured(place, "b.png", encoded(Image.new("F", (8, 8), 0.5), "TIFF"))


@case("photos/b.png", "animated; save the frame you want")
def picture_that_moves_as_png(place):
    return pictured(
        place, "b.png", encoded(noise(0), "PNG", save_all=True, append_images=[noise(1)])
    )


@case("photos/b.webp", "animated")
def picture_that_moves_as_webp(place):
    return pictured(
        place, "b.webp", encoded(noise(0), "WEBP", save_all=True, append_images=[noise(1)])
    )


@case("photos/b.gif", "not PNG, JPEG or WebP")
def picture_that_moves_as_gif(place):
    return pictured(
        place, "b.gif", encoded(noise(0), "GIF", save_all=True, append_images=[noise(1)])
    )


@case("photos/b.jpg", "broken image")
def picture_whose_tail_is_missing(place):
    return pictured(place, "b.jpg", encoded(noise(0, 64, 64), "JPEG")[:900])


@case("photos/b.jpg", "not a PNG, JPEG or WebP image")
def picture_whose_head_is_missing(place):
    return pictured(place, "b.jpg", encoded(noise(0, 64, 64), "JPEG")[100:])


@case("photos/b.png", "broken image")
def picture_that_announces_more_than_it_has(place):
    return pictured(place, "b.png", png(100, 100))


@case("photos/b.png", "not a PNG, JPEG or WebP image")
def picture_without_a_byte(place):
    return pictured(place, "b.png", b"")


@case("photos/b.png", "not a PNG, JPEG or WebP image")
def picture_that_is_a_program(place):
    return pictured(place, "b.png", b"#!/bin/sh\ntouch ran\n")


@case("photos/b.png", "not a PNG, JPEG or WebP image")
def picture_that_is_postscript(place):
    return pictured(place, "b.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")


@case("photos/b.webp", "broken image")
def picture_of_a_webp_cut_off(place):
    return pictured(place, "b.webp", encoded(noise(0, 64, 64), "WEBP", lossless=True)[:300])


@case("photos/b.png", "would be enlarged more than 4 times")
def picture_far_too_small(place):
    return pictured(place, "b.png", encoded(noise(0, 1, 500)))


@case("photos", "'b\\nc.png' is an odd name")
def picture_whose_name_ends_the_line(place):
    return pictured(place, "b\nc.png", encoded(noise(1)))


@case("reached a second time, by a link")
def folder_that_lies_in_itself(place):
    words = pictured(place, "b.png", encoded(noise(1)))
    (place / "photos" / "again").symlink_to(place / "photos")
    return words


# Archives.


@case("a.zip", "../a.png has an odd path")
def zip_that_leads_out(place):
    zipped(place / "a.zip", {"../a.png": encoded(noise(0))})
    return preparing("a.zip")


@case("a.zip", "/etc/a.png has an odd path")
def zip_of_absolute_names(place):
    zipped(place / "a.zip", {"/etc/a.png": encoded(noise(0))})
    return preparing("a.zip")


@case("a.zip", "is there twice")
def zip_with_a_name_twice(place):
    zipped(place / "a.zip", {"a.png": encoded(noise(0)), "b.png": encoded(noise(1))})
    changed(place / "a.zip", lambda data: data.__setitem__(
        slice(None), data.replace(b"b.png", b"a.png")
    ))  # fmt: skip
    return preparing("a.zip")


@case("a.zip", "a.png is too large for an image")
def zip_bomb_of_a_gigabyte(place):
    zipped(place / "a.zip", {"a.png": encoded(noise(0))})
    announce(place / "a.zip", 2**30)
    return preparing("a.zip")


@case("a.zip", "a.png is encrypted")
def zip_that_is_encrypted(place):
    zipped(place / "a.zip", {"a.png": encoded(noise(0))})
    directory = b"PK\x01\x02"
    changed(place / "a.zip", lambda data: data.__setitem__(data.index(directory) + 8, 1))
    return preparing("a.zip")


@case("a.zip", "'a\\x1b[2J.png' is an odd name")
def zip_whose_names_clear_the_terminal(place):
    zipped(place / "a.zip", {"a\x1b[2J.png": encoded(noise(0))})
    return preparing("a.zip")


@case("a.zip", "not a readable zip file")
def zip_that_is_none(place):
    (place / "a.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    return preparing("a.zip")


def odd_tar(place: Path, name: str, kind: bytes) -> list[str]:
    with tarfile.open(place / "a.tar", "w") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    return preparing("a.tar")


@case("a.tar", "'../../evil.png' has an odd path")
def tar_that_leads_out(place):
    return odd_tar(place, "../../evil.png", tarfile.REGTYPE)


@case("a.tar", "'/evil.png' has an odd path")
def tar_of_absolute_names(place):
    return odd_tar(place, "/evil.png", tarfile.REGTYPE)


@case("a.tar", "'a.png' is a link, a device or no plain file")
def tar_with_a_symbolic_link(place):
    return odd_tar(place, "a.png", tarfile.SYMTYPE)


@case("a.tar", "'a.png' is a link")
def tar_with_a_hard_link(place):
    return odd_tar(place, "a.png", tarfile.LNKTYPE)


@case("a.tar", "'a.png' is a link")
def tar_with_a_pipe(place):
    return odd_tar(place, "a.png", tarfile.FIFOTYPE)


@case("a.tar", "'a.png' is a link")
def tar_with_a_device(place):
    return odd_tar(place, "a.png", tarfile.CHRTYPE)


@case("a.tar", "00.png is there twice")
def tar_with_a_member_twice(place):
    with tarfile.open(place / "a.tar", "w") as archive:
        for _ in range(2):
            info = tarfile.TarInfo("00.png")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    return preparing("a.tar")


@case("a.tar", "01.png has no member .cls")
def tar_with_a_sample_without_its_label(place):
    images = {f"{number:02}.png": encoded(noise(number)) for number in range(2)}
    tarred(place / "a.tar", {"00.png": images["00.png"], "00.cls": b"1", **images})
    return preparing("a.tar")


@case("a.tar", "00 has a label and no image")
def tar_that_is_cut_between_label_and_image(place):
    tarred(place / "a.tar", {"00.cls": b"1", "01.png": encoded(noise(0)), "01.cls": b"0"})
    return preparing("a.tar")


@case("a.tar", "no images here")
def tar_of_programs_that_webdataset_would_run(place):
    programs = {f"0.{ending}": pickle.dumps(Runs()) for ending in ("pyd", "pkl", "pickle", "pth")}
    tarred(place / "a.tar", programs)
    return preparing("a.tar")


@case("a.tar", "is too large for an image")
def tar_with_a_member_of_a_terabyte(place):
    with tarfile.open(place / "a.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = 2**40
        archive.fileobj.write(info.tobuf())  # the header alone
    return preparing("a.tar")


@case("a.parquet", "damaged or not a parquet file")
def table_that_is_none(place):
    (place / "a.parquet").write_bytes(b"PAR1" + bytes(64) + b"PAR1")
    return preparing("a.parquet")


@case("data.mdb", "not a readable lmdb")
def database_that_is_none(place):
    fill(place / "lsun", {"data.mdb": b"\xde\xc0\xef\xbe" * 4096})
    return preparing("lsun")


# CIFAR-10's archive and the pickles in it.


@case("a.tar.gz", "asks for posix.system, which is refused")
def cifar10_batch_that_is_a_program(place):
    batch = pickle.dumps(Runs(), 2)
    members = {f"cifar-10-batches-py/data_batch_{number}": batch for number in range(1, 6)}
    plain = tarred(place / "a.tar", members).read_bytes()
    (place / "a.tar.gz").write_bytes(gzip.compress(plain))
    (place / "a.tar").unlink()
    return preparing("a.tar.gz")


@case("a.tar.gz", "damaged or not a .tar.gz")
def cifar10_archive_cut_off(place):
    path = cifar10(place / "a.tar.gz")
    path.write_bytes(path.read_bytes()[:-30])
    return preparing("a.tar.gz")


@case("a.tar.gz", "too large for a batch of CIFAR-10")
def cifar10_archive_that_unpacks_without_end(place):
    name = "cifar-10-batches-py/data_batch_1"
    with tarfile.open(place / "a.tar.gz", "w:gz", compresslevel=1) as archive:
        info = tarfile.TarInfo(name)
        info.size = 2**40
        archive.fileobj.write(info.tobuf() + bytes(2**20))
    return preparing("a.tar.gz")


@case("x: ", "remembers a value as number 16,777,216")
def pickle_whose_memory_takes_a_table_without_end(place):
    return lambda: read_plain(b"\x80\x02K\x01r\0\0\0\x01.", where="x")


@case("x: ", "tuples more than 10,000 deep")
def pickle_whose_key_exhausts_the_stack(place):
    program = b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."
    return lambda: read_plain(program, where="x")


@case("x: ", "not a pickle of plain data")
def pickle_of_a_number_without_end(place):
    return lambda: read_plain(b"L" + b"9" * 10**6 + b"L\n.", where="x")


@case("x: ", "asks for builtins.eval, which is refused")
def pickle_that_evaluates(place):
    return lambda: read_plain(b"cbuiltins\neval\n(V__import__('os').mkdir('ran')\ntR.", where="x")


@case("out", "cannot be written")
def folder_that_cannot_be_written(place):
    pictured(place, "b.png", encoded(noise(1)))
    (place / "out").symlink_to("/proc/nowhere")
    return preparing("photos")
