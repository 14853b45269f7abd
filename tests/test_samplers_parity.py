"""The generalised sampler against reference outputs of EDM's ablation, network and all."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from published import Fixture, edm_denoiser

from diffusion_pl.diffusion.paths import Along, Linear, VarianceExploding, preserving_between
from diffusion_pl.diffusion.schedules import LogUniform, Rho, levels
from diffusion_pl.diffusion.spacings import IDDPMSteps
from diffusion_pl.diffusion.timesteps import CosineBetas
from diffusion_pl.objectives.edm_iddpm import NoiseOnTable, Rounded
from diffusion_pl.samplers.generalised import generalised

STEPS = 9
# Lowest and highest level of each discretisation, where the network knows them.
RANGES = {
    "vp": (0.010485993, 152.16697),
    "ve": (0.02, 100),
    "iddpm": (0.002, 81),
    "edm": (0.002, 80),
}
ABLATIONS = [
    f"{solver}_{rest}"
    for solver in ("euler", "heun")
    for rest in (
        "vp_vp_vp", "ve_ve_none", "iddpm_linear_none", "edm_linear_none", "vp_linear_none",
    )
]  # fmt: skip


def visited(discretisation, low, high, preconditioning):
    """The first nine levels of a column of Table 1, rounded for networks of a table, then 0."""
    if discretisation == "iddpm":
        u = CosineBetas().sigmas().flip(0)
        known = torch.nonzero((u >= low) & (u <= high)).flatten().tolist()
        return levels(
            CosineBetas(), STEPS, IDDPMSteps(j_0=known[0], j_last=known[-1], rounded=True)
        )
    schedule = {
        "vp": lambda: Along(preserving_between(low, high), 1e-3),
        "ve": lambda: LogUniform(low, high),
        "edm": lambda: Rho(low, high),
    }[discretisation]()
    if isinstance(preconditioning, NoiseOnTable):
        schedule = Rounded(schedule, preconditioning.timesteps)
    return levels(schedule, STEPS)


@pytest.fixture(scope="module")
def built():
    """Networks are built once."""
    return {}


@pytest.mark.parametrize(
    "name", ["edm_ddpmpp", "vp_ddpmpp_cond", "ve_ncsnpp", "iddpm_adm", "edm_adm_cond"]
)
@pytest.mark.parametrize("ablation", ABLATIONS)
@torch.no_grad()
def test_the_ablation_is_the_published_samplers(parity, built, name, ablation):
    if name not in built:
        fixture = Fixture(parity / f"{name}.npz")
        built[name] = fixture, edm_denoiser(fixture)
    fixture, denoiser = built[name]
    label = {}
    if "class_labels" in fixture.arrays:
        label["label"] = fixture["class_labels"][:2].argmax(dim=1)
    solver, discretisation, schedule, scaling = ablation.split("_")
    known, usual = denoiser.preconditioning.sigma_range, RANGES[discretisation]
    low, high = max(known[0], usual[0]), min(known[1], usual[1])
    path = {
        "vp": lambda: preserving_between(low, high),
        "ve": VarianceExploding,
        "linear": Linear,
    }[schedule]()
    sigmas = visited(discretisation, low, high, denoiser.preconditioning)
    end = generalised(
        partial(denoiser, **label),
        fixture["latents"].to(torch.float64) * sigmas[0],
        sigmas,
        path=path,
        scaled=scaling == "vp",
        order=1 if solver == "euler" else 2,
    )
    reference = fixture[f"out/ablation_{ablation}"]
    assert (end - reference).norm() < 1e-4 * reference.norm()
