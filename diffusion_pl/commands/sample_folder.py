"""A folder of sampled images: sample.json has their settings, and images/ holds them alone.

PNG files and one .npz of all; or the .npz alone; or WebDataset tars in images/.

Image i depends on (seed, i) and the settings, not on the other images. So later commands with the
same settings add images, or continue an interrupted one. Other settings need another folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.commands.runs import OpenedRun
from diffusion_pl.commands.sample_packing import (
    ARRAYS,
    Format,
    Packed,
    pixels_of,
    write_arrays,
    write_shards,
)
from diffusion_pl.data.files import IMAGES, SAMPLE, read_sample
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.provenance import surroundings
from diffusion_pl.images import save_png
from diffusion_pl.io.files import regular, write_atomically
from diffusion_pl.training import checkpoint as checkpoints

FORMAT = 1
WRITERS = 8  # files written at a time
BEGINS = 300.0  # seconds that other ranks wait for rank 0


class OtherImages(UserError):
    """The folder holds other images than those to be sampled."""


class SampleFolder:
    """One folder of sampled images.

    Images are PNG files while they are sampled, and stay so, or are packed when all are there.

    Args:
        folder: made if absent.
        opened: the run that they are sampled from.
        kind: png, npz or tar.
    """

    def __init__(self, folder: Path, opened: OpenedRun, kind: Format = "png") -> None:
        self.folder = folder
        self.images = folder / IMAGES
        self.opened = opened
        self.kind: Format = kind
        self.packed = Packed(folder, self.images, range(0), kind)
        self.evaluations = 0  # of an image

    def begin(self, wanted: range, *, leads: bool = True) -> range:
        """Prepare the folder for the wanted images; returns the range that it will then hold.

        Args:
            wanted: indices of images.
            leads: whether this process is rank 0, which writes sample.json; others wait for it.

        Raises:
            OtherImages: it holds images of other or unknown settings, or there would be a gap
                between them and the wanted ones.
        """
        whole, settings = wanted, settings_of(self.opened)
        before = self._before()
        if before is None and not leads:
            before = self._await()
        if before is not None:
            self._refuse_others(before, settings)
            there = range(before["first"], before["first"] + before["count"])
            if wanted.start > there.stop or wanted.stop < there.start:
                raise OtherImages(
                    f"{self.folder}: holds images {there.start} to {there.stop - 1}; go on with "
                    f"--first {there.stop}, or sample into another folder: --out"
                )
            whole = range(min(there.start, wanted.start), max(there.stop, wanted.stop))
            self.evaluations = before.get("evaluations") or 0
            if (held := before.get("packed")) is not None:
                self.packed.held = range(*held)
        if leads:
            self.images.mkdir(parents=True, exist_ok=True)
            self._write(whole, settings, complete=False)
        return whole

    def missing(self, whole: range) -> list[int]:
        """Indices of images that are not there yet, ascending."""
        there = {name for name in os.listdir(self.images) if name.endswith(".png")}
        held = self.packed.held
        return [i for i in whole if i not in held and self.path_of(i).name not in there]

    def path_of(self, index: int) -> Path:
        """The file of an image, before it is packed."""
        return self.images / f"{index:06d}.png"

    def add(self, indices: Sequence[int], images: Tensor) -> None:
        """Write images, each whole or not at all."""
        # Each waits for the disk; together they wait a sixth of the time.
        with ThreadPoolExecutor(WRITERS) as pool:
            paths = map(self.path_of, indices)
            for _ in pool.map(save_png, images, paths):  # raises what one of them raised
                pass

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 (n, C, H, W), from the files."""
        pixels = [torch.from_numpy(pixels_of(self._png(index))) for index in indices]
        return torch.stack(pixels).permute(0, 3, 1, 2)

    def finish(self, whole: range) -> None:
        """Pack the images, and mark the folder complete."""
        if self.kind == "tar":
            write_shards(self.images, whole, self.packed.held, self._png, self._members)
        else:
            self._write_arrays(whole)
        if self.kind != "png":
            self.packed = Packed(self.folder, self.images, whole, self.kind)
        self._write(whole, settings_of(self.opened), complete=True)
        if self.kind != "png":
            for path in self.images.glob("*.png"):
                path.unlink()

    def _png(self, index: int) -> bytes:
        """The PNG of an image."""
        path = self.path_of(index)
        if index in self.packed.held and not path.exists():
            return self.packed.read(index)
        return regular(path).read_bytes()

    def _members(self, indices: Sequence[int]) -> list[dict[str, bytes]]:
        """What stands beside images in a tar: class and prompt."""
        generator = self.opened.generator
        labels, captions = generator.labels(indices), generator.captions(indices)
        members: list[dict[str, bytes]] = [{} for _ in indices]
        for place, each in enumerate(members):
            if labels is not None:
                each["cls"] = str(int(labels[place])).encode()
            if captions is not None:
                each["txt"] = captions[place].encode()
        return members

    def _write_arrays(self, whole: range) -> None:
        """Write the images as one array."""
        labels = self.opened.generator.labels(whole)
        more: dict[str, Any] = {
            "labels": np.full(len(whole), -1) if labels is None else labels.numpy()
        }
        if (captions := self.opened.generator.captions(whole)) is not None:
            more["captions"] = np.array(captions)
        channels, height, width = self.opened.generator.shape
        pixels = (pixels_of(self._png(index)) for index in whole)
        write_arrays(self.folder / ARRAYS, pixels, (len(whole), height, width, channels), more)

    def _write(self, whole: range, settings: Mapping[str, Any], *, complete: bool) -> None:
        labels = self.opened.generator.labels(whole)
        captions = self.opened.generator.captions(whole)
        held = self.packed.held
        said = {
            "format": FORMAT,
            "files": self.kind,
            **({"packed": [held.start, held.stop]} if held else {}),
            "complete": complete,
            "first": whole.start,
            "count": len(whole),
            "labels": None if labels is None else labels.tolist(),
            **({} if captions is None else {"captions": captions}),
            "class_names": list(self.opened.model.class_names),
            "run": str(self.opened.folder),
            "checkpoint": str(self.opened.model.checkpoint),
            "settings": dict(settings),
            "evaluations": self.evaluations,
            **surroundings(self.opened.generator.device),
        }
        text = json.dumps(said, indent=2) + "\n"
        write_atomically(self.folder / SAMPLE, lambda file: file.write(text.encode()))

    def _before(self) -> dict[str, Any] | None:
        """What sample.json says; None for a new folder."""
        before = self._said()
        if before is None and (held := self._strangers()):
            before = self._said()  # rank 0 may have begun between the two looks
            if before is None:
                raise OtherImages(
                    f"{self.folder}: holds {held[0].name}, and no {SAMPLE} with its settings; "
                    "sample into another folder: --out"
                )
        return before

    def _said(self) -> dict[str, Any] | None:
        """What sample.json says; None where there is none."""
        try:
            return read_sample(self.folder)
        except ValueError as error:
            raise OtherImages(str(error)) from error

    def _await(self) -> dict[str, Any]:
        """What rank 0 writes into sample.json."""
        until = time.monotonic() + BEGINS
        while time.monotonic() < until:
            if (before := self._before()) is not None:
                return before
            time.sleep(0.1)
        raise UserError(
            f"{self.folder}: rank 0 has not begun it in {BEGINS:.0f} s; see that it runs"
        )

    def _strangers(self) -> list[Path]:
        return [*self.folder.glob("*.png"), *self.folder.glob("*.npz"), *self.images.glob("*")]

    def _refuse_others(self, before: Mapping[str, Any], settings: dict[str, Any]) -> None:
        known = before.get("settings")
        old: dict[str, Any] = known if isinstance(known, dict) else {}
        files = before.get("files", "png")
        if files != self.kind:
            raise OtherImages(
                f"{self.folder}: holds its images as {files}; go on with --format {files}, or "
                "sample into another folder: --out"
            )
        differences = [
            f"{key} {old.get(key)} -> {settings.get(key)}"
            for key in old | settings
            if old.get(key) != settings.get(key)
        ]
        if differences:
            raise OtherImages(
                f"{self.folder}: holds {before['count']:,} images of other settings "
                f"({'; '.join(differences)}); sample into another folder: --out"
            )


def settings_of(opened: OpenedRun) -> dict[str, Any]:
    """What an image depends on beside its index, independent of where the run lies."""
    generator = opened.generator
    about = {key: value for key, value in generator.about().items() if key != "checkpoint"}
    guide, own = about.pop("guide"), generator.guide
    return {
        **about,
        "steps": generator.sampler.steps,  # type: ignore[attr-defined]
        "shape": list(generator.shape),
        "digest": checkpoints.digest(opened.model.checkpoint),
        "guide": guide if own is None or own.routed else checkpoints.digest(Path(guide)),
    }
