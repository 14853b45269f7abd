"""Whether a source still holds what a data set was prepared from."""

from __future__ import annotations

import glob
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion_pl.data.labels import first_few
from diffusion_pl.data.recipe import Recipe, versions
from diffusion_pl.data.shard_format import Manifest, key_of, open_index
from diffusion_pl.data.sources.base import Originals, SourceSpec, digest_of
from diffusion_pl.data.sources.captions import cleaned
from diffusion_pl.data.sources.open import open_originals
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import last_change, regular

# Names are read from the shards, a header per image: seconds for so many.
_MOST_NAMED = 100_000
# Images that are prepared again to compare them: half a minute for large ones.
_MOST_MADE = 2_000


def source_state(originals: Originals) -> dict[str, Any]:
    """What a manifest keeps of a source, to compare the source with later."""
    states = originals.states
    kept = {"originals": originals.count, "listing": originals.listing}
    kept |= {} if states is None else {"states": digest_of(states)}
    captions = originals.captions
    return kept | ({} if captions is None else {"spoken": captions.reader.listing})


def check_unchanged(
    manifest: Manifest, spec: SourceSpec, recipe: Recipe, folder: Path
) -> str | None:
    """Compare a data set with its source as it is now.

    Returns:
        A note where not all of the source could be compared; None where it is the same.

    Raises:
        UserError: the source holds other images now; which, in one line.
    """
    if spec.path == "synthetic":
        return None
    if not Path(spec.path).exists() and not glob.glob(spec.path):
        return f"{spec.path} is not there any more, so it was not compared"
    _, originals = open_originals(spec, manifest.resolutions)
    then, now = manifest.source, source_state(originals)
    note = None
    if all(then.get(key, value) == value for key, value in now.items()):
        difference, note = _contents(manifest, originals, recipe, folder)
        if not difference:
            return note
    else:
        difference = _difference(manifest, originals, folder)
    raise UserError(
        f"{folder}: prepared from {then.get('originals'):,} images of {spec.path}, which holds "
        f"{originals.count:,} now: {difference}; prepare into a new folder, or remove {folder} "
        f"and prepare it again"
    )


def _contents(
    manifest: Manifest, originals: Originals, recipe: Recipe, folder: Path
) -> tuple[str, str | None]:
    """What differs though the names are the same ("" for nothing), and a note."""
    rows = open_index(folder, manifest)
    kept = [i for i in range(originals.count) if key_of(i) not in manifest.skipped]
    if len(kept) != len(rows):  # not of this source, whatever its listing says
        return "the source's images are others now", None
    if manifest.labels_from and originals.labels is not None:
        other = [
            i for i, now in zip(kept, rows["label"], strict=True) if originals.labels[i] != now
        ]
        if other or (originals.class_names or None) != (manifest.class_names or None):
            return f"the labels of {len(other):,} images, or the classes' names, are others", None
    made = [last_change(folder / shard.file) for shard in manifest.shards]
    places = {index: place for place, index in enumerate(kept)}
    since = {index: made[rows["shard"][place]] for index, place in places.items()}
    newer = written_since(originals, since)
    if newer and manifest.versions != versions():
        return "", (
            f"{len(newer):,} images were written anew since; whether they are others can't be "
            "told, for other versions of libraries made the set"
        )
    if originals.captions and not manifest.captions and manifest.count:
        return "", (
            f"the source has captions ({originals.captions.origin}), and the set was prepared "
            "without; prepare into a new folder to take them"
        )
    step = -(-len(newer) // _MOST_MADE) or 1
    looked = newer[::step]
    others = [i for i in looked if not is_as_made(originals, recipe, i, rows[places[i]])]
    spoken = _other_captions(manifest, originals, folder, {i: places[i] for i in looked})
    if spoken:
        return f"the captions of {spoken:,} images are others", None
    if others:
        which = f" ({first_few([originals.names[i] for i in others])})" if originals.names else ""
        return f"{len(others):,} of the same name and size are other images{which}", None
    if step > 1:
        return "", (
            f"{len(newer):,} images were written anew since; of {len(looked):,} that were compared "
            "none is another"
        )
    return "", None


def _other_captions(
    manifest: Manifest, originals: Originals, folder: Path, places: Mapping[int, int]
) -> int:
    """How many of these originals, by their place in the set, have other captions now."""
    if manifest.captions is None or not places:
        return 0
    from diffusion_pl.data.caption_files import open_captions  # which waits for torch

    captions = open_captions(folder, manifest.captions, manifest.count)
    source = originals.captions
    now = {i: cleaned(source.reader.read(i), Counter()) if source else [] for i in places}
    return sum(tuple(now[i]) != captions.of_image(place) for i, place in places.items())


def written_since(originals: Originals, since: Mapping[int, int]) -> list[int]:
    """The images whose file changed after the time (ns) given for each."""
    changed = originals.changed
    return [] if changed is None else [i for i, time in since.items() if changed[i] > time]


def is_as_made(originals: Originals, recipe: Recipe, index: int, row: npt.NDArray[np.void]) -> bool:
    """Whether preparing an image again gives the bytes that a row of the index states."""
    try:
        original = originals.reader.read(index)
        squares, _ = recipe.squares(original, where=original.name)
    except ValueError:
        return False
    made = {side: recipe.encoded(pixels)[0] for side, pixels in squares.items()}
    return all(
        (row[f"length_{side}"], row[f"crc_{side}"]) == (len(data), zlib.crc32(data))
        for side, data in made.items()
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
    parts = [f"{len(names):,} {word} ({first_few(names)})" for word, names in changes if names]
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
            raise UserError(f"{path}: cannot be read ({error}); prepare the data again") from error
    return found
