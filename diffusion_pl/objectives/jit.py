"""JiT: Li & He, Back to Basics: Let Denoising Generative Models Denoise, 2025, arXiv:2511.13720.

The paper's time t runs from noise, 0, to the image, 1; its noise e has standard deviation s.

| part | formula | where |
|---|---|---|
| state | z = t x + (1 - t) e = t (x + sigma eps), with e = s eps | Eq. 1 |
| noise level | sigma = s (1 - t) / t, t = s / (s + sigma) | from the state |
| noise levels | logit t normal, mean -0.8, std 0.8: ln sigma ~ N(ln s + 0.8, 0.8^2) | Table 9 |
| c_skip, c_out | 0, 1: the network predicts the image | section 4 |
| c_in | t: the network sees z | Eq. 1 |
| c_noise | t; or 1 - t, `reversed_time`, as PRX has it | released code |
| weight | 1 / max(1 - t, t_eps)^2, the squared error of the velocity (x - z) / (1 - t) | Alg. 1 |
| pooling | mean over channels and pixels | Alg. 1 |

Table 2 of the paper trains each of three predictions with each of three losses. With F the network
and m = max(1 - t, t_eps):

| prediction | D | | loss | weight |
|---|---|---|---|---|
| image | F | | image | 1 |
| noise | (z - (1 - t) F) / t | | noise | (t / m)^2 |
| velocity | z + (1 - t) F | | velocity | 1 / m^2 |
| edm | EDM's c_skip, c_out and c_in (Karras 2022, Table 1) | | | |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_pl.diffusion.objective import Objective, pixel_mean
from diffusion_pl.diffusion.preconditioning import Coefficients, Karras
from diffusion_pl.diffusion.schedules import LogNormal
from diffusion_pl.errors import UserError

Prediction = Literal["image", "noise", "velocity", "edm"]
Loss = Literal["image", "noise", "velocity"]


@dataclass(frozen=True)
class Interpolation:
    """The preconditioning of a network that sees z = t x + (1 - t) e.

    Args:
        predict: what it predicts; see the table above.
        noise_scale: s, the standard deviation of e.
        timestep_scale: c_noise is t times this.
        sigma_data: of `edm`.
        reversed_time: c_noise is 1 - t times `timestep_scale` instead.
    """

    predict: Prediction = "image"
    noise_scale: float = 1.0
    timestep_scale: float = 1.0
    sigma_data: float = 0.5
    reversed_time: bool = False

    def __post_init__(self) -> None:
        if self.predict not in ("image", "noise", "velocity", "edm"):
            raise UserError(f"predict must be image, noise, velocity or edm (got {self.predict!r})")
        for name in ("noise_scale", "timestep_scale", "sigma_data"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be positive (got {getattr(self, name)})")

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Any positive level."""
        return 0.0, math.inf

    def __call__(self, sigma: Tensor) -> Coefficients:
        t = self.noise_scale / (self.noise_scale + sigma)
        time = sigma / (self.noise_scale + sigma) if self.reversed_time else t
        one, c_noise = torch.ones_like(sigma), self.timestep_scale * time
        if self.predict == "image":
            return Coefficients(torch.zeros_like(sigma), one, t, c_noise)
        if self.predict == "noise":
            return Coefficients(one, -sigma / self.noise_scale, t, c_noise)
        if self.predict == "velocity":
            return Coefficients(t, 1 - t, t, c_noise)
        return Karras(self.sigma_data)(sigma)._replace(c_noise=c_noise)


@dataclass(frozen=True)
class ClampedWeight:
    """The squared error of the image, the noise or the velocity, 1 - t being at least t_eps.

    Args:
        loss: whose error.
        noise_scale: s.
        t_eps: below which 1 - t is replaced, > 0.
    """

    loss: Loss = "velocity"
    noise_scale: float = 1.0
    t_eps: float = 0.05

    def __post_init__(self) -> None:
        if self.loss not in ("image", "noise", "velocity"):
            raise UserError(f"loss must be image, noise or velocity (got {self.loss!r})")
        if not 0 < self.t_eps < 1:
            raise UserError(f"t_eps must be in (0, 1) (got {self.t_eps})")

    def __call__(self, sigma: Tensor) -> Tensor:
        if self.loss == "image":
            return torch.ones_like(sigma)
        t = self.noise_scale / (self.noise_scale + sigma)
        # sigma / (s + sigma), not 1 - t: small levels keep their digits.
        remaining = (sigma / (self.noise_scale + sigma)).clamp(min=self.t_eps)
        return ((t if self.loss == "noise" else 1) / remaining).square()


def JiT(
    mean: float = -0.8,
    std: float = 0.8,
    noise_scale: float = 1.0,
    t_eps: float = 0.05,
    predict: Prediction = "image",
    loss: Loss = "velocity",
    timestep_scale: float = 1.0,
    sigma_data: float = 0.5,
    reversed_time: bool = False,
) -> Objective:
    """The velocity loss of a network that predicts the image.

    Args:
        mean: of logit t, t = 1 being the image.
        std: of logit t, > 0.
        noise_scale: s, the standard deviation of the noise; image side / 256 in the paper.
        t_eps: smallest 1 - t by which the loss divides.
        predict: what the network predicts; "image" as published.
        loss: whose squared error; "velocity" as published.
        timestep_scale: c_noise is t times this; 1 as published, 1000 for networks whose embedding
            is made for timesteps up to 1000.
        sigma_data: of `predict: edm`.
        reversed_time: c_noise is 1 - t instead of t, times `timestep_scale`.

    Raises:
        UserError: a value outside its range.
    """
    preconditioning = Interpolation(predict, noise_scale, timestep_scale, sigma_data, reversed_time)
    return Objective(
        schedule=LogNormal(math.log(noise_scale) - mean, std),
        preconditioning=preconditioning,
        weight=ClampedWeight(loss, noise_scale, t_eps),
        reduce=pixel_mean,
    )
