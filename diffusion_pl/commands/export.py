"""`export`: a run's weights for others, as one safetensors file or as diffusers' folder."""

from __future__ import annotations

import argparse

from diffusion_pl.commands import following, parts, results, runs
from diffusion_pl.config import build
from diffusion_pl.errors import UserError
from diffusion_pl.interop import diffusers_export, weights
from diffusion_pl.names import plain
from diffusion_pl.samplers.pyramid import PyramidSampler

FAILURES: tuple[type[Exception], ...] = ()


def run(options: argparse.Namespace) -> int:
    """Write the averaged weights, or the raw ones, and print what was written."""
    if options.dest.exists():
        raise UserError(f"{options.dest}: is there already; name another place")
    model = runs.open_model(options.run, options.weights, options.allow)
    about = {
        "checkpoint": str(model.checkpoint),
        "images": model.images,
        "weights": options.weights,
    }
    if options.format == "safetensors":
        known = {**about, "config": model.config.tree, "class_names": list(model.class_names)}
        weights.write(options.dest, model.denoiser.state_dict(), known)
    else:
        sampler = parts.sampler_of(model.config, model.objective)
        node = model.config.tree["sampler"]
        if isinstance(sampler, PyramidSampler):  # diffusers knows no pyramid: its base goes along
            sampler, node = sampler.base, node["base"]
        node = node.get("integrate", {})
        variance = node.get("variance") if isinstance(node, dict) else None
        clip = getattr(sampler.integrate, "keywords", {}).get("clip")
        diffusers_export.write(
            model.denoiser,
            build(model.config, "data").resolution,
            options.dest,
            # A step's own clipping is DDIM's; the library has one place for either.
            clip=sampler.clip or clip or False,
            variance=variance or "small",
        )
    result = {"written": str(options.dest), "format": options.format, **about}
    of = f"{model.checkpoint}, {options.weights}, {model.images:,} images seen"
    results.tell(options, result, [("written", str(options.dest)), ("of", of)])
    # Whoever gets it makes a run of it.
    following.tell("import", options.format, options.dest, f"runs/{plain(options.dest.stem)}")
    return 0
