"""Reads the reference outputs' weights, in the published key names, into our networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.interop import diffusers, edm
from diffusion_pl.interop.denoisers import denoiser_from
from diffusion_pl.networks.ddpm_unet import DDPMUNet


class Fixture:
    """One file of reference outputs: `fixture["out/eps"]` is a tensor."""

    def __init__(self, path: Path) -> None:
        self.arrays = np.load(path)
        self.config = json.loads(str(self.arrays["config"]))
        self.weights = {
            key.removeprefix("param/"): torch.from_numpy(self.arrays[key])
            for key in self.arrays.files
            if key.startswith("param/")
        }

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])


def edm_denoiser(fixture: Fixture) -> Denoiser:
    """The denoiser of an EDM fixture."""
    return denoiser_from(edm, fixture.config, fixture.weights)


def song_unet(fixture: Fixture) -> nn.Module:
    """The raw network of an EDM fixture."""
    return edm_denoiser(fixture).network


def ddpm_unet(fixture: Fixture) -> DDPMUNet:
    """The DDPM U-Net of a fixture in the diffusers layout."""
    return denoiser_from(diffusers, fixture.config, fixture.weights).network
