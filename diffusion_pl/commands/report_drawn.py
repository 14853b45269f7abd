"""What a report samples from a run: its classes, a film, the nearest training images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffusion_pl import config
from diffusion_pl.commands import film, losses, runs
from diffusion_pl.commands.options import RunOptions, SamplerOptions
from diffusion_pl.commands.sample import BATCH, sampling_bar
from diffusion_pl.evaluation import ImageGenerator, batches
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.evaluation.sources import Labels
from diffusion_pl.metrics.memorised import Nearest, nearest

FILMED = 8  # images of the film
FRAMES = 16
SEARCHED = 50_000  # training images at most
SHOWN = 12  # samples with their nearest images
CLASSES = 40  # shown at most
LEVEL_IMAGES, LEVELS = 64, 16

Made = TypeVar("Made")


@dataclass(frozen=True)
class Copies:
    """Samples and their nearest training images.

    Args:
        samples: nearest images of the samples.
        others: nearest images of training images among the others.
        searched, total: number of training images searched, and of all.
        mirrored: mirror images count.
        strips: of the lowest ratios: ratio and uint8 (3, C, R, R), sample, first, second.
    """

    samples: Nearest
    others: Nearest
    searched: int
    total: int
    mirrored: bool
    strips: list[tuple[float, Tensor]]


@dataclass
class Drawn:
    """What was sampled from a run.

    Args:
        about: how, in a line.
        groups: class or prompt to uint8 (n, C, R, R).
        film: noise level to uint8 (n, C, R, R), the denoised images.
        copies: of training images.
        levels: as the command `losses` gives them.
        left: why a part could not be made.
    """

    about: str = ""
    groups: list[tuple[str, Tensor]] = field(default_factory=list)
    film: list[tuple[str, Tensor]] = field(default_factory=list)
    copies: Copies | None = None
    levels: Mapping[str, Any] | None = None
    left: dict[str, str] = field(default_factory=dict)


PARTS = ("samples", "film", "nearest", "levels")


def drawn(
    run: Path,
    count: int,
    sampling: SamplerOptions,
    options: RunOptions,
    *,
    levels: bool,
) -> Drawn:
    """Sample from a run what its report shows; what cannot be made is said in `left`.

    Args:
        run: its folder.
        count: images to sample.
        sampling, options: of the run.
        levels: measure the error at each noise level.
    """
    found = Drawn()

    def attempt(part: str, make: Callable[[], Made]) -> Made | None:
        try:
            return make()
        except (ValueError, OSError) as error:  # of the user's data, files or settings
            found.left[part] = " ".join(str(error).split())
            return None

    opened = attempt("samples", lambda: runs.open_run(run, sampling, options))
    if opened is None:
        found.left |= dict.fromkeys(PARTS, found.left["samples"])
        return found
    generator = _in_turn(opened.generator)
    found.about = _about(opened, generator)
    found.groups = attempt("samples", lambda: _groups(opened, generator, count)) or []
    found.film = attempt("film", lambda: _film(generator)) or []
    if found.groups:
        images = torch.cat([each for _, each in found.groups])
        found.copies = attempt("nearest", lambda: _copies(images, opened.model.config))
    else:
        found.left["nearest"] = found.left["samples"]
    if levels:
        found.levels = attempt("levels", lambda: _levels(run, options))
    return found


def _in_turn(generator: ImageGenerator) -> ImageGenerator:
    """The generator with the classes in turn, so that each is seen; of text as it is."""
    taken = generator.taken
    if taken["label"] and not taken["text"]:
        return dataclasses.replace(generator, sources=(Labels(taken["label"], balanced=True),))
    return generator


def _about(opened: runs.OpenedRun, generator: ImageGenerator) -> str:
    said = generator.about()
    weights = {"ema": "averaged", "denoiser": "raw"}.get(said["weights"], said["weights"])
    return (
        f"{described(generator.sampler)}, guidance {said['guidance']}, seed {generator.seed}, "
        f"{weights} weights after {opened.model.images:,} images"
    )


def _groups(
    opened: runs.OpenedRun, generator: ImageGenerator, count: int
) -> list[tuple[str, Tensor]]:
    """The samples by class, or by prompt, or all."""
    classes = generator.taken["label"]
    if not classes or generator.taken["text"]:
        images = _images(generator, list(range(count)))
        words = generator.captions(range(count))
        if words is None:
            return [("", images)]
        return [(word, image[None]) for word, image in zip(words, images, strict=True)]
    wanted = [label * classes // min(classes, count, CLASSES)
              for label in range(min(classes, count, CLASSES))]  # fmt: skip
    each = max(1, count // len(wanted))
    images = _images(generator, [label + n * classes for label in wanted for n in range(each)])
    names = opened.model.class_names
    title = [names[label] if label < len(names) else f"class {label}" for label in wanted]
    return list(zip(title, images.split(each), strict=True))


def _images(generator: ImageGenerator, indices: list[int]) -> Tensor:
    with sampling_bar(generator, len(indices)):
        return torch.cat([generator.images(piece)[0].cpu() for piece in batches(indices, BATCH)])


def _film(generator: ImageGenerator) -> list[tuple[str, Tensor]]:
    """The denoised images from level to level, and the images themselves."""
    images, words = film.denoised(generator, range(FILMED), FRAMES)
    return list(zip(words, images.unbind(dim=1), strict=True))


def _copies(samples: Tensor, experiment: config.Config) -> Copies:
    """The nearest training images of samples, and of as many training images."""
    images = runs.images_of(experiment)
    total = len(images)
    searched = min(total, SEARCHED)
    among = torch.arange(searched) * total // searched
    mirrored = bool(config.build(experiment, "data.hflip"))
    of_samples = nearest(samples, images, among, mirrored=mirrored)
    own = among[torch.arange(min(len(samples), searched)) * searched // len(samples)]
    others = nearest(images.read(own), images, among, mirrored=mirrored, own=own)
    strips = []
    for place in of_samples.ratios.argsort()[:SHOWN].tolist():
        pair = images.read(of_samples.indices[place])
        strip = torch.cat([samples[place : place + 1], pair])
        strips.append((float(of_samples.ratios[place]), strip))
    return Copies(of_samples, others, searched, total, mirrored, strips)


def _levels(run: Path, options: RunOptions) -> dict[str, Any]:
    curves, about, _ = losses.measured(run, None, LEVEL_IMAGES, LEVELS, options)
    return {**about, "levels": losses.rows_of(curves)}
