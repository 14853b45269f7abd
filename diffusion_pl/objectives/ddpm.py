"""DDPM: Ho, Jain & Abbeel, Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239.

| part | formula | where |
|---|---|---|
| noise levels | beta_t linear, alpha_bar_t = prod (1 - beta_s), t uniform | App. B, Eq. 4 |
| c_skip, c_out | 1, -sigma: D = x - sigma eps_theta, the x_0 of Eq. 15 | Eq. 15 |
| c_in | 1 / sqrt(1 + sigma^2): the network sees x_t of Ho's own scale | Eq. 4 |
| c_noise | the timestep, 0 (diffused one step) to T - 1 | released code |
| weight | 1 / sigma^2, the squared error of eps | Eq. 14, L_simple |
| pooling | mean over channels and pixels | released code |
| L, the bound | one term L_t an image, bits per dimension; see likelihood.py | Eq. 5 |

The network may predict the image or the velocity v = (eps - sigma x) / sqrt(1 + sigma^2) instead
(Salimans & Ho 2022, arXiv:2202.00512): only c_skip and c_out change, and the weight stays that of
the eps loss unless another is named. The weight that makes each prediction's own squared error:

| prediction | c_skip | c_out | weight |
|---|---|---|---|
| noise | 1 | -sigma | `EpsWeight()`, 1 / sigma^2 |
| image | 0 | 1 | `weights.X0Weight()`, 1 |
| velocity | 1 / (1 + sigma^2) | -sigma / sqrt(1 + sigma^2) | `UnitOutput(1.0)`, 1 + 1 / sigma^2 |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion_pl.diffusion.levels import per_image
from diffusion_pl.diffusion.objective import Denoise, EpsWeight, Objective, Weight, pixel_mean
from diffusion_pl.diffusion.preconditioning import Coefficients, Denoiser, Preconditioning
from diffusion_pl.diffusion.timesteps import LinearBetas, Timesteps
from diffusion_pl.errors import UserError
from diffusion_pl.objectives.likelihood import ReverseChain


@dataclass(frozen=True)
class PredictNoise:
    """The preconditioning of a network that predicts eps from the variance-preserving state x_t.

    Args:
        timesteps: the table.
        timestep_scale: c_noise is the timestep times this, 1000 / T for improved DDPM.
    """

    timesteps: Timesteps
    timestep_scale: float = 1.0

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The first and the last timestep's level."""
        return self.timesteps.sigma_range

    def __call__(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            c_skip=torch.ones_like(sigma),
            c_out=-sigma,
            c_in=(1 + sigma.square()).rsqrt(),
            c_noise=self.timesteps.timestep(sigma) * self.timestep_scale,
        )


@dataclass(frozen=True)
class PredictImage:
    """The same of a network that predicts the clean image (Ho 2020, section 3.2)."""

    timesteps: Timesteps
    timestep_scale: float = 1.0

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The first and the last timestep's level."""
        return self.timesteps.sigma_range

    def __call__(self, sigma: Tensor) -> Coefficients:
        c = PredictNoise(self.timesteps, self.timestep_scale)(sigma)
        return c._replace(c_skip=torch.zeros_like(sigma), c_out=torch.ones_like(sigma))


@dataclass(frozen=True)
class PredictVelocity:
    """The same of a network that predicts v, so that D = alpha x_t - sqrt(1 - alpha^2) v."""

    timesteps: Timesteps
    timestep_scale: float = 1.0

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The first and the last timestep's level."""
        return self.timesteps.sigma_range

    def __call__(self, sigma: Tensor) -> Coefficients:
        c = PredictNoise(self.timesteps, self.timestep_scale)(sigma)
        return c._replace(c_skip=c.c_in.square(), c_out=-c.c_in * sigma)


Prediction = Literal["noise", "image", "velocity"]
PREDICTIONS: dict[str, Callable[[Timesteps], Preconditioning]] = {
    "noise": PredictNoise,
    "image": PredictImage,
    "velocity": PredictVelocity,
}


@dataclass(frozen=True)
class VariationalBound:
    """The bound as a training loss: of each image the one term that its timestep names.

    Args:
        schedule: the table, t uniform.
        preconditioning: the four c's around the network.
        chain: the reverse steps whose cost is the loss.
        whole: times T, so that the mean estimates the bound itself; DDPM's code leaves it out.
    """

    schedule: Timesteps
    preconditioning: Preconditioning
    chain: ReverseChain
    whole: bool = False

    def denoiser(self, network: nn.Module) -> Denoiser:
        """The denoiser that this objective trains around a raw network."""
        return Denoiser(network, self.preconditioning)

    def loss(
        self, denoise: Denoise, image: Tensor, u: Tensor, noise: Tensor, **condition: Tensor | None
    ) -> Tensor:
        """L_t in bits per dimension, without clipping; see `Objective.loss`."""
        t = self.schedule.index(u)
        level = per_image(self.schedule(u), image).to(torch.float32)
        denoised, share = self.chain.answer(denoise, image + level * noise, t, **condition)
        bits = self.chain.bits(image, denoised, share, t)
        return bits * self.schedule.T if self.whole else bits


def DDPM(
    T: int = 1000,
    beta_1: float = 1e-4,
    beta_T: float = 0.02,
    predict: Prediction = "noise",
    weight: Weight | None = None,
) -> Objective:
    """L_simple of Ho 2020, Eq. 14, with the paper's symbols as arguments.

    Args:
        T: number of timesteps.
        beta_1: variance added by the first step.
        beta_T: variance added by the last step.
        predict: what the network predicts; "noise" as published.
        weight: lambda(sigma) on the image's error; the noise's squared error when None.
    """
    timesteps = LinearBetas(T, beta_1, beta_T)
    return Objective(
        schedule=timesteps,
        preconditioning=_predicting(predict, timesteps),
        weight=EpsWeight() if weight is None else weight,
        reduce=pixel_mean,
    )


def DDPMBound(
    T: int = 1000,
    beta_1: float = 1e-4,
    beta_T: float = 0.02,
    predict: Prediction = "noise",
    variance: Literal["small", "large"] = "large",
) -> VariationalBound:
    """L of Ho 2020, Eq. 5 with fixed variances: the row "L, fixed isotropic Sigma" of Table 2.

    Args:
        T: number of timesteps.
        beta_1: variance added by the first step.
        beta_T: variance added by the last step.
        predict: what the network predicts.
        variance: of the reverse steps; "large" for CIFAR-10 in the released code.
    """
    timesteps = LinearBetas(T, beta_1, beta_T)
    return VariationalBound(
        schedule=timesteps,
        preconditioning=_predicting(predict, timesteps),
        chain=ReverseChain(timesteps, variance),
    )


def _predicting(name: str, timesteps: Timesteps) -> Preconditioning:
    if name not in PREDICTIONS:
        raise UserError(f"predict must be noise, image or velocity (got {name!r})")
    return PREDICTIONS[name](timesteps)
