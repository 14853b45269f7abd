"""Token states of a prepared data set's captions on the disk: written in blocks, read by offset.

    DEST/text/encodings.json             `Encoding` of every encoder; written last
    DEST/text/ENCODER-DIGEST-LENGTH/
        index.npy                        an array of `ROW`, a row a caption, then one for ""
        000000.f16, ...                  token states (T, E), little-endian float16, one caption's
                                         after another's; 4 MiB, 8, 16 ... and then 64 each,
                                         and what the last batch of captions adds

A block depends on captions and encoder alone. It gets its name when all of it is on the disk, and
its rows of the index lie in `.progress` until the last block is written, so the same command
finishes a killed run; it does about half at most of what was done again, and 64 MiB at most.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion_pl import locks
from diffusion_pl.data.caption_files import array_of, check_file, open_captions, write_file
from diffusion_pl.data.encoding import batch_size, states_of
from diffusion_pl.data.shard_format import LARGEST_MANIFEST, PROGRESS, Manifest
from diffusion_pl.data.stored import (
    ENCODINGS,
    STATES_INDEX,
    TEXT,
    Encoding,
    StoredFile,
    block_name,
    encodings_text,
    folder_of,
    no_captions,
    read_encodings,
)
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small, regular, sweep
from diffusion_pl.progress import Report
from diffusion_pl.text import Encoder
from diffusion_pl.texts import Captions, captions_fingerprint

# A block ends with the batch of captions that reaches so many bytes: the first, and any.
FIRST_BYTES, BLOCK_BYTES = 4 * 1024**2, 64 * 1024**2

# Where a caption's states lie: bytes from the start of a block; `crc` is zlib.crc32 of them.
ROW = np.dtype([("block", "<u4"), ("tokens", "<u4"), ("offset", "<u8"), ("crc", "<u4")])

_MAPPED = 64  # blocks mapped at a time
_ATTEMPTS = 5  # to map a block


def local_encodings(folder: Path) -> list[Encoding]:
    """The encodings of a prepared data set; none where none was written.

    Raises:
        UserError: a damaged description.
    """
    path = folder / ENCODINGS
    if not path.exists():
        return []
    return read_encodings(read_small(path, LARGEST_MANIFEST), str(path))


def caption_print(manifest: Manifest) -> str:
    """The fingerprint of a set's captions, as of `Captions`."""
    assert manifest.captions is not None
    return captions_fingerprint({Path(f.file).name: f.sha256 for f in manifest.captions.files})


# Writing.


def encode(folder: Path, encoder: Encoder, report: Report) -> tuple[Encoding, bool]:
    """Write the token states of a prepared data set's captions, or go on with it.

    Args:
        folder: of the data set.
        encoder: frozen.
        report: called with captions of earlier runs, of this run, and in all.

    Returns:
        The encoding, and whether it was there before.

    Raises:
        UserError: a set without captions, or encoded otherwise by an encoder of that name; states
            that float16 can't hold; a full disk.
    """
    manifest = Manifest.read(folder)
    if manifest.captions is None:
        raise UserError(no_captions(str(folder)))
    captions = open_captions(folder, manifest.captions, manifest.count)
    with locks.hold(folder / TEXT / ".lock", "encoding captions of", folder):
        before = local_encodings(folder)
        there = next((each for each in before if each.encoder == encoder.name), None)
        if there is not None:
            _refuse_difference(there, encoder, caption_print(manifest), folder)
            return there, True
        place = folder / folder_of(encoder.name, encoder.digest, encoder.length)
        made = _blocks(place, captions, encoder, caption_print(manifest), report)
        encoding = _finish(folder, place, encoder, caption_print(manifest), made)
        write_file(folder / ENCODINGS, encodings_text([*before, encoding]).encode())
        shutil.rmtree(place / PROGRESS)
    return encoding, False


def _refuse_difference(there: Encoding, encoder: Encoder, captions: str, folder: Path) -> None:
    was = (there.digest, there.width, there.length, there.captions)
    if was == (encoder.digest, encoder.width, encoder.length, captions):
        return
    if there.captions != captions:
        what = "other captions were encoded"
    else:
        what = (
            f"the captions are encoded by {there.encoder} of sha256 {there.digest[:12]} in "
            f"{there.length} tokens, and this one has sha256 {encoder.digest[:12]} and "
            f"{encoder.length} tokens"
        )
    raise UserError(
        f"{folder}: {what}; remove {folder / ENCODINGS} and {folder / there.folder} to encode anew"
    )


@dataclass
class _Block:
    """The record of a finished block."""

    rows: npt.NDArray[np.void]
    bytes: int
    sha256: str
    cut: int


def _blocks(
    place: Path, captions: Captions, encoder: Encoder, captions_print: str, report: Report
) -> list[_Block]:
    """The blocks of an encoding: those of earlier runs, and the rest, which is encoded."""
    sweep(place)
    total = len(captions) + 1
    made: list[_Block] = []
    while (block := _read_block(place, len(made), captions_print)) is not None:
        made.append(block)
    done = earlier = sum(len(each.rows) for each in made)
    while done < total:
        rows, data, cut = [], io.BytesIO(), 0
        most = min(BLOCK_BYTES, FIRST_BYTES * 2 ** len(made))
        while done < total and data.tell() < most:
            batch = range(done, min(done + batch_size(encoder), total))
            words = [captions[each] if each < len(captions) else "" for each in batch]
            for states, is_cut in states_of(words, encoder):
                kept = np.ascontiguousarray(states, dtype="<f2").tobytes()
                rows.append((len(made), len(states), data.tell(), zlib.crc32(kept)))
                data.write(kept)
                cut += is_cut
            done = batch.stop
            report(earlier, done - earlier, total)
        written = data.getvalue()
        digest = hashlib.sha256(written).hexdigest()
        block = _Block(np.array(rows, dtype=ROW), len(written), digest, cut)
        write_file(place / block_name(len(made)), written)
        _note_block(place, len(made), block, captions_print)
        made.append(block)
    return made


def _noted(place: Path, number: int) -> Path:
    return place / PROGRESS / f"{number:06d}.npz"


def _note_block(place: Path, number: int, block: _Block, captions: str) -> None:
    about = {"bytes": block.bytes, "sha256": block.sha256, "cut": block.cut, "captions": captions}
    buffer = io.BytesIO()
    noted = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(buffer, rows=block.rows, about=noted)
    write_file(_noted(place, number), buffer.getvalue())


def _read_block(place: Path, number: int, captions: str) -> _Block | None:
    """A block that an earlier run finished; None where it is to be written."""
    try:
        with np.load(regular(_noted(place, number)), allow_pickle=False) as noted:
            about: dict[str, Any] = json.loads(noted["about"].tobytes())
            rows = noted["rows"]
        block = _Block(rows, about["bytes"], about["sha256"], about["cut"])
        path = place / block_name(number)
        whole = about["captions"] == captions and path.stat().st_size == block.bytes
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return block if whole and rows.dtype == ROW else None


def _finish(
    folder: Path, place: Path, encoder: Encoder, captions: str, made: list[_Block]
) -> Encoding:
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate([block.rows for block in made]), allow_pickle=False)
    data = buffer.getvalue()
    write_file(place / STATES_INDEX, data)
    inside = place.relative_to(folder).as_posix()
    digest = hashlib.sha256(data).hexdigest()
    return Encoding(
        encoder=encoder.name,
        digest=encoder.digest,
        width=encoder.width,
        length=encoder.length,
        captions=captions,
        cut=sum(block.cut for block in made),
        index=StoredFile(f"{inside}/{STATES_INDEX}", len(data), digest),
        blocks=[
            StoredFile(f"{inside}/{block_name(number)}", block.bytes, block.sha256)
            for number, block in enumerate(made)
        ],
    )


def not_encoded(where: str, encoder: str, there: list[Encoding]) -> str:
    """The error where an encoder's token states are not there."""
    names = ", ".join(each.encoder for each in there)
    return (
        f"{where}: its captions are not encoded by {encoder}"
        + (f", but by {names}" if names else "")
        + f"; run python -m diffusion_pl prepare {where} --encode {encoder}"
    )


# Reading.


@dataclass
class StoredStates:
    """Token states in blocks on the disk, each mapped when it is needed.

    Args:
        index: of ROW, checked.
        width: E.
        path: the file of a block, fetched if it is remote.
        renew: whether another read of a damaged block may give other bytes.

    A process compares the states of a caption with their check sum when it first reads them.
    """

    index: npt.NDArray[np.void]
    width: int
    path: Callable[[int], Path]
    renew: Callable[[int], bool]
    _maps: OrderedDict[int, npt.NDArray[np.float16]] = field(
        default_factory=OrderedDict, repr=False
    )
    _checked: bytearray = field(default_factory=bytearray, repr=False)

    def __post_init__(self) -> None:
        self._checked = bytearray(len(self.index))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": OrderedDict()}

    def read(self, numbers: Sequence[int]) -> list[npt.NDArray[np.float16]]:
        """(T, E) of each caption.

        Raises:
            UserError: a block that is damaged or can't be read.
        """
        # Columns and blocks are looked up once a batch: for each caption that takes longer than
        # copying its states.
        rows = self.index[np.asarray(numbers, dtype=np.int64)]
        blocks = {block: self._map(block) for block in set(rows["block"].tolist())}
        firsts = rows["offset"] // np.uint64(2 * self.width)
        columns = (rows["block"], firsts, rows["tokens"], rows["crc"])
        found = []
        for number, block, first, tokens, crc in zip(
            numbers, *(column.tolist() for column in columns), strict=True
        ):
            states = blocks[block][first : first + tokens]
            if not self._checked[number] or len(states) != tokens:
                if _is_other(states, tokens, crc):
                    states = blocks[block] = self._again(block)
                    states = states[first : first + tokens]
                    if _is_other(states, tokens, crc):
                        raise UserError(
                            f"{self.path(block)}: damaged at byte {2 * self.width * first:,}; "
                            f"fetch it again, or remove it and {ENCODINGS} and encode the captions "
                            "again"
                        )
                self._checked[number] = 1
            found.append(states)
        return found

    def _again(self, block: int) -> npt.NDArray[np.float16]:
        """A damaged block, fetched anew; no token where nothing else can be had."""
        self._maps.pop(block, None)
        if not self.renew(block):
            return np.empty((0, self.width), dtype=np.float16)
        return self._map(block)

    def _map(self, block: int) -> npt.NDArray[np.float16]:
        """The token states (T, E) of a block."""
        # Single operations, so that threads need no lock.
        found = self._maps.pop(block, None)
        for left in reversed(range(_ATTEMPTS)) if found is None else ():
            path = self.path(block)
            try:
                data = np.asarray(np.memmap(regular(path), dtype=np.uint8, mode="r"))
                whole = len(data) // (2 * self.width) * 2 * self.width  # of a truncated one
                found = data[:whole].view("<f2").reshape(-1, self.width)
                break
            except (OSError, ValueError) as error:
                # Another process may have made room between fetching and mapping.
                if not isinstance(error, FileNotFoundError) or not left:
                    reason = getattr(error, "strerror", None) or error
                    raise UserError(f"{path}: cannot be read ({reason})") from error
        assert found is not None
        self._maps[block] = found
        while len(self._maps) > _MAPPED:
            self._maps.popitem(last=False)
        return found


def _is_other(states: npt.NDArray[np.float16], tokens: int, crc: int) -> bool:
    """Whether token states are not those that the index states."""
    return len(states) != tokens or zlib.crc32(states.data) != crc


def open_index(folder: Path, encoding: Encoding, captions: int) -> npt.NDArray[np.void]:
    """The index of an encoding, checked.

    Args:
        folder: of the data set, or where the index was fetched to.
        encoding: of encodings.json.
        captions: how many there are.

    Raises:
        UserError: absent, damaged, or not of the captions and blocks.
    """
    check_file(folder, encoding.index)
    path = folder / encoding.index.file
    index = array_of(path, ROW)
    sizes = np.array([block.bytes for block in encoding.blocks], dtype=np.uint64)
    fits = (
        index.shape == (captions + 1,)
        and bool((index["block"] < len(sizes)).all())
        and bool((index["tokens"] <= encoding.length).all())
    )
    if fits:
        ends = index["offset"] + index["tokens"].astype(np.uint64) * np.uint64(2 * encoding.width)
        starts = index["offset"] % np.uint64(2 * encoding.width) == 0
        fits = bool(
            starts.all()
            and (index["offset"] < 2**62).all()
            and (ends <= sizes[index["block"]]).all()
        )
    if not fits:
        raise UserError(f"{path}: not of the captions and blocks of {ENCODINGS}; encode them again")
    return index
