"""A folder or zip of images is one fixed set, and what cannot be read is refused by name."""

import io
import multiprocessing
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_pl.data.decode import decode
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.images import Images


def _file(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _noise(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data, where="x")).astype(int)


def _open(path: Path, resolution: int = 8, **settings: Any) -> Images:
    source = ImageFolder(str(path), resolution, **settings)
    source.prepare()
    return source.open()


def _fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def _zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_content_decides_not_the_extension(tmp_path: Path) -> None:
    image = _noise(0)
    _fill(tmp_path, {"a.jpg": _file(image), "b.PNG": _file(image, "WEBP", lossless=True)})
    images = _open(tmp_path).read(torch.tensor([0, 1]))
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(images[0], expected) and torch.equal(images[1], expected)


def _four() -> dict[str, bytes]:
    names = ("b/2.png", "b/10.webp", "a/deep/1.png", "a/0.jpeg")
    data = (_file(_noise(0)), _file(_noise(1), "WEBP"), _file(_noise(2)), _file(_noise(3), "JPEG"))
    return dict(zip(names, data, strict=True))


def test_folder_and_zip_are_the_same_set_in_order_of_their_paths(tmp_path: Path) -> None:
    folder = _open(_fill(tmp_path / "cats", _four()), labels=True)
    archive = _open(_zip(tmp_path / "dogs.zip", _four()), labels=True)
    assert (folder.name, archive.name) == ("folder-cats-8", "folder-dogs-8")
    assert folder.fingerprint == archive.fingerprint
    assert folder.labels is not None and folder.classes == 2
    assert folder.labels.tolist() == [0, 0, 1, 1]
    expected = [_pixels(_four()[name]) for name in sorted(_four())]
    found = folder.read(torch.arange(4)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, np.stack(expected))


def test_the_fit_and_the_split_that_are_asked_for_are_taken(tmp_path: Path) -> None:
    wide = _fill(tmp_path / "wide", {"a.png": _file(Image.new("RGB", (8, 4)))})
    padded = _open(wide, fit="pad").read(torch.tensor([0]))[0]
    assert (padded[:, :2] == 255).all() and (padded[:, 6:] == 255).all()
    assert (padded[:, 2:6] == 0).all()
    assert (_open(wide).read(torch.tensor([0])) == 0).all()
    assert ImageFolder(str(wide), 8).open(4).shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="a.png"):
        _open(wide, fit="exact")
    parts = {"train/a/0.png": _file(_noise(0)), "test/a/1.png": _file(_noise(1))}
    images = _open(_fill(tmp_path / "parts", parts), split="test")
    found = images.read(torch.arange(len(images))).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, np.asarray(_noise(1))[None])


def test_a_set_says_of_what_kind_its_images_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = Image.fromarray(np.full((8, 8), 4095, np.uint16))
    folder = _fill(tmp_path / "scans", {"a.png": _file(deep)})
    assert [_open(folder, channels=n).name for n in (1, 3, 4)] == [
        "folder-scans-8-grey", "folder-scans-8", "folder-scans-8-rgba",
    ]  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{folder}: ") and "4,095" in line for line in lines)


def test_without_labels_there_are_no_classes(tmp_path: Path) -> None:
    images = _open(_fill(tmp_path, _four()))
    assert (images.labels, images.classes, len(images)) == (None, 0, 4)


def test_threads_and_reading_on_demand_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = (_fill(tmp_path / "x", _four()), _zip(tmp_path / "x.zip", _four()))
    images = _open(paths[0])
    monkeypatch.setattr("diffusion_pl.data.dataset.MEMORY_LIMIT", 100)
    for path in paths:
        on_demand = _open(path)
        assert not isinstance(on_demand.store, torch.Tensor)
        assert on_demand.fingerprint == images.fingerprint
        # Loader workers receive the store by fork or by pickle.
        copied = pickle.loads(pickle.dumps(on_demand))
        order = torch.tensor([3, 0, 2])
        assert torch.equal(copied.read(order), images.read(order))


def _read_each(images: Images, expected: list[np.ndarray]) -> None:
    torch.set_num_threads(1)  # as loader workers do: a pool of threads does not survive a fork
    for number, pixels in enumerate(expected):
        found = images.read(torch.tensor([number]))[0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, pixels)


def test_forked_workers_read_one_zip_without_disturbing_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file opened before the fork has one position, which both processes would move."""
    monkeypatch.setattr("diffusion_pl.data.dataset.MEMORY_LIMIT", 100)
    files = {f"{number:03}.png": _file(_noise(number)) for number in range(300)}
    images = _open(_zip(tmp_path / "x.zip", files))
    arguments = (images, [_pixels(data) for data in files.values()])
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_read_each, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    more = {
        "b/.2.png": b"",
        ".git/x.png": b"",
        "__MACOSX/b/._2.png": b"",
        "b/notes.txt": b"",
        "Thumbs.db": b"",
        "LICENSE": b"",
    }
    expected = _open(_fill(tmp_path / "x", _four()), labels=True).fingerprint
    for path in (_fill(tmp_path / "y", _four() | more), _zip(tmp_path / "y.zip", _four() | more)):
        assert _open(path, labels=True).fingerprint == expected


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "no images here"),
        ({"a.txt": b""}, "no images here"),
        ({"a.gif": b""}, r"a\.gif: not PNG, JPEG or WebP; convert it"),
        ({"a/broken.png": b"\x89PNG"}, r"a/broken\.png: not a PNG, JPEG or WebP image"),
        ({"a/cut.png": _file(_noise(0, 40, 40))[:900]}, r"a/cut\.png: broken image"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_cannot_be_read_is_named(
    tmp_path: Path, kind: Literal["folder", "zip"], files: dict[str, bytes], complaint: str
) -> None:
    (tmp_path / "x").mkdir()
    path = _fill(tmp_path / "x", files) if kind == "folder" else _zip(tmp_path / "x.zip", files)
    with pytest.raises(ValueError, match=f"x(.zip)?[/:] ?{complaint}"):
        _open(path)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (_four() | {"top.png": _file(_noise(4))}, r"top\.png: in no folder, so without a class"),
        (
            {f"all/{number}.png": _file(_noise(number)) for number in range(2)},
            "only class is 'all'",
        ),
        ({f"a/{number}/x.png": _file(_noise(9)) for number in "1"}, "the only class is '1'"),
    ],
)
def test_folders_that_are_no_classes_are_refused(
    tmp_path: Path, files: dict[str, bytes], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        _open(_fill(tmp_path, files), labels=True)


def test_a_folder_around_the_classes_is_none(tmp_path: Path) -> None:
    """As archives of a folder have it: what holds everything tells nothing apart."""
    for name in ("all", "all/of/them"):
        wrapped = {f"{name}/{each}": data for each, data in _four().items()}
        images = _open(_zip(tmp_path / "x.zip", wrapped), labels=True)
        assert images.labels is not None and images.labels.tolist() == [0, 0, 1, 1]
        assert images.class_names == ("a", "b")


def test_a_path_to_nothing_and_a_file_that_is_no_zip_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder or zip file"):
        _open(tmp_path / "nowhere")
    (tmp_path / "x.zip").write_bytes(_file(_noise(0)))
    with pytest.raises(ValueError, match=r"x\.zip: not a readable zip file"):
        _open(tmp_path / "x.zip")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    _fill(tmp_path, _four())
    (tmp_path / "a").chmod(0)
    with pytest.raises(ValueError, match=r"a: cannot be read \(Permission denied\)"):
        _open(tmp_path)
    (tmp_path / "a").chmod(0o700)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    (_fill(tmp_path, _four()) / "b" / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"link\.png: cannot be read \(No such file"):
        _open(tmp_path)


def test_linked_folders_are_followed_but_never_round_a_loop(tmp_path: Path) -> None:
    _fill(tmp_path / "elsewhere", _four())
    (tmp_path / "set").mkdir()
    for name in "ab":
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert len(_open(tmp_path / "set", labels=True)) == 4
    (tmp_path / "elsewhere" / "a" / "loop").symlink_to(tmp_path / "elsewhere" / "a")
    with pytest.raises(ValueError, match="loop: reached a second time"):
        _open(tmp_path / "set")


def _patched(path: Path, files: dict[str, bytes], offset: int, value: bytes) -> Path:
    """A zip whose first central directory entry is changed at an offset (APPNOTE 4.3.12)."""
    data = bytearray(_zip(path, files).read_bytes())
    start = data.index(b"PK\x01\x02") + offset
    data[start : start + len(value)] = value
    path.write_bytes(data)
    return path


def test_encrypted_huge_and_odd_zip_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with pytest.raises(ValueError, match=r"b/2\.png is encrypted"):
        _open(_patched(path, _four(), 8, b"\x01\0"))
    with pytest.raises(ValueError, match=r"b/2\.png is too large for an image"):
        _open(_patched(path, _four(), 24, struct.pack("<I", 2**30)))
    for name in ("../a.png", "/a.png"):
        with pytest.raises(ValueError, match=r"a\.png has an odd path"):
            _open(_zip(path, {name: _file(_noise(0))}))


def test_a_zip_member_that_is_larger_than_it_says_is_refused(tmp_path: Path) -> None:
    """The announced size, which is limited, is all that is unpacked; the check sum then fails."""
    path = _patched(tmp_path / "x.zip", {"a.png": _file(_noise(0))}, 24, struct.pack("<I", 50))
    with pytest.raises(ValueError, match=r"a\.png is damaged"):
        _open(path)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [({"fit": "stretch"}, "fit is crop, pad or exact"), ({"resolution": 0}, "resolution must be")],
)
def test_a_wrong_setting_is_one_clear_line(
    tmp_path: Path, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        _open(_fill(tmp_path, _four()), **settings)
