"""The files of a folder or a zip archive, without hidden and system files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import last_change, regular

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".webp"})

# Image formats that are not read: refused, since files left out silently would go unnoticed.
FOREIGN = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".ppm", ".pgm", ".tga"}
    | {".tif", ".tiff"}
)

# Characters that would end an error line or move the cursor of a terminal.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

# Bytes; more than the largest image has when decoded.
LARGEST_FILE = 256 * 1024**2

# What `sample` writes: how the images were sampled, and the folder of the images.
SAMPLE, IMAGES = "sample.json", "images"

# Files of systems and programs, besides hidden ones.
_LEFTOVERS = frozenset(
    {
        "__macosx", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r",
        "@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "lost+found",
        "system volume information", "network trash folder", "temporary items", "__pycache__",
    }
)  # fmt: skip

# The first bytes of a PNG, a JPEG and a WebP.
_STARTS = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
HEAD = 12

# An ending that names a file type. That of `7`, `x.0001` or `y.jpg_large` does not; there the
# first bytes decide.
_PLAIN_ENDING = re.compile(r"\.[a-z][a-z0-9]{0,9}")


def is_leftover(name: str) -> bool:
    """Whether a path is, or lies in, a hidden or system file or folder."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") or part.lower() in _LEFTOVERS for part in parts)


def ending_of(name: str) -> str:
    """The ending of a file's name, in lower case with its point; empty where there is none."""
    return PurePosixPath(name).suffix.lower()


def needs_content(ending: str) -> bool:
    """Whether only the first bytes of a file tell if it is an image."""
    return ending not in EXTENSIONS and not _PLAIN_ENDING.fullmatch(ending)


def begins_as_image(head: bytes) -> bool:
    """Whether a file with these first bytes (`HEAD` of them) is a PNG, JPEG or WebP."""
    return _STARTS.match(head) is not None


class Files(Protocol):
    """Named files of a folder or an archive; each method raises UserError for a damaged one."""

    def names(self) -> list[str]:
        """Relative paths with forward slashes, in any order, without system files."""

    def folders(self, inside: str) -> list[str]:
        """Names of the folders directly in a folder, "" for the top, without system folders."""

    def read(self, name: str) -> bytes:
        """The bytes of a file, at most LARGEST_FILE."""

    def size(self, name: str) -> int:
        """Bytes of a file; 0 where it is gone."""

    def head(self, name: str) -> bytes:
        """The first bytes of a file, at most HEAD."""

    def state(self, name: str) -> str:
        """Size, or size and check sum, of a file: known without reading it."""

    def changed(self, name: str) -> int:
        """When a file was last written or replaced, ns; 0 where its check sum tells."""


def read_sample(folder: Path) -> dict[str, Any] | None:
    """Read sample.json of a folder of sampled images; None where there is none.

    Raises:
        UserError: damaged, or another file of that name.
    """
    path = folder / SAMPLE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError("too large")
        said = json.loads(path.read_bytes())
        if not isinstance(said, dict) or type(said.get("settings")) is not dict:
            raise UserError("it has no settings")
        if not all(type(said.get(key)) is int and said[key] >= 0 for key in ("first", "count")):
            raise UserError("it does not count its images")
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: does not describe sampled images ({reason}); remove it"
        ) from error
    return said


def opened(path: str) -> Files:
    """The files of a folder or of a zip file.

    Raises:
        UserError: neither is there.
    """
    place = Path(path)
    if place.is_dir():
        drawn = None
        if (place / IMAGES).is_dir():  # else a sample.json is somebody else's
            with contextlib.suppress(ValueError):
                drawn = read_sample(place)
        return FolderFiles(place if drawn is None else place / IMAGES)
    if place.is_file():
        return ZipFiles(place)
    raise UserError(f"{path}: no such folder or zip file")


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder and of the folders in it."""

    path: Path

    def names(self) -> list[str]:
        found: list[str] = []
        visited: set[str] = set()
        # Links are followed, since folders of classes are often linked together; loops are refused.
        for folder, folders, files in os.walk(self.path, followlinks=True, onerror=self._refuse):
            real = os.path.realpath(folder)
            if real in visited:
                raise UserError(f"{folder}: reached a second time, by a link; remove the link")
            visited.add(real)
            folders[:] = [name for name in folders if not is_leftover(name)]
            inside = PurePosixPath(Path(folder).relative_to(self.path).as_posix())
            found += [str(inside / name) for name in files if not is_leftover(name)]
        return found

    def folders(self, inside: str) -> list[str]:
        entries = (self.path / inside).iterdir()
        return [each.name for each in entries if each.is_dir() and not is_leftover(each.name)]

    def _refuse(self, error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    def read(self, name: str) -> bytes:
        path = self.path / name
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise UserError(f"{path}: too large for an image")
            return regular(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error

    def size(self, name: str) -> int:
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return 0

    def head(self, name: str) -> bytes:
        path = self.path / name
        try:
            if not path.is_file():  # a pipe might never give any
                return b""
            with regular(path).open("rb") as file:
                return file.read(HEAD)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error

    def state(self, name: str) -> str:
        try:
            return str((self.path / name).stat().st_size)
        except OSError:
            return ""

    def changed(self, name: str) -> int:
        return last_change(self.path / name)


@dataclass
class ZipFiles:
    """The files of a zip archive."""

    path: Path
    # The process that opened the archive, and the archive: forked workers would share one file
    # position.
    _opened: tuple[int, zipfile.ZipFile] | None = field(default=None, repr=False)
    _entries: dict[str, zipfile.ZipInfo] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_opened": None, "_entries": None}

    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = (os.getpid(), zipfile.ZipFile(regular(self.path)))
            except Exception as error:
                # A damaged central directory raises nearly anything.
                raise UserError(f"{self.path}: not a readable zip file ({error})") from error
            self._entries = None
        return self._opened[1]

    def _found(self) -> dict[str, zipfile.ZipInfo]:
        """The files by their paths, checked."""
        archive = self._archive()
        if self._entries is not None:
            return self._entries
        entries = [(_path_of(each), each) for each in archive.infolist()]
        # zipfile's is_dir raises for an entry without a name.
        files = [(name, each) for name, each in entries if name[-1:] != "/"]
        for name, _ in files:
            if name.startswith("/") or ".." in name.split("/") or re.match(r"[A-Za-z]:/", name):
                shown = repr(name) if CONTROL.search(name) else name
                raise UserError(f"{self.path}: {shown} has an odd path")
        files = [(name, each) for name, each in files if not is_leftover(name)]
        for name, entry in files:
            refuse_control(name, self.path)
            if entry.flag_bits & 1:
                raise UserError(f"{self.path}: {name} is encrypted")
        found = dict(files)
        if len(found) < len(files):
            [(twice, _)] = Counter(name for name, _ in files).most_common(1)
            raise UserError(f"{self.path}: {twice} is there twice")
        self._entries = found
        return found

    def names(self) -> list[str]:
        return list(self._found())

    def folders(self, inside: str) -> list[str]:
        start = f"{inside}/" if inside else ""
        paths = (_path_of(each) for each in self._archive().infolist())
        below = {path[len(start) :] for path in paths if path.startswith(start)}
        within = {rest.partition("/")[0] for rest in below if "/" in rest}
        return [name for name in within if not is_leftover(name)]

    def _entry(self, name: str) -> zipfile.ZipInfo:
        entry = self._found().get(name)
        if entry is None:
            raise UserError(f"{self.path}: {name} is gone; it was there before")
        if entry.file_size > LARGEST_FILE:
            raise UserError(f"{self.path}: {name} is too large for an image")
        return entry

    def read(self, name: str) -> bytes:
        entry = self._entry(name)
        try:
            # No more is unpacked than the entry announces, which is limited.
            return self._archive().read(entry)
        except Exception as error:
            # zipfile passes on whatever its decompressors raise, and KeyError if the file changed.
            raise UserError(f"{self.path}: {name} is damaged ({error})") from error

    def size(self, name: str) -> int:
        return self._found()[name].file_size if name in self._found() else 0

    def head(self, name: str) -> bytes:
        try:
            with self._archive().open(self._found()[name]) as file:
                return file.read(HEAD)
        except Exception as error:
            raise UserError(f"{self.path}: {name} is damaged ({error})") from error

    def state(self, name: str) -> str:
        entry = self._found()[name]
        return f"{entry.file_size} {entry.CRC}"

    def changed(self, name: str) -> int:
        return 0  # the check sum tells


def _path_of(entry: zipfile.ZipInfo) -> str:
    """The path of an entry with forward slashes; some archivers write backslashes."""
    utf8 = bool(entry.flag_bits & 0x800)
    # In some code pages the byte may be the second half of a letter.
    return entry.filename.replace("\\", "/") if utf8 or entry.filename.isascii() else entry.filename


def refuse_control(name: str, where: object) -> None:
    """Refuse a name with control characters.

    Raises:
        UserError: it has some.
    """
    if CONTROL.search(name):
        raise UserError(f"{where}: {name!r} is an odd name; rename it")
