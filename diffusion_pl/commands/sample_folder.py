"""A folder of sampled images: sample.json has their settings, and images/ holds them alone.

Image i depends on (seed, i) and the settings, not on the other images. So later commands with the
same settings add images, or continue an interrupted one. Other settings need another folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_pl.commands.runs import OpenedRun
from diffusion_pl.data.files import IMAGES, SAMPLE, read_sample
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.provenance import surroundings
from diffusion_pl.images import save_png
from diffusion_pl.io.files import regular, write_atomically
from diffusion_pl.training import checkpoint as checkpoints

FORMAT = 1


class OtherImages(UserError):
    """The folder holds other images than those to be sampled."""


class SampleFolder:
    """One folder of sampled images.

    Args:
        folder: made if absent.
        opened: the run that they are sampled from.
    """

    def __init__(self, folder: Path, opened: OpenedRun) -> None:
        self.folder = folder
        self.images = folder / IMAGES
        self.opened = opened
        self.evaluations = 0  # of an image

    def begin(self, wanted: range) -> range:
        """Prepare the folder for the wanted images; returns the range that it will then hold.

        Raises:
            OtherImages: it holds images of other or unknown settings, or there would be a gap
                between them and the wanted ones.
        """
        whole, settings = wanted, settings_of(self.opened)
        try:
            before = read_sample(self.folder)
        except ValueError as error:
            raise OtherImages(str(error)) from error
        if before is None:
            self._refuse_strangers()
        else:
            self._refuse_others(before, settings)
            there = range(before["first"], before["first"] + before["count"])
            if wanted.start > there.stop or wanted.stop < there.start:
                raise OtherImages(
                    f"{self.folder}: holds images {there.start} to {there.stop - 1}; go on with "
                    f"--first {there.stop}, or sample into another folder: --out"
                )
            whole = range(min(there.start, wanted.start), max(there.stop, wanted.stop))
            self.evaluations = before.get("evaluations") or 0
        self.images.mkdir(parents=True, exist_ok=True)
        self._write(whole, settings, complete=False)
        return whole

    def missing(self, whole: range) -> list[int]:
        """Indices of images that are not there yet."""
        return [index for index in whole if not self.path_of(index).exists()]

    def path_of(self, index: int) -> Path:
        """The file of an image."""
        return self.images / f"{index:06d}.png"

    def add(self, indices: Sequence[int], images: Tensor) -> None:
        """Write images, each whole or not at all."""
        for index, image in zip(indices, images, strict=True):
            save_png(image, self.path_of(index))

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 (n, C, H, W), from the files."""
        return torch.stack(list(self._pixels(indices)))

    def finish(self, whole: range) -> None:
        """Write the images as one array, and mark the folder complete."""
        labels = self.opened.generator.labels(whole)
        arrays: dict[str, Any] = {
            "images": self.read(whole).permute(0, 2, 3, 1).numpy(),
            "labels": np.full(len(whole), -1) if labels is None else labels.numpy(),
        }
        if (captions := self.opened.generator.captions(whole)) is not None:
            arrays["captions"] = np.array(captions)
        write_atomically(self.folder / "images.npz", lambda file: np.savez(file, **arrays))
        self._write(whole, settings_of(self.opened), complete=True)

    def _pixels(self, indices: Sequence[int]) -> Iterator[Tensor]:
        for index in indices:
            with Image.open(regular(self.path_of(index))) as file:
                pixels = np.array(file)
            yield torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)

    def _write(self, whole: range, settings: Mapping[str, Any], *, complete: bool) -> None:
        labels = self.opened.generator.labels(whole)
        captions = self.opened.generator.captions(whole)
        said = {
            "format": FORMAT,
            "complete": complete,
            "first": whole.start,
            "count": len(whole),
            "labels": None if labels is None else labels.tolist(),
            **({} if captions is None else {"captions": captions}),
            "run": str(self.opened.folder),
            "checkpoint": str(self.opened.model.checkpoint),
            "settings": dict(settings),
            "evaluations": self.evaluations,
            **surroundings(self.opened.generator.device),
        }
        text = json.dumps(said, indent=2) + "\n"
        write_atomically(self.folder / SAMPLE, lambda file: file.write(text.encode()))

    def _refuse_strangers(self) -> None:
        held = [*self.folder.glob("*.png"), *self.folder.glob("*.npz"), *self.images.glob("*")]
        if held:
            raise OtherImages(
                f"{self.folder}: holds {held[0].name}, and no {SAMPLE} with its settings; sample "
                "into another folder: --out"
            )

    def _refuse_others(self, before: Mapping[str, Any], settings: dict[str, Any]) -> None:
        known = before.get("settings")
        old: dict[str, Any] = known if isinstance(known, dict) else {}
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
