"""The texts of prepared shards, in a folder or at an address."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusion_pl.data.caption_files import open_captions
from diffusion_pl.data.encodings import (
    StoredStates,
    caption_print,
    local_encodings,
    not_encoded,
    open_index,
)
from diffusion_pl.data.shard_format import LARGEST_MANIFEST, Manifest
from diffusion_pl.data.stored import (
    ENCODINGS,
    Encoding,
    StoredFile,
    no_captions,
    read_encodings,
)
from diffusion_pl.errors import UserError
from diffusion_pl.io.cache import Cache, read
from diffusion_pl.texts import TextTable

AUTO = "auto"


def chosen(where: str, manifest: Manifest, text: str, cache: Cache | None) -> Encoding:
    """The encoding that `text` names.

    Args:
        where: folder or address of the data set.
        manifest: of the data set.
        text: name of an encoder, or "auto" for the only one there is.
        cache: of a remote set.

    Raises:
        UserError: no captions, or no such encoding of them.
    """
    if manifest.captions is None:
        raise UserError(f"data.dataset.text is {text}; {no_captions(where)}")
    if cache is None:
        there = local_encodings(Path(where))
    else:
        address = f"{where.rstrip('/')}/{ENCODINGS}"
        data = read(address, LARGEST_MANIFEST)
        there = [] if data is None else read_encodings(data, address)
    if text == AUTO:
        if len(there) > 1:
            names = ", ".join(each.encoder for each in there)
            raise UserError(
                f"{where}: its captions are encoded by {names}; choose by data.dataset.text="
                f"{there[0].encoder}"
            )
        found = there[0] if there else None
    else:
        found = next((each for each in there if each.encoder == text), None)
    if found is None:
        raise UserError(not_encoded(where, "minilm" if text == AUTO else text, there))
    if found.captions != caption_print(manifest):
        raise UserError(
            f"{where}: other captions than these were encoded; remove {ENCODINGS} there, and run "
            f"python -m diffusion_pl prepare {where} --encode {found.encoder}"
        )
    return found


@dataclass
class _Blocks:
    """The files of an encoding's blocks: where they are, or where they are fetched to."""

    where: str
    encoding: Encoding
    cache: Cache | None

    def path(self, number: int) -> Path:
        block = self.encoding.blocks[number]
        if self.cache is None:
            return Path(self.where) / block.file
        address = f"{self.where.rstrip('/')}/{block.file}"
        return self.cache.fetch(address, _cached(block), block.bytes, block.sha256)

    def renew(self, number: int) -> bool:
        """Drop a damaged block from the cache; whether the next read may give other bytes."""
        block = self.encoding.blocks[number]
        if self.cache is None:
            return False
        return self.cache.drop_damaged(_cached(block), block.sha256)


def _cached(block: StoredFile) -> str:
    return f"{block.sha256}.f16"


def open_texts(
    where: str, folder: Path, manifest: Manifest, encoding: Encoding, cache: Cache | None
) -> TextTable:
    """The captions of a prepared data set and their token states.

    Args:
        where: folder or address of the data set.
        folder: that folder, or the one that its index was fetched to.
        manifest: of the data set.
        encoding: that `chosen` gave.
        cache: of a remote set.

    Raises:
        UserError: files that are damaged or can't be fetched.
    """
    assert manifest.captions is not None
    if cache is not None:
        for each in (*manifest.captions.files, encoding.index):
            _fetch(where, folder, each)
    captions = open_captions(folder, manifest.captions, manifest.count)
    index = open_index(folder, encoding, len(captions))
    blocks = _Blocks(where, encoding, cache)
    return TextTable(
        encoder=encoding.encoder,
        digest=encoding.digest,
        width=encoding.width,
        length=encoding.length,
        captions=captions,
        states=StoredStates(index, encoding.width, blocks.path, blocks.renew),
    )


def _fetch(where: str, folder: Path, stored: StoredFile) -> None:
    """Fetch a file beside the index, again where it is damaged."""
    path = folder / stored.file
    cache = Cache(path.parent, stored.bytes)
    if cache.has(path.name, stored.bytes):
        cache.drop_damaged(path.name, stored.sha256)
    address = f"{where.rstrip('/')}/{stored.file}"
    cache.fetch(address, path.name, stored.bytes, stored.sha256)
