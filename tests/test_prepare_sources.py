"""Every kind of source is the same set when it holds the same images, and refused when unfit."""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pyarrow
import pytest
from prepared import (
    cifar10,
    file,
    files,
    fill,
    manifest,
    members,
    noise,
    prepare,
    tarred,
    zipped,
)
from pyarrow import parquet

from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.sources.open import kind_of, set_name

COUNT = 6


def _database(folder: Path, contents: dict[bytes, bytes]) -> Path:
    """An lmdb as LSUN packs one: keys in hexadecimal, image files as values."""
    with lmdb.open(str(folder), map_size=2**22) as opened, opened.begin(write=True) as transaction:
        for key, data in contents.items():
            transaction.put(key, data)
    return folder


def _table(path: Path, images: list[bytes], labels: list[object] | None = None, **more) -> Path:
    """A table as Hugging Face's datasets write one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [{"bytes": each, "path": f"{i}.png"} for i, each in enumerate(images)]}
    if labels is not None:
        columns["label"] = labels
    table = pyarrow.table(columns | more)
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(table.replace_schema_metadata(noted), path, row_group_size=2)
    return path


def _sorted(count: int = COUNT) -> list[tuple[str, bytes]]:
    return sorted(files(count).items())


def _labels(count: int = COUNT) -> list[int]:
    return [int(name.startswith("b/")) for name, _ in _sorted(count)]


def _samples(labels: bool = True) -> dict[str, bytes]:
    """What stands in a WebDataset tar, in the order of the folder."""
    found: dict[str, bytes] = {}
    for (_, data), label, key in zip(_sorted(), _labels(), "abcdef", strict=True):
        found[f"train/{key}.png"] = data
        if labels:
            found[f"train/{key}.cls"] = str(label).encode()
        found[f"train/{key}.txt"] = b"a caption"
    return found


def _source(kind: str, folder: Path) -> Path:
    images = [data for _, data in _sorted()]
    if kind == "folder":
        return fill(folder / "x", files(COUNT))
    if kind == "zip":
        return zipped(folder / "x.zip", files(COUNT))
    if kind == "tars":
        whole = list(_samples().items())
        (folder / "tars").mkdir()
        tarred(folder / "tars" / "1.tar", dict(whole[6:]))
        tarred(folder / "tars" / "0.tar", dict(whole[:6]))
        return folder / "tars"
    if kind == "parquet":
        _table(folder / "table" / "data" / "train-1.parquet", images[4:], _labels()[4:])
        _table(folder / "table" / "data" / "train-0.parquet", images[:4], _labels()[:4])
        return folder / "table"
    keys = [f"{i:040x}".encode() for i in range(COUNT)]
    return _database(folder / "church_lmdb", dict(zip(keys, images, strict=True)))


@pytest.mark.parametrize("kind", ["folder", "zip", "tars", "parquet", "lmdb"])
def test_the_same_images_have_the_same_fingerprint_from_any_source(kind, tmp_path):
    """Across tars, files and row groups; whatever the shards and the workers."""
    source = _source(kind, tmp_path)
    labelled = kind != "lmdb"
    expected = ImageFolder(str(fill(tmp_path / "f", files(COUNT))), 4, labels=labelled)
    words = ["--shard-images", 4, "--workers", 2, *(["--labels"] if labelled else [])]
    assert prepare(source, tmp_path / "dest", *words, resolutions="4") == 0
    said = manifest(tmp_path / "dest")
    assert said["fingerprints"]["4"] == expected.open().fingerprint
    assert (said["classes"], said["source"]["kind"]) == (2 * labelled, kind)
    names = {"folder": ["a", "b"], "zip": ["a", "b"], "parquet": ["cat", "dog"]}
    assert said["class_names"] == names.get(kind)
    # Labels are left out where they are not wanted.
    words = ["--no-labels"] if labelled else []
    assert prepare(source, tmp_path / "bare", *words, resolutions="4") == 0
    bare = ImageFolder(str(tmp_path / "f"), 4)
    assert manifest(tmp_path / "bare")["fingerprints"]["4"] == bare.open().fingerprint


def test_an_original_keeps_its_name(tmp_path):
    names = {}
    for kind in ("folder", "tars", "parquet", "lmdb"):
        prepare(_source(kind, tmp_path), tmp_path / f"d-{kind}", resolutions="4")
        about = json.loads(members(tmp_path / f"d-{kind}")["000000005.json"])
        assert about["size"] == [8, 8]
        names[kind] = about["name"]
    assert names == {
        "folder": "b/005.png",
        "tars": "1.tar/train/f.png",
        "parquet": "train-1.parquet:1:1.png",
        "lmdb": f"{5:040x}",
    }


def test_kinds_are_seen_from_names_and_contents(tmp_path):
    for kind in ("folder", "zip", "tars", "parquet", "lmdb"):
        assert kind_of(str(_source(kind, tmp_path)))[0] == kind
    assert kind_of(str(tmp_path / "church_lmdb" / "data.mdb"))[0] == "lmdb"
    assert kind_of(str(tmp_path / "tars" / "*.tar")) == ("tars", kind_of(str(tmp_path / "tars"))[1])
    assert kind_of(str(cifar10(tmp_path / "cifar.tar.gz")))[0] == "cifar10"
    (tmp_path / "unpacked" / "cifar-10-batches-py").mkdir(parents=True)
    assert kind_of(str(tmp_path / "unpacked"))[0] == "cifar10"
    assert kind_of("synthetic")[0] == "synthetic"


def test_a_set_is_named_after_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my cats").mkdir()
    assert set_name("folder", "my cats") == "folder-my-cats"
    assert set_name("folder", "photographs/cats.zip") == "folder-cats"
    assert set_name("tars", "imagenet/train-*.tar") == "tars-train"
    monkeypatch.chdir(tmp_path / "my cats")
    assert set_name("folder", ".") == "folder-my-cats"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nowhere", "no such file or folder; a source is a folder or .zip"),
        ("no*thing", "no such file or folder"),
        ("thesis.tex", "not a known kind of source; a source is a folder or .zip"),
        ("*.t*", "files of several kinds"),
        ("*.zip", "files of several kinds or sources"),
        ("mixed", "holds tars and folder side by side; name the files by a pattern"),
        ("empty", "no images here"),
    ],
)
def test_a_source_that_is_none_is_refused(name, complaint, tmp_path, capsys):
    fill(tmp_path, {"thesis.tex": b"", "x.tar": b"", "1.zip": b"", "2.zip": b""})
    fill(tmp_path / "mixed", {"a.png": b"", "b.tar": b""})
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / name, tmp_path / "dest") == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not (tmp_path / "dest").exists()


def test_the_synthetic_set_wants_a_count(tmp_path, capsys):
    assert prepare("synthetic", tmp_path / "x") == 2
    assert "synthetic: the number of images is missing; add --count" in capsys.readouterr().err
    assert prepare("synthetic", tmp_path / "bare", "--count", 3, "--no-labels") == 0
    assert (manifest(tmp_path / "bare")["classes"], len(members(tmp_path / "bare"))) == (0, 6)
    capsys.readouterr()
    for words in (("--count", 0), ("--count", 3, "--seed", -1)):
        assert prepare("synthetic", tmp_path / "x", *words) == 2
        assert "synthetic data: " in capsys.readouterr().err


# Tars.


def _refused(source: Path, folder: Path, capsys, *words: object) -> str:
    assert prepare(source, folder / "dest", *words, "--workers", 1) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_truncated_tar_is_named_wherever_it_ends(tmp_path, capsys):
    """Also between members and before the closing blocks, where Python's reader sees an end."""
    whole = tarred(tmp_path / "x.tar", _samples()).read_bytes()
    last = max(_offsets(tmp_path / "x.tar")) + 512
    for length in [*range(0, last, 512), *range(100, last, 1700)]:
        (tmp_path / "x.tar").write_bytes(whole[:length])
        error = _refused(tmp_path / "x.tar", tmp_path, capsys)
        assert "x.tar: " in error and ("damaged" in error or "ends too soon" in error), length


def _offsets(path: Path) -> list[int]:
    with tarfile.open(path) as archive:
        return [member.offset_data for member in archive]


def test_a_damaged_header_does_not_end_a_tar_in_silence(tmp_path, capsys):
    path = tarred(tmp_path / "x.tar", _samples())
    data = bytearray(path.read_bytes())
    data[_offsets(path)[9] - 512] ^= 1
    path.write_bytes(data)
    assert "x.tar: ends too soon or is damaged at byte" in _refused(path, tmp_path, capsys)


def test_tars_that_were_joined_are_not_read_halfway(tmp_path, capsys):
    path = tarred(tmp_path / "x.tar", _samples())
    path.write_bytes(path.read_bytes() * 2)
    assert "x.tar: goes on behind its end" in _refused(path, tmp_path, capsys)


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "a/../../b.png", "a\\b.png"])
def test_paths_that_lead_out_of_a_tar_are_refused(name, tmp_path, capsys):
    path = tarred(tmp_path / "x.tar", {name: file(noise(0))})
    assert "has an odd path" in _refused(path, tmp_path, capsys)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind, tmp_path, capsys):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    error = _refused(tmp_path / "x.tar", tmp_path, capsys)
    assert "'a.png' is a link, a device or no plain file" in error


def test_a_member_that_claims_to_be_huge_is_refused(tmp_path, capsys):
    info = tarfile.TarInfo("a.png")
    info.size = 2**30
    (tmp_path / "x.tar").write_bytes(info.tobuf())
    assert "too large" in _refused(tmp_path / "x.tar", tmp_path, capsys)


@pytest.mark.parametrize(
    ("samples", "words", "complaint"),
    [
        ({"a.cls": b"1"}, (), "a has a label and no image"),
        ({"a.png": b"", "a.cls": b"1", "b.png": b""}, (), "x.tar: b.png has no member .cls"),
        ({"a.png": b"", "b.png": b"", "b.cls": b"1"}, (), "x.tar: a.png has no member .cls"),
        ({"a.png": b"", "a.cls": b""}, (), "members .cls holds '', no label, for 1 of 1 images"),
        ({"a.png": b"", "a.cls": b"-1"}, (), "labels are 0 to 999,999 (got -1, 1 such of 1)"),
        ({"a.png": b"", "a.cls": b"1" * 9}, (), "labels are 0 to 999,999 (got 111111111, 1 such"),
        ({"a.png": b"", "a.cls": b"1" * 999}, (), "a: a label of 999 bytes is none"),
        ({"a.png": b"", "a.cls": b"a" * 201}, (), "a label of 201 letters ('aaa"),
        ({"a.png": b"", "a.cls": b"a\x1b[2J"}, (), "'a\\x1b[2J' is an odd name"),
        ({"a.png": b""}, ("--image", "jpg"), "a has no member .jpg"),
        ({"a.png": b""}, ("--label", "class"), "a.png has no member .class"),
        ({"a.png": b""}, ("--labels",), "has no labels; leave out --labels"),
        ({"a.gif": b""}, (), "a.gif: not PNG, JPEG or WebP; convert it"),
        ({"a.txt": b"", "__meta__.json": b""}, (), "no images here"),
        ({"a.png": b"x"}, (), "x.tar/x.tar/a.png: not a PNG, JPEG or WebP image"),
    ],
)
def test_samples_that_are_no_images_with_labels_are_named(
    samples, words, complaint, tmp_path, capsys
):
    path = tarred(tmp_path / "x.tar", samples)
    assert complaint in _refused(path, tmp_path, capsys, *words)


def test_a_member_that_is_there_twice_is_refused(tmp_path, capsys):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    assert "a.png is there twice" in _refused(tmp_path / "x.tar", tmp_path, capsys)


def test_our_own_shards_are_a_source(tmp_path):
    """Chosen by its ending, a resolution is taken for an image; `area` of it is exact again."""
    source = fill(tmp_path / "f", files(COUNT))
    prepare(source, tmp_path / "first", "--labels", resolutions="8,4")
    words = ("--image", "8.png", "--filter", "area")
    assert prepare(tmp_path / "first" / "shards", tmp_path / "x", *words, resolutions="8") == 0
    first, second = manifest(tmp_path / "first"), manifest(tmp_path / "x")
    assert first["fingerprints"]["8"] == second["fingerprints"]["8"]


# Tables.


def test_a_database_that_is_cut_off_is_refused_before_it_is_read(tmp_path, capsys):
    """Mapped into memory, the missing part would end the process without a word."""
    folder = _database(tmp_path / "x", {b"%03d" % i: file(noise(i, 40, 40)) for i in range(20)})
    data = (folder / "data.mdb").read_bytes()
    for length in (0, 100, 5000, 8192, len(data) // 2, len(data) - 1):
        (folder / "data.mdb").write_bytes(data[:length])
        error = _refused(folder, tmp_path, capsys)
        assert "data.mdb: not a readable lmdb" in error or "data.mdb: ends too soon" in error


def test_an_empty_database_has_no_images(tmp_path, capsys):
    assert "no images here" in _refused(_database(tmp_path / "x", {}), tmp_path, capsys)


def test_a_broken_image_in_a_table_is_named_by_its_row(tmp_path, capsys):
    images = [data for _, data in _sorted()]
    path = _table(tmp_path / "x.parquet", [*images, b"no image"])
    error = _refused(path, tmp_path, capsys)
    assert "x.parquet/x.parquet:6:6.png: not a PNG, JPEG or WebP image" in error
    assert prepare(path, tmp_path / "y", "--skip-broken", 1) == 0


@pytest.mark.parametrize(
    ("columns", "words", "complaint"),
    [
        ({"text": ["a"]}, (), "no column of images (text)"),
        ({"a": [b""], "b": [b""]}, (), "several columns may be the images (a, b); choose by"),
        ({"a": [b""]}, ("--image", "c"), "no column 'c'; there are: a"),
        ({"a": [b""]}, ("--label", "c"), "no column 'c'; there are: a"),
        ({"a": [b""], "label": [1.5]}, (), "column 'label' holds 1.5, no label"),
        ({"a": [b"", b""], "label": [1, None]}, (), "column 'label' holds None, no label"),
        (
            {"a": [b""], "label": [-1]},
            (),
            "labels are 0 to 999,999 (got -1, 1 such of 1); --no-labels",
        ),
        ({"a": [{"bytes": None, "path": "a.png"}]}, (), "x.parquet:0:a.png is a path or nothing"),
        ({"a": [b"x"]}, (), "x.parquet:0: not a PNG, JPEG or WebP image"),
    ],
)
def test_a_table_that_is_none_of_images_is_refused(columns, words, complaint, tmp_path, capsys):
    columns = {
        name: pyarrow.array(
            values,
            pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
            if isinstance(values[0], dict)
            else None,
        )
        for name, values in columns.items()
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    assert complaint in _refused(tmp_path / "x.parquet", tmp_path, capsys, *words)


def test_words_as_labels_are_numbered_by_the_alphabet(tmp_path):
    images = [data for _, data in _sorted()]
    path = tmp_path / "x.parquet"
    animals = ["dog", "cat", "dog", "eel", "cat", "dog"]
    parquet.write_table(pyarrow.table({"img": images, "animal": animals}), path)
    assert prepare(path, tmp_path / "dest", "--label", "animal") == 0
    assert manifest(tmp_path / "dest")["class_names"] == ["cat", "dog", "eel"]
    found = members(tmp_path / "dest")
    assert [found[f"{i:09}.cls"] for i in range(COUNT)] == [b"1", b"0", b"1", b"2", b"0", b"1"]


def test_labels_that_are_none_can_be_left_out(tmp_path):
    """A test split often has -1 for every label."""
    path = _table(tmp_path / "x.parquet", [data for _, data in _sorted()], [-1] * COUNT)
    assert prepare(path, tmp_path / "dest", "--no-labels") == 0
    assert manifest(tmp_path / "dest")["classes"] == 0


def test_splits_side_by_side_are_not_mixed(tmp_path, capsys):
    for split in ("train", "test"):
        _table(tmp_path / "x" / f"{split}-00000-of-00001.parquet", [file(noise(0))])
    error = _refused(tmp_path / "x", tmp_path, capsys)
    assert "holds several splits (test, train)" in error
    assert prepare(tmp_path / "x" / "train-*.parquet", tmp_path / "dest") == 0


def test_a_damaged_table_is_one_line(tmp_path, capsys):
    path = _table(tmp_path / "x.parquet", [data for _, data in _sorted()])
    whole = path.read_bytes()
    for length in (0, 3, 50, len(whole) - 1):
        path.write_bytes(whole[:length])
        error = _refused(path, tmp_path, capsys)
        assert "x.parquet: damaged or not a parquet file" in error


@pytest.mark.parametrize("kind", ["lmdb", "parquet"])
def test_what_reads_a_table_is_named_where_it_is_absent(kind, tmp_path, monkeypatch, capsys):
    source = _source(kind, tmp_path)
    package = {"lmdb": "lmdb", "parquet": "pyarrow"}[kind]
    monkeypatch.setitem(sys.modules, package, None)
    error = _refused(source, tmp_path, capsys)
    assert f"reading it takes {package}; pip install 'diffusion_pl[prepare]'" in error


# Images that are traps.


def test_a_decompression_bomb_is_refused_by_its_announced_size(tmp_path, capsys):
    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")
    for source in (
        fill(tmp_path / "x", {"a.png": bomb}),
        tarred(tmp_path / "x.tar", {"a.png": bomb}),
        _table(tmp_path / "x.parquet", [bomb]),
    ):
        error = _refused(source, tmp_path, capsys)
        assert "a.png: " in error or "0.png: " in error
        assert "30000 x 30000 pixels; at most 64 megapixels" in error or "too large" in error


def test_an_image_far_too_small_is_named(tmp_path, capsys):
    source = fill(tmp_path / "x", {"a.png": file(noise(0, 3, 3))})
    assert prepare(source, tmp_path / "dest", resolutions="64,8") == 2
    assert (
        "a.png: 3 x 3 pixels would be enlarged more than 4 times to 64" in capsys.readouterr().err
    )


def test_labels_of_a_table_reach_the_index_in_order(tmp_path):
    images = [data for _, data in _sorted()]
    _table(tmp_path / "x.parquet", images, [0, 1, 1, 0, 1, 0])
    prepare(tmp_path / "x.parquet", tmp_path / "dest", "--shard-images", 5, "--workers", 2)
    index = np.load(tmp_path / "dest" / "index.npy")
    assert index["label"].tolist() == [0, 1, 1, 0, 1, 0]
    assert index["shard"].tolist() == [0] * 5 + [1]
