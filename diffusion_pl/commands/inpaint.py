"""`inpaint`: sample the masked part of an image, and leave the rest as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion_pl.commands import latents, runs
from diffusion_pl.commands.options import (
    BaseAlone,
    ConditionOptions,
    Integer,
    RunOptions,
    RunPath,
    SamplerOptions,
)
from diffusion_pl.commands.results import Result
from diffusion_pl.data.decode import decode
from diffusion_pl.diffusion.inverse import posterior, replaced
from diffusion_pl.diffusion.measurements import Mask
from diffusion_pl.diffusion.recording import Counted
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator, batches
from diffusion_pl.evaluation.generator import check_finite
from diffusion_pl.images import grid, save_png, to_bytes
from diffusion_pl.io.files import read_named
from diffusion_pl.progress import track
from diffusion_pl.samplers.resampling import Resampled
from diffusion_pl.samplers.sampler import Sampler

BATCH = 16
WHITE = 128  # a mask's lightness from which on a pixel is filled


def command(
    run: RunPath,
    image: Path,
    mask: Path,
    /,
    *,
    method: Literal["replacement", "gradient"] = "gradient",
    resample: Integer = 1,
    count: Integer = 4,
    base_alone: BaseAlone = False,
    out: Path | None = None,
    conditions: ConditionOptions = ConditionOptions(),
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Inpainting: fill the white part of a mask; all other pixels stay exactly as they are.

    Writes the images, and a grid of the image, the mask and the images.

    Example: diffusion_pl inpaint runs/mine a.png mask.png --label 3 --count 8

    Args:
        image: PNG, JPEG or WebP of the run's size.
        mask: an image of the same size; what is white (lighter than mid-grey) is filled.
        method: gradient guides the filled part through the network (about four times slower);
            replacement only sets the known part.
        resample: times that each step is taken, with noise added in between (RePaint).
        count: images.
        out: folder of the results; RUN/inpaint when not given.
    """
    check_counts(count, resample)
    opened = runs.open_run(run, sampling, options, conditions, complete=True)
    generator = opened.generator
    sampler = sampler_of(generator, base_alone, resample)
    given = latents.read_images([image], generator)
    filled = read_mask(mask, image, (given.shape[2], given.shape[3]))
    pieces = list(batches(range(count), options.batch_size or BATCH))
    found = [
        inpainted(generator, sampler, given, filled, piece, method)
        for piece in track(pieces, "inpainting")
    ]
    results = pasted(torch.cat([images for images, _ in found]), given, filled)
    original = to_bytes(given).cpu()
    folder = out or opened.folder / "inpaint"
    names = [f"{index:06d}.png" for index in range(count)]
    for name, each in zip(names, results, strict=True):
        save_png(each, folder / name)
    shown = (255 * filled).to(torch.uint8).expand_as(original).clone()
    shown[:, 3:] = 255  # opaque
    save_png(grid(torch.cat([original, shown, results]), columns=count + 2), folder / "grid.png")
    result = {
        **opened.about(folder),
        "image": str(image),
        "mask": str(mask),
        "filled": round(float(filled.float().mean()), 6),
        "method": method,
        "resample": resample,
        "count": count,
        "evaluations": found[0][1],
        "files": names,
    }
    return Result(result)


def check_counts(count: int, resample: int) -> None:
    """Raise UserError unless both are positive."""
    if count < 1 or resample < 1:
        raise UserError(f"--count and --resample must be at least 1 (got {count}, {resample})")


def sampler_of(generator: ImageGenerator, base_alone: bool, resample: int) -> Sampler:
    """The run's sampler, of one size.

    Args:
        generator: of the model.
        base_alone: of a pyramid, its base.
        resample: times that each step is taken.

    Raises:
        UserError: a pyramid without `base_alone`, or the other way round.
    """
    sampler = latents.single_size_sampler(generator, "inpaint", base_alone)
    if resample == 1:
        return sampler
    return dataclasses.replace(sampler, integrate=Resampled(sampler.integrate, resample))


def read_mask(path: Path, image: Path, size: tuple[int, int]) -> Tensor:
    """The pixels that a mask fills, bool (H, W).

    Args:
        path: the mask's file.
        image: the file of the image, for messages.
        size: H and W of the image.

    Raises:
        UserError: it cannot be read, has another size, or fills nothing or everything.
    """
    lightness = np.array(decode(read_named(path), where=str(path)).convert("L"))
    if lightness.shape != size:
        height, width = lightness.shape
        raise UserError(
            f"{path}: {width} x {height} pixels, and {image} has {size[1]} x {size[0]}; a mask has "
            "the size of its image"
        )
    filled = torch.from_numpy(lightness >= WHITE)
    check_mask(filled, str(path), str(image))
    return filled


def check_mask(filled: Tensor, mask: str, image: str) -> None:
    """Refuse a mask that fills nothing or everything.

    Args:
        filled: bool (H, W).
        mask, image: their names, for messages.

    Raises:
        UserError: says which.
    """
    if not filled.any():
        raise UserError(f"{mask}: fills nothing; paint white what is to be filled")
    if filled.all():
        raise UserError(f"{mask}: is white everywhere, so nothing of {image} is kept; use sample")


def inpainted(
    generator: ImageGenerator,
    sampler: Sampler,
    image: Tensor,
    filled: Tensor,
    indices: Sequence[int],
    method: Literal["replacement", "gradient"],
) -> tuple[Tensor, int]:
    """Sample the filled part; each result depends on the image, the seed and its index alone.

    Args:
        generator: of the model.
        sampler: of one size.
        image: (1, C, H, W) in [-1, 1].
        filled: bool (H, W).
        indices: of the results.
        method: replacement alone, or with the gradient too.

    Returns:
        float32 (n, C, H, W), and evaluations of the network for each.
    """
    known = ~filled.to(generator.device)
    counted = Counted(generator.denoiser)
    condition = generator.condition(indices)
    denoise = generator.guided(condition, indices=indices, denoise=counted)
    if method == "gradient":
        mask = Mask(known)
        denoise = posterior(denoise, mask, mask.forward(image))
    denoise = replaced(denoise, image, known)
    with generator.inference():
        found = sampler(denoise, generator.noise(indices), generator.step_noise(indices))
    return found, counted.seen // len(indices)


def pasted(found: Tensor, image: Tensor, filled: Tensor) -> Tensor:
    """The filled parts in the image, which is kept to the bit wherever a sampler ends.

    Args:
        found: of `inpainted`.
        image: (1, C, H, W) in [-1, 1].
        filled: bool (H, W), on the CPU.

    Returns:
        uint8 (n, C, H, W) on the CPU.

    Raises:
        UserError: an image is not finite.
    """
    check_finite(found)
    return torch.where(filled, to_bytes(found).cpu(), to_bytes(image).cpu())
