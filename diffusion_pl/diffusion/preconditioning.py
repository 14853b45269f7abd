"""Preconditioning: how a raw network F becomes a denoiser D (Karras 2022, Eq. 7).

D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma), condition)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffusion_pl.diffusion.levels import per_image
from diffusion_pl.errors import UserError


class Coefficients(NamedTuple):
    """The four c's at some noise levels, each of sigma's shape."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Preconditioning(Protocol):
    """The four c's as functions of sigma, and the noise levels that the network was made for."""

    @property
    def sigma_range(self) -> tuple[float, float]: ...

    def __call__(self, sigma: Tensor) -> Coefficients: ...


@dataclass(frozen=True)
class Karras:
    """EDM's preconditioning: unit variance in and out at every level (Karras 2022, Table 1).

    Args:
        sigma_data: standard deviation of the images in [-1, 1]. With sigma_data = 1 the network
            predicts -v of Salimans & Ho 2022.
        velocity: the network predicts +v, so c_out has the other sign (diffusers' EDM schedulers
            with `v_prediction`).
    """

    sigma_data: float = 0.5
    velocity: bool = False

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise UserError(f"sigma_data must be positive (got {self.sigma_data})")

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Any positive level."""
        return 0.0, float("inf")

    def __call__(self, sigma: Tensor) -> Coefficients:
        variance = sigma.square() + self.sigma_data**2
        c_out = sigma * self.sigma_data / variance.sqrt()
        return Coefficients(
            c_skip=self.sigma_data**2 / variance,
            c_out=-c_out if self.velocity else c_out,
            c_in=1 / variance.sqrt(),
            c_noise=sigma.log() / 4,
        )


class Denoiser(nn.Module):
    """A network and its preconditioning: D(x; sigma), the posterior mean of the clean image.

    Args:
        network: the raw F, called `network(x, c_noise, **condition)`.
        preconditioning: the four c's.
    """

    def __init__(self, network: nn.Module, preconditioning: Preconditioning) -> None:
        super().__init__()
        self.network = network
        self.preconditioning = preconditioning

    def forward(
        self, x: Tensor, sigma: Tensor, *, variance: bool = False, **condition: Tensor | None
    ) -> Tensor:
        """Denoise x.

        Args:
            x: noisy images (B, C, H, W), image + sigma * unit noise; any float dtype.
            sigma: noise levels > 0, (B,) or one scalar () for all.
            variance: ask also for what a network of 2 C channels says of the variance of a reverse
                step, its last C channels as they are; without it they are left out.
            condition: keyword tensors that the network takes: `label`, `augment`, ...

        Returns:
            float32 (B, C, H, W), or (B, 2 C, H, W) with `variance`, whatever precision the network
            runs in under autocast.

        Raises:
            UserError: `variance` of a network that says nothing of it, or a network whose output
                has not the shape of its input.
        """
        x = x.to(torch.float32)
        # The four c's are computed before rounding to float32: sigma may come in float64.
        c = [per_image(value.to(torch.float32), x) for value in self.preconditioning(sigma)]
        c_skip, c_out, c_in, c_noise = c
        # shape[0]: len(x) would be a constant in a graph of torch.export.
        output = self.network(c_in * x, c_noise.reshape(-1).expand(x.shape[0]), **condition)
        channels = x.shape[1]
        fits = output.shape[1] in (channels, 2 * channels)
        if not fits or output.shape[::2] != x.shape[::2] or output.shape[3] != x.shape[3]:
            raise UserError(
                f"the network gives {tuple(output.shape)} for images of {tuple(x.shape)}; it must "
                f"give {channels} channels ({2 * channels} with a learned variance) of their size"
            )
        output, beside = output.to(torch.float32).tensor_split([x.shape[1]], dim=1)
        denoised = c_skip * x + c_out * output
        if not variance:
            return denoised
        if beside.shape != x.shape:
            raise UserError(
                "the network gives no variance: it has "
                f"{x.shape[1] + beside.shape[1]} output channels, {2 * x.shape[1]} are needed; "
                "set network.learned_variance=true, or a fixed variance where it is asked for"
            )
        return torch.cat([denoised, beside], dim=1)
