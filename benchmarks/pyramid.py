"""What a pyramid costs and what it gives, on a trained run: restarts, sizes, enlarged images.

    make bench BENCH=pyramid RUN=runs/pyramidal_whole_small [OTHER=runs/full_size_small]

OTHER's sizes stand beside RUN's, and samples at full size from noise with as many steps.

Everything is measured against held-out scenes of the run's synthetic data, by two distances,
neither of them FID: over the embedded extractor's features, which see grain and shape, and over
means of pixels, which see place and colour. They carry the bias of COUNT images, alike in all rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import record
from diffusion_pl import config
from diffusion_pl.commands import runs
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.consistency import consistent, nearest
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.resizing import resized
from diffusion_pl.evaluation import ImageGenerator, batches
from diffusion_pl.images import from_bytes, grid, save_png, to_bytes
from diffusion_pl.metrics import real_images, shapes
from diffusion_pl.metrics.fid import distance_to
from diffusion_pl.metrics.pixels import Pixels
from diffusion_pl.samplers.pyramid import PyramidSampler

COUNT = 200
BATCH = 50
HELD_OUT = 1  # seed of scenes that the run has not seen
SCENES = 5_000
STEPS = 18  # of the base, in the table of restarts
RESTARTS = (2.0, 1.0, 0.5, 0.25, [0.5, 0.25], [0.5, 0.1], [0.25, 0.1])
ENLARGE = 0.5  # where enlarged images restart
PICTURES = 100


class Bench:
    """A run, its sampler's parts, and the statistics of held-out scenes at every size.

    Args:
        run: the run's folder.
        folder: where statistics are kept.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self.model = runs.open_model(run)
        pyramid = config.build(self.model.config, "sampler")
        assert isinstance(pyramid, PyramidSampler)
        self.pyramid = pyramid
        self.sides = [int(level) for level in pyramid.levels]
        source: Synthetic = config.build(self.model.config, "data.dataset")
        self.extractors = {"shapes": shapes.load(), "pixels": Pixels()}
        held_out = replace(source, seed=HELD_OUT, count=SCENES)
        self.scenes = {side: held_out.open(side) for side in self.sides}
        self.references = {
            (side, name): real_images.cached(folder, scenes, extractor)
            for side, scenes in self.scenes.items()
            for name, extractor in self.extractors.items()
        }

    def distances(self, images: Tensor) -> dict[str, float]:
        """fd of uint8 images (n, 3, R, R) to the held-out scenes of their size."""
        found = {}
        for name, extractor in self.extractors.items():
            features = torch.cat([extractor(piece).pooled for piece in images.split(BATCH)])
            known = self.references[images.shape[3], name].pooled
            found[f"fd@{len(images)} {name}"] = round(distance_to(features, known), 3)
        return found

    def sample(self, sampler: PyramidSampler, side: int) -> tuple[Tensor, float]:
        """COUNT images, and the processor's seconds an image."""
        generator = ImageGenerator(self.model.denoiser, sampler, (3, side, side))
        began = time.process_time()
        images = [generator.images(indices)[0] for indices in batches(range(COUNT), BATCH)]
        return torch.cat(images), (time.process_time() - began) / COUNT

    def restarts(self, restarts: Sequence[Any] = (None, *RESTARTS)) -> list[dict[str, Any]]:
        """The pyramid by the level it restarts at; with None, full size from noise."""
        side = self.sides[-1]
        rows = []
        for restart in restarts:
            levels = self.sides if restart is not None else [side]
            base = replace(self.pyramid.base, steps=STEPS)
            sampler = PyramidSampler(base, levels, restart or (), by="sigma")
            images, seconds = self.sample(sampler, side)
            rows.append(
                {
                    "restart sigma": restart or "from noise at full size",
                    "steps at full size": len(sampler.stages()[-1]) - 1,
                    "work, full-size steps": round(sampler.cost(), 2),
                    "ms an image": round(1000 * seconds, 1),
                    **self.distances(images),
                }
            )
            print(rows[-1], flush=True)
        return rows

    def sizes(self, folder: Path | None = None) -> list[dict[str, Any]]:
        """The run's own pyramid, cut at each of its sizes."""
        rows = []
        for place, side in enumerate(self.sides):
            restart = self.pyramid.restart
            own = restart[:place] if isinstance(restart, Sequence) else restart
            sampler = replace(self.pyramid, levels=self.sides[: place + 1], restart=own)
            images, _ = self.sample(sampler, side)
            real = self.scenes[side].read(torch.arange(COUNT))
            rows.append(
                {
                    "side": side,
                    **self.distances(images),
                    "as many scenes": self.distances(real),
                }
            )
            print(rows[-1], flush=True)
            if folder is not None:
                save_png(grid(images[:24], columns=8), folder / f"pyramid_{side}.png")
        return rows

    def enlarged(self, folder: Path) -> list[dict[str, Any]]:
        """Held-out scenes enlarged from their smaller renderings, beside bicubic."""
        rows, shown = [], []
        side = self.sides[-1]
        truth = self.scenes[side].read(torch.arange(PICTURES))
        for place, small in enumerate(self.sides[:-1]):
            low = from_bytes(self.scenes[small].read(torch.arange(PICTURES)))
            found = {"bicubic": to_bytes(resized(low, (side, side), "bicubic"))}
            climb = replace(self.pyramid, levels=self.sides[place:], restart=ENLARGE, by="sigma")
            for agree in (False, True):
                found["consistent" if agree else "free"] = torch.cat(
                    [
                        self._climbed(climb, low, indices, agree)
                        for indices in batches(range(PICTURES), BATCH)
                    ]
                )
            for name, images in found.items():
                rows.append(
                    {
                        "from": small,
                        "to": side,
                        "by": name,
                        "PSNR, dB": round(psnr(images, truth), 2),
                        **self.distances(images),
                    }
                )
                print(rows[-1], flush=True)
            repeated = to_bytes(resized(low, (side, side)))
            best = found["consistent"]
            shown += [picture[:8] for picture in (repeated, found["bicubic"], best, truth)]
        save_png(grid(torch.cat(shown), columns=8), folder / "pyramid_enlarged.png")
        return rows

    def _climbed(
        self, climb: PyramidSampler, low: Tensor, indices: Sequence[int], agree: bool
    ) -> Tensor:
        """uint8 images enlarged from `low` at these indices."""
        picture, side = low[indices[0] : indices[-1] + 1], self.sides[-1]
        noise = ImageNoise(0, indices, "latent")(torch.empty(len(indices), 3, side, side))
        denoise = consistent(self.model.denoiser, picture) if agree else self.model.denoiser
        with torch.inference_mode():
            images = climb.from_image(picture, denoise, noise, ImageNoise(0, indices, "sampler"))
        return to_bytes(nearest(images, picture) if agree else images)


def psnr(images: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio over all pixels, in dB with the peak 255."""
    error = (images.double() - truth.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def main() -> None:
    """Measure and record; the images go to docs/."""
    run, *others = map(Path, sys.argv[1:])
    docs = Path(__file__).parents[1] / "docs"
    folder = run / "references"
    bench = Bench(run, folder)
    figures: dict[str, Any] = {
        "run": run.name,
        "images seen": bench.model.images,
        "sizes": bench.sizes(docs),
        "restarts": bench.restarts(),
        "enlarged": bench.enlarged(docs),
    }
    for other in others:
        bench = Bench(other, folder)
        figures[other.name] = {"sizes": bench.sizes(), "from noise": bench.restarts([None])}
    record("pyramid", figures)


if __name__ == "__main__":
    main()
