"""`export`: write a run's weights as a safetensors file, a diffusers folder or JiT's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from diffusion_pl.commands import hints, parts, runs
from diffusion_pl.commands.options import Allow, RunPath, Weights
from diffusion_pl.commands.results import Result, line
from diffusion_pl.config import build
from diffusion_pl.errors import UserError
from diffusion_pl.interop import diffusers_export, jit
from diffusion_pl.interop import weights as ours
from diffusion_pl.names import plain
from diffusion_pl.samplers.pyramid import PyramidSampler


def command(
    run: RunPath,
    dest: Path,
    /,
    *,
    format: Literal["safetensors", "diffusers", "jit"] = "safetensors",
    weights: Weights = "ema",
    allow: Allow = (),
) -> Result:
    """Write a run's weights as a safetensors file, a diffusers folder or JiT's checkpoint.

    Example: diffusion_pl export runs/mine mine.safetensors

    Args:
        dest: the file or folder to write.
        format: of the weights.
        weights: ema, denoiser (raw), or ema:0.1 for the average of that length.
    """
    if dest.exists():
        raise UserError(f"{dest}: exists already; name another path")
    model = runs.open_model(run, weights, allow)
    about = {"checkpoint": str(model.checkpoint), "images": model.images, "weights": weights}
    if format == "safetensors":
        known = {**about, "config": model.config.tree, "class_names": list(model.class_names)}
        ours.write(dest, model.denoiser.state_dict(), known)
    elif format == "jit":
        resolution = build(model.config, "data.dataset").resolution
        hidden = model.dropout.get("label", 0.0)
        jit.write(model.denoiser, model.objective, hidden, resolution, dest)
    else:
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
    of = f"{model.checkpoint}, {weights}, {model.images:,} images seen"
    return Result(
        {"written": str(dest), "format": format, **about},
        [line("written", dest), line("of", of)],
        # The command for whoever receives the file.
        [hints.next_line("import", format, dest, f"runs/{plain(dest.stem)}")],
    )
