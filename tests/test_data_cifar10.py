"""CIFAR-10 is read as published, and nothing in a foreign archive is run or believed."""

import gzip
import io
import os
import pickle
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_pl.data.cifar10 import BATCHES, CIFAR10
from diffusion_pl.io.unpickle import read_plain

FOLDER = "cifar-10-batches-py"
NAMES = (*BATCHES["train"], *BATCHES["test"])


def _batch(number: int, count: int = 3) -> dict[bytes, Any]:
    generator = np.random.default_rng(number)
    return {
        b"batch_label": b"made by a test",
        b"labels": generator.integers(0, 10, count).tolist(),
        b"data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
        b"filenames": [b"a.png"] * count,
    }


def _members() -> dict[str, bytes]:
    return {name: pickle.dumps(_batch(number), 2) for number, name in enumerate(NAMES)}


def _write(path: Path, members: dict[str, bytes], folder: str = FOLDER) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return _write(tmp_path / "cifar-10-python.tar.gz", _members())


@pytest.fixture
def subset() -> Path:
    path = Path(__file__).parents[2] / "shared" / "data" / "cifar-10-subset-python.tar.gz"
    if not path.is_file():
        pytest.skip("no subset of CIFAR-10 in ../shared/data: real images are not in the project")
    return path


def _open(path: Path, split: Any = "train") -> Any:
    return CIFAR10(str(path), split).open()


def test_the_real_subset_is_read_and_named_a_subset(subset: Path) -> None:
    """Counts from the subset's card; the means are those of CIFAR-10, 0.491 0.482 0.447."""
    train = _open(subset)
    assert (train.name, len(train), train.classes) == ("cifar10-train-subset8380", 8380, 10)
    pixels = train.read(torch.arange(len(train)))
    assert (pixels.shape, pixels.dtype) == ((8380, 3, 32, 32), torch.uint8)
    mean = pixels.float().mean(dim=(0, 2, 3)) / 255
    # 8,380 images with a standard deviation of image means near 0.13: 0.01 is seven deviations.
    torch.testing.assert_close(mean, torch.tensor([0.491, 0.482, 0.447]), atol=0.01, rtol=0)
    assert _open(subset, "test").name == "cifar10-test-subset1017"


def test_images_come_by_file_then_as_in_the_file(archive: Path) -> None:
    """Planes of a row are red, green, blue, row by row; files stand in any order in the tar."""
    images = _open(archive)
    expected = [_batch(number) for number in range(5)]
    data = np.concatenate([batch[b"data"] for batch in expected])
    pixels = images.read(torch.arange(15)).numpy()
    assert np.array_equal(pixels[7, 1, 30], data[7, 1024 + 30 * 32 : 1024 + 31 * 32])
    assert np.array_equal(pixels.reshape(15, -1), data)
    assert images.labels.tolist() == [label for batch in expected for label in batch[b"labels"]]
    backwards = dict(reversed(_members().items()))
    other = _open(_write(archive.with_name("backwards.tar.gz"), backwards))
    assert other.fingerprint == images.fingerprint


def test_classes_are_named_as_krizhevsky_numbers_them(archive: Path) -> None:
    # Of batches.meta in the archive: label_names.
    words = "airplane automobile bird cat deer dog frog horse ship truck"
    assert " ".join(_open(archive).class_names) == words


def test_a_complete_split_has_no_subset_in_its_name(tmp_path: Path) -> None:
    whole = _batch(5)
    whole[b"data"] = np.zeros((10_000, 3072), dtype=np.uint8)
    whole[b"labels"] = [0] * 10_000
    members = {"test_batch": pickle.dumps(whole, 2)}
    path = _write(tmp_path / "x.tar.gz", members)
    assert _open(path, "test").name == "cifar10-test"
    with pytest.raises(ValueError, match="data_batch_1 is missing"):
        _open(path)


def test_archive_folder_and_unpacked_folder_are_the_same(archive: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "elsewhere" / FOLDER
    unpacked.mkdir(parents=True)
    for name, data in _members().items():
        (unpacked / name).write_bytes(data)
    places = (archive, archive.parent, unpacked, unpacked.parent)
    assert len({_open(place).fingerprint for place in places}) == 1
    other = archive.rename(tmp_path / "subset.tar.gz")
    assert _open(tmp_path).fingerprint == _open(other).fingerprint
    _write(tmp_path / "another.tar.gz", _members())
    with pytest.raises(ValueError, match=r"several archives \(another.tar.gz, subset.tar.gz\)"):
        _open(tmp_path)


def test_prepare_leaves_what_is_there_and_names_what_is_not(archive: Path, tmp_path: Path) -> None:
    before = archive.read_bytes()
    CIFAR10(str(tmp_path)).prepare()
    assert archive.read_bytes() == before
    with pytest.raises(ValueError, match=r"nowhere: no CIFAR-10 archive here; put .* there"):
        CIFAR10(str(tmp_path / "nowhere")).prepare()


def test_without_a_network_prepare_says_where_the_archive_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=r"put it at data/cifar10/cifar-10-python\.tar\.gz$"):
        CIFAR10().prepare()


def _python2_array(data: bytes, rows: int) -> bytes:
    """The bytes Python 2 and numpy 1 wrote for a uint8 array (rows, 3072)."""
    shape = b"K" + bytes([rows]) + b"M\x00\x0c\x86"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    dtype += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    text = b"T" + struct.pack("<I", len(data)) + data
    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return start + b"(K\x01" + shape + dtype + b"\x89" + text + b"tb"


def test_a_pickle_of_python_2_and_numpy_1_is_read() -> None:
    """The official archive is of 2009: strings without a type, numpy under its old module name."""
    data = bytes(range(256)) * 24
    written = b"\x80\x02}(U\x04data" + _python2_array(data, 2) + b"U\x06labels](K\x03K\x09eu."
    array = np.frombuffer(data, np.uint8).reshape(2, 3072)
    by_columns = np.asfortranarray(array)
    for text in (
        written,
        pickle.dumps({b"data": array}, 2),
        pickle.dumps({b"data": by_columns}, 2),
    ):
        assert np.array_equal(read_plain(text, where="x")[b"data"], array)
    assert read_plain(written, where="x")[b"labels"] == [3, 9]


class _Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def test_a_pickle_that_runs_a_command_is_refused_and_not_run(archive: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = pickle.dumps({b"data": _Call(os.system, f"touch {mark}"), b"labels": []}, 2)
    _write(archive, _members() | {"data_batch_3": evil})
    with pytest.raises(ValueError, match=r"data_batch_3: .* asks for \w+\.system, which is refus"):
        _open(archive)
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        _Call(eval, "1"),
        _Call(np.ndarray, (10**12,)),
        _Call(bytes, 10**12),
        _Call(np.dtype, "O"),
        _Call(np.load, "x"),
        np.array([None]),
        np.zeros(3),
        np.float64(1),
        {1, 2},
        Path("x"),
    ],
    ids=[
        "eval",
        "huge-array",
        "huge-bytes",
        "object-dtype",
        "load",
        "object-array",
        "floats",
        "float",
        "set",
        "path",
    ],
)
def test_anything_but_plain_data_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^where: not a pickle of plain data: "):
        read_plain(pickle.dumps({b"data": value}, 2), where="where")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({b"data": np.zeros((3, 3071), np.uint8)}, r"\(n, 3072\) \(got \(3, 3071\)\)"),
        ({b"data": np.zeros((3, 3, 1024), np.uint8)}, r"\(n, 3072\)"),
        ({b"data": np.zeros((3, 3072), np.int16)}, "number of type 'i2'"),
        ({b"data": b"?" * 3072}, r"got bytes"),
        ({b"labels": [1, 2]}, r"3 images need as many labels \(got 2\)"),
        ({b"labels": [1, 2, 10]}, r"labels are 0 to 9 \(got 10\)"),
        ({b"labels": [1, 2, -1]}, r"labels are 0 to 9 \(got -1\)"),
        ({b"labels": [1, 2, 3.0]}, r"labels are 0 to 9 \(got 3.0\)"),
        ({b"labels": [], b"data": np.zeros((0, 3072), np.uint8)}, "0 images"),
    ],
)
def test_a_batch_of_another_shape_is_one_clear_line(
    archive: Path, change: dict[bytes, Any], complaint: str
) -> None:
    _write(archive, _members() | {"data_batch_2": pickle.dumps(_batch(1) | change, 2)})
    with pytest.raises(ValueError, match=rf"data_batch_2: .*{complaint}"):
        _open(archive)


def test_more_images_than_cifar10_has_are_refused(tmp_path: Path) -> None:
    many = {b"data": np.zeros((10_001, 3072), np.uint8), b"labels": [0] * 10_001}
    with pytest.raises(ValueError, match="more than CIFAR-10 has"):
        _open(_write(tmp_path / "x.tar.gz", {"test_batch": pickle.dumps(many, 2)}), "test")


def test_a_batch_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for seed in (1, 2):
            data = pickle.dumps(_batch(seed), 2)
            info = tarfile.TarInfo(f"{FOLDER}/test_batch")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match="test_batch is there twice"):
        _open(path, "test")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(f"{FOLDER}/data_batch_1")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match="odd member"):
        _open(path)


@pytest.mark.parametrize("folder", ["..", f"{FOLDER}/..", f"/{FOLDER}", f"{FOLDER}/deep", "other"])
def test_members_elsewhere_are_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ValueError, match="odd member"):
        _open(_write(tmp_path / "x.tar.gz", _members(), folder))


def test_a_member_that_claims_to_be_huge_is_refused_unread(tmp_path: Path) -> None:
    info = tarfile.TarInfo(f"{FOLDER}/data_batch_1")
    info.size = 10**12
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf()))
    with pytest.raises(ValueError, match="too large"):
        _open(path)


def test_a_truncated_archive_is_one_clear_line(archive: Path) -> None:
    whole = archive.read_bytes()
    for length in range(0, len(whole), len(whole) // 50):
        archive.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"damaged|missing"):
            _open(archive)


def test_a_flipped_bit_is_noticed_or_harmless(archive: Path) -> None:
    """The check sum covers every byte of the contents; only the gzip header's date is free."""
    whole = archive.read_bytes()
    fingerprint = _open(archive).fingerprint
    draw = random.Random(0)
    noticed = 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        archive.write_bytes(damaged)
        try:
            assert _open(archive).fingerprint == fingerprint
        except ValueError:
            noticed += 1
    assert noticed >= 98


def test_a_file_that_is_no_archive_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"damaged or not a \.tar\.gz"):
        _open(path)


def test_an_unknown_split_is_named(archive: Path) -> None:
    with pytest.raises(ValueError, match="split is train or test"):
        _open(archive, "validation")
