"""How well the forms of inpainting fill half an image, on a trained run of synthetic scenes.

    make bench BENCH=inpainting RUN=runs/quickstart

The right half of held-out scenes is filled, every form from the same noise. The scene says what was
there, but not all of it follows from the left half: so no form reaches an error of 0.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import record
from diffusion_pl import config
from diffusion_pl.commands import runs
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.inverse import Covariance, Isotropic, Jacobian, posterior, replaced
from diffusion_pl.diffusion.measurements import Mask
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.images import from_bytes, grid, save_png, to_bytes
from diffusion_pl.samplers.deis import deis
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.resampling import Resampled
from diffusion_pl.samplers.sampler import Integrator, Sampler

HELD_OUT = 1  # seed of scenes that the run has not seen
COUNT = 48
SHOWN = 12
STEPS = 12
FORMS: dict[str, Covariance | None] = {
    "replaced": None,
    "Isotropic(0.5)": Isotropic(0.5),
    "Isotropic(1)": Isotropic(1.0),
    "Jacobian(1)": Jacobian(1),
    "Jacobian(3)": Jacobian(3),
}
INTEGRATORS: tuple[Integrator, ...] = (heun, deis)


def main() -> None:
    """Measure and record; the grid goes to docs/."""
    model = runs.open_model(Path(sys.argv[1]))
    source: Synthetic = config.build(model.config, "data.dataset")
    scenes = replace(source, seed=HELD_OUT, count=COUNT).open()
    assert scenes.labels is not None
    image = from_bytes(scenes.read(torch.arange(COUNT)))
    plain = partial(model.denoiser, label=scenes.labels)
    known = torch.ones(image.shape[2:], dtype=torch.bool)
    edge = image.shape[3] // 2
    known[:, edge:] = False
    indices = range(COUNT)
    noise = ImageNoise(0, indices, "latent")(image)

    def denoiser(covariance: Covariance | None) -> Denoise:
        measured = Mask(known).forward(image)
        informed: Denoise = plain
        if covariance is not None:
            informed = posterior(plain, Mask(known), measured, covariance=covariance)
        return replaced(informed, image, known)

    cases = [(form, integrate, 1) for integrate in INTEGRATORS for form in FORMS]
    cases += [(form, deis, 3) for form in ("replaced", "Jacobian(1)")]
    rows: list[dict[str, Any]] = [{"form": "the scenes", "edge": _edge(image, edge)}]
    sheets = [image[:SHOWN], torch.where(known, image, 1.0)[:SHOWN]]
    for form, integrate, times in cases:
        steps = Resampled(integrate, times) if times > 1 else integrate
        sampler = Sampler(steps, Rho(), STEPS)
        began = time.process_time()
        found = sampler(denoiser(FORMS[form]), noise, ImageNoise(0, indices, "sampler"))
        seconds = time.process_time() - began
        error = (found - image)[..., edge:]
        rows.append(
            {
                "form": form,
                "sampler": integrate.__name__,  # type: ignore[attr-defined]
                "times": times,
                "rms error": round(float(error.square().mean().sqrt()), 3),
                "median error": round(float(error.abs().median()), 3),
                "edge": _edge(found, edge),
                "out of range": round(float((found.abs() > 1.1).float().mean()), 3),
                "ms an image": round(1000 * seconds / COUNT, 1),
            }
        )
        print(rows[-1], flush=True)
        if integrate is deis:
            sheets.append(found[:SHOWN])
    sheet = grid(to_bytes(torch.cat(sheets)), columns=SHOWN, zoom=2)
    save_png(sheet, Path(__file__).parents[1] / "docs" / "inpainting.png")
    record("inpainting", {"run": Path(sys.argv[1]).name, "images seen": model.images, "rows": rows})


def _edge(image: torch.Tensor, column: int) -> float:
    """Root mean square of the step across the edge of the filled part."""
    return round(float((image[..., column] - image[..., column - 1]).square().mean().sqrt()), 3)


if __name__ == "__main__":
    main()
