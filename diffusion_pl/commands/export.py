"""`export`: write a run's weights in a format of others, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from diffusion_pl.commands import card, hints, parts, runs
from diffusion_pl.commands.options import Allow, RunPath, Weights
from diffusion_pl.commands.results import Result, line
from diffusion_pl.config import build
from diffusion_pl.diffusion.objective import trained_range
from diffusion_pl.errors import UserError
from diffusion_pl.interop import diffusers_export, jit, program
from diffusion_pl.interop import weights as ours
from diffusion_pl.names import plain
from diffusion_pl.samplers.pyramid import PyramidSampler


def command(
    run: RunPath,
    dest: Path,
    /,
    *,
    format: Literal["safetensors", "diffusers", "jit", "torch"] = "safetensors",
    weights: Weights = "ema",
    allow: Allow = (),
) -> Result:
    """Write a run's weights for others, and a model card: DEST.md, in a folder README.md.

    Example: diffusion_pl export runs/mine mine.safetensors

    Args:
        dest: the file or folder to write.
        format: safetensors; a diffusers folder; JiT's checkpoint; torch, a torch.export program
            (.pt2) of the denoiser, compared with it before it is written.
        weights: ema, denoiser (raw), or ema:0.1 for the average of that length.
    """
    beside = card.path_of(dest, format)
    for path in (dest, beside):
        if path.exists():
            raise UserError(f"{path}: exists already; name another path")
    model = runs.open_model(run, weights, allow)
    about = {"checkpoint": str(model.checkpoint), "images": model.images, "weights": weights}
    said = {"written": str(dest), "card": str(beside), "format": format, **about}
    if format == "safetensors":
        ours.write(dest, model.denoiser.state_dict(), known(model, weights))
    elif format == "jit":
        resolution = build(model.config, "data.dataset").resolution
        hidden = model.dropout.get("label", 0.0)
        jit.write(model.denoiser, model.objective, hidden, resolution, dest)
    elif format == "torch":
        data = build(model.config, "data.dataset")
        shape = (data.channels, data.resolution, data.resolution)
        levels = trained_range(model.objective)
        said["difference"] = program.write(
            dest, model.denoiser, shape, levels, known(model, weights)
        )
    else:
        write_diffusers(model, dest)
    card.write(beside, model, weights, dest, format)
    of = f"{model.checkpoint}, {weights}, {model.images:,} images seen"
    lines = [line("written", dest), line("card", beside), line("of", of)]
    # The command for whoever receives the file.
    after = hints.next_line("import", format, dest, f"runs/{plain(dest.stem)}")
    if format == "torch":
        lines.append(line("differs", f"{said['difference']:.2g} of 1 + sigma from the denoiser"))
        after = f"next     torch.export.load({str(dest)!r}), as the card says"
    return Result(said, lines, [after])


def known(model: runs.Model, weights: str) -> dict[str, Any]:
    """What is written into a file beside its weights."""
    return {
        "checkpoint": str(model.checkpoint),
        "images": model.images,
        "weights": weights,
        "config": model.config.tree,
        "class_names": list(model.class_names),
    }


def write_diffusers(model: runs.Model, dest: Path) -> None:
    """Write a diffusers folder.

    Raises:
        UserError: the network is none that diffusers has.
    """
    sampler = parts.sampler_of(model.config, model.objective)
    node = model.config.tree["sampler"]
    if isinstance(sampler, PyramidSampler):  # diffusers knows no pyramid: its base goes along
        sampler, node = sampler.base, node["base"]
    node = node.get("integrate", {})
    variance = node.get("variance") if isinstance(node, dict) else None
    clip = getattr(sampler.integrate, "keywords", {}).get("clip_denoised")
    diffusers_export.write(
        model.denoiser,
        build(model.config, "data.dataset").resolution,
        dest,
        # diffusers has one setting for the sampler's clipping and DDIM's own.
        clip=sampler.clip_denoised or clip or False,
        variance=variance or "small",
    )
