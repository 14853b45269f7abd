"""CIFAR-10 (Krizhevsky 2009) from its "python version" archive, whole or a subset of it."""

import gzip
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from diffusion_pl.data.dataset import load, reduced
from diffusion_pl.errors import UserError
from diffusion_pl.images import Images
from diffusion_pl.io.download import fetch
from diffusion_pl.io.files import regular
from diffusion_pl.io.unpickle import read_plain

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
DEFAULT_PATH = "data/cifar10"

# The files of each split, in the order in which their images are numbered.
BATCHES = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test": ("test_batch",),
}
FULL = {"train": 50_000, "test": 10_000}

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

_FOLDER = "cifar-10-batches-py"
_ARCHIVE = "cifar-10-python.tar.gz"

# A batch of 10,000 images is 31 MB, up to twice that when bytes are pickled as text.
_LARGEST_BATCH = 96 * 1024**2
_LARGEST_ARCHIVE = 2 * 1024**3


@dataclass(frozen=True)
class CIFAR10:
    """CIFAR-10: 32 x 32 RGB, ten classes.

    Args:
        path: the archive, a folder that holds it, or the unpacked `cifar-10-batches-py`. Where the
            default folder holds none of them, `prepare` fetches the official archive (163 MiB).
        split: the 50,000 training or the 10,000 test images; an archive with fewer is named so.
    """

    path: str = DEFAULT_PATH
    split: Literal["train", "test"] = "train"

    @property
    def resolution(self) -> int:
        """Pixels."""
        return 32

    @property
    def channels(self) -> int:
        """RGB."""
        return 3

    def prepare(self) -> None:
        """Find the archive, or fetch it where the default folder has none.

        Raises:
            UserError: nothing at `path`, or the archive cannot be fetched.
        """
        if _find(Path(self.path)) is None and self.path == DEFAULT_PATH:
            fetch(URL, Path(self.path) / _ARCHIVE, SHA256)
        self._found()

    def open(self, resolution: int | None = None) -> Images:
        """Read the split into memory, straight from the archive.

        Args:
            resolution: 32, 16, 8, ...: the means of blocks.

        Raises:
            UserError: no archive, or one that is damaged or holds anything else.
        """
        found = self._found()
        if self.split not in BATCHES:
            raise UserError(f"CIFAR-10: split is train or test (got {self.split!r})")
        wanted = BATCHES[self.split]
        members = _from_folder(found, wanted) if found.is_dir() else _from_archive(found, wanted)
        for name in wanted:
            if name not in members:
                raise UserError(f"{found}: {name} is missing; is it the archive from {URL}?")
        batches = [_decode(members.pop(name), f"{found}: {name}") for name in wanted]
        images = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
        if len(images) > FULL[self.split]:
            raise UserError(f"{found}: {len(images):,} images, more than CIFAR-10 has")
        name = f"cifar10-{self.split}"
        if len(images) < FULL[self.split]:
            name = f"{name}-subset{len(images)}"
        store, numbers = torch.from_numpy(images), torch.from_numpy(labels)
        whole = load(name, store, numbers, classes=len(CLASSES), class_names=CLASSES)
        return reduced(whole, resolution)

    def validation(self) -> "CIFAR10 | None":
        """The test images; None of the test images themselves."""
        return replace(self, split="test") if self.split == "train" else None

    def _found(self) -> Path:
        found = _find(Path(self.path))
        if found is None:
            raise UserError(
                f"{self.path}: no CIFAR-10 archive here; put {_ARCHIVE} from {URL} there, or leave "
                f"out `path` to have it fetched to {DEFAULT_PATH}"
            )
        return found


def _find(path: Path) -> Path | None:
    """The archive or the folder of batches that `path` stands for."""
    if path.is_file():
        return path
    if (path / _ARCHIVE).is_file():
        return path / _ARCHIVE
    for folder in (path, path / _FOLDER):
        if any((folder / name).is_file() for names in BATCHES.values() for name in names):
            return folder
    archives = sorted(path.glob("*.tar.gz"))
    if len(archives) > 1:
        names = ", ".join(archive.name for archive in archives)
        raise UserError(f"{path}: several archives ({names}); name one of them in `path`")
    return archives[0] if archives else None


def _from_folder(folder: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    members = {}
    for name in wanted:
        path = folder / name
        if path.is_file():
            if path.stat().st_size > _LARGEST_BATCH:
                raise UserError(f"{path}: too large for a batch of CIFAR-10")
            members[name] = regular(path).read_bytes()
    return members


def _from_archive(path: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """The wanted members by name; nothing is unpacked to the disk.

    Raises:
        UserError: damaged, or a member that no such archive has.
    """
    members: dict[str, bytes] = {}
    try:
        # A stream, read once from front to back: that is how far a compressed file can be trusted.
        with gzip.open(regular(path)) as plain, tarfile.open(fileobj=plain, mode="r|") as archive:
            for member in archive:
                name = _admit(member, path)
                file = archive.extractfile(member) if name in wanted else None
                if file is not None:
                    if name in members:
                        raise UserError(f"{path}: {name} is there twice")
                    members[name] = file.read()
            # gzip's check sum stands at the very end, behind the last member.
            _exhaust(plain.read, path)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: damaged or not a .tar.gz ({error}); fetch it again") from error
    return members


def _exhaust(read: Callable[[int], bytes], path: Path) -> None:
    size = 0
    while block := read(1024**2):
        size += len(block)
        if size > _LARGEST_ARCHIVE:
            raise UserError(f"{path}: too large for CIFAR-10")


def _admit(member: tarfile.TarInfo, path: Path) -> str:
    """The file name of a member that an archive of this layout may have."""
    parts = PurePosixPath(member.name).parts
    inside = parts[:1] == (_FOLDER,) and ".." not in parts and len(parts) <= 2
    if not inside or not (member.isreg() or member.isdir()):
        raise UserError(
            f"{path}: odd member {member.name!r}; expected files in {_FOLDER}/; "
            f"a .tar.gz of anything else is read when it is unpacked, or a .tar"
        )
    if member.size > _LARGEST_BATCH:
        raise UserError(f"{path}: {member.name} is too large for a batch of CIFAR-10")
    return parts[-1]


def _decode(data: bytes, where: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (n, 3, 32, 32) and labels (n,) of one batch file.

    Raises:
        UserError: not n rows of 3,072 bytes with n labels 0..9.
    """
    batch = read_plain(data, where=where)
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= set(batch):
        raise UserError(f"{where}: not a CIFAR-10 batch, which holds b'data' and b'labels'")
    pixels, labels = batch[b"data"], batch[b"labels"]
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != 3072:
        found = pixels.shape if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise UserError(f"{where}: images must be an array (n, 3072) (got {found})")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not labels:
        found = len(labels) if isinstance(labels, list) else type(labels).__name__
        raise UserError(f"{where}: {len(pixels)} images need as many labels (got {found})")
    for label in labels:
        if type(label) is not int or not 0 <= label <= 9:
            raise UserError(f"{where}: labels are 0 to 9 (got {label!r})")
    # A row is the red plane, then green, then blue, each 32 x 32 row by row.
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)
