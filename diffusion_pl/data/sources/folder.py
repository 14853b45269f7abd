"""Originals in a folder or a zip file of image files; nothing here waits for torch."""

from __future__ import annotations

from dataclasses import dataclass

from diffusion_pl.data.files import Files
from diffusion_pl.data.layout import list_images
from diffusion_pl.data.sources.base import Original, Originals, SourceSpec, digest_of, label_fields
from diffusion_pl.data.sources.captions import Beside


@dataclass(frozen=True)
class _FileReader:
    files: Files
    names: list[str]

    def read(self, index: int) -> Original:
        name = self.names[index]
        return Original(name, self.files.read(name))


def open_folder(spec: SourceSpec, name: str) -> Originals:
    """A folder or a zip file of images, in the order of their relative paths.

    Args:
        spec: with the split, where there are several, and the column of labels.
        name: of the set.

    Raises:
        UserError: as `list_images`.
    """
    listing = list_images(
        spec.path,
        labels=spec.labels,
        split=spec.split,
        column=spec.label,
        captions=spec.captions,
        caption=spec.caption,
    )
    files, captions = listing.files, listing.captions
    beside = captions.reader.places if captions and isinstance(captions.reader, Beside) else None
    written = [[name] for name in listing.names]
    for place, more in enumerate(beside or ()):
        written[place] += [name for name, _ in more]
    return Originals(
        name=name,
        reader=_FileReader(files, listing.names),
        count=len(listing.names),
        listing=digest_of(listing.names),
        **label_fields(listing.labels),
        unread=listing.unread,
        notes=listing.notes,
        names=listing.names,
        states=[files.state(each) for each in listing.names],
        changed=[max(map(files.changed, each)) for each in written],
        captions=captions,
    )
