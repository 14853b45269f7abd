"""Check that a prepared data set is, byte for byte, what `prepare` wrote.

Training checks every image by its check sum. Names and labels in the tars, which other readers use,
are covered only by the digest of the whole file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffusion_pl.data.shard_format import INDEX, SHARDS, Manifest, open_index
from diffusion_pl.data.stored import ENCODINGS
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import sha256_of

_AGAIN = "fetch or prepare the data again"


def verify(folder: Path) -> Manifest:
    """Compare every file of a prepared data set with its digest.

    Raises:
        UserError: a line for each file that is damaged, missing or not of the set.
    """
    manifest = Manifest.read(folder)
    problems = list(_problems(folder, manifest))
    if problems:
        raise UserError("\n".join(problems))
    return manifest


def _problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    index = folder / INDEX
    found = _digest(index)
    if found != manifest.index_sha256:
        yield f"{index}: {_differs(found, manifest.index_sha256)}; {_AGAIN}"
    else:
        open_index(folder, manifest)  # its shape and columns
    for shard in manifest.shards:
        path = folder / shard.file
        found = _digest(path)
        if found != shard.sha256:
            yield f"{path}: {_differs(found, shard.sha256)}; {_AGAIN}"
    yield from _text_problems(folder, manifest)
    known = {shard.file for shard in manifest.shards}
    for path in sorted((folder / SHARDS).glob("*.tar")):
        if f"{SHARDS}/{path.name}" not in known:
            yield f"{path}: is not in dataset.json; remove it, other readers would take it"


def _text_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """The same of captions and their token states."""
    if manifest.captions is None:
        return
    from diffusion_pl.data.encodings import caption_print, local_encodings  # wait for torch

    encodings = local_encodings(folder)
    stored = list(manifest.captions.files)
    for each in encodings:
        stored += [each.index, *each.blocks]
        if each.captions != caption_print(manifest):
            yield f"{folder / ENCODINGS}: {each.encoder} encoded other captions; encode these"
    for file in stored:
        path = folder / file.file
        found = _digest(path)
        if found != file.sha256:
            yield f"{path}: {_differs(found, file.sha256)}; {_AGAIN}"


def _digest(path: Path) -> str:
    """sha256 (hex) of a file; what is wrong with it where it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _differs(found: str, wanted: str) -> str:
    if not found.isalnum():
        return found
    return f"is damaged, its sha256 is {found[:12]}... where {wanted[:12]}... was written"
