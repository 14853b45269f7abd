"""Whether a source still holds what a data set was prepared from."""

from __future__ import annotations

import glob
import json
import tarfile
from pathlib import Path
from typing import Any

from diffusion_pl.data.originals import Asked, Originals, digest_of, open_originals
from diffusion_pl.data.shard_format import Manifest
from diffusion_pl.files import regular

# Names are read out of the shards, a header an image: seconds for so many.
_MOST_NAMED = 100_000
_SHOWN = 3


def listed(originals: Originals) -> dict[str, Any]:
    """What a manifest keeps of a source, to hold it against later."""
    states = originals.states
    kept = {"originals": originals.count, "listing": originals.listing}
    return kept | ({} if states is None else {"states": digest_of(states)})


def check_unchanged(manifest: Manifest, asked: Asked, folder: Path) -> str | None:
    """List the source again and hold it against what was prepared.

    Args:
        manifest: of the data set.
        asked: its source.
        folder: the data set's.

    Returns:
        A note where the source is not there to be compared; None where it is the same.

    Raises:
        ValueError: the source holds other images now; which, in one line.
    """
    if asked.path == "synthetic":
        return None
    if not Path(asked.path).exists() and not glob.glob(asked.path):
        return f"{asked.path} is not there any more, so it was not compared"
    _, originals = open_originals(asked, manifest.resolutions)
    then, now = manifest.source, listed(originals)
    if all(then.get(key, value) == value for key, value in now.items()):
        return None
    difference = _difference(manifest, originals, folder)
    raise ValueError(
        f"{folder}: prepared from {then.get('originals'):,} images of {asked.path}, which holds "
        f"{originals.count:,} now: {difference}; prepare into a new folder, or remove {folder} "
        f"and prepare it again"
    )


def _difference(manifest: Manifest, originals: Originals, folder: Path) -> str:
    if originals.listing == manifest.source.get("listing"):
        return "files of the same names are others now"
    if originals.names is None or originals.count + manifest.count > _MOST_NAMED:
        return "the source's images are others now"
    left_out = "\n".join(manifest.skipped.values())
    before = _names(folder, manifest)
    now = set(originals.names)
    new = sorted(name for name in now - before if f"/{name}: " not in left_out)
    gone = sorted(before - now)
    changes = (("new", new), ("gone", gone))
    parts = [f"{len(names):,} {word} ({_some(names)})" for word, names in changes if names]
    return ", ".join(parts) or "the same names in another order or state"


def _names(folder: Path, manifest: Manifest) -> set[str]:
    """Names of the originals, as the shards keep them."""
    found = set()
    for shard in manifest.shards:
        path = folder / shard.file
        try:
            with tarfile.open(regular(path), "r:") as archive:
                for member in archive:
                    if member.name.endswith(".json"):
                        stream = archive.extractfile(member)
                        assert stream is not None
                        found.add(str(json.loads(stream.read())["name"]))
        except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); prepare the data again") from error
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
