"""A sampler: which levels to visit, how to step between them, and where to begin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from diffusion_pl.diffusion.guidance import Clip, VelocityClamp, clipped
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.schedules import Schedule, Spacing, levels, uniform
from diffusion_pl.errors import UserError


class Integrator(Protocol):
    """Takes the state from sigmas[0] to sigmas[-1].

    Args:
        denoise: D, called `denoise(x, sigma)`.
        x: the state at sigmas[0], image + sigma * noise, float64 (B, C, H, W).
        sigmas: decreasing levels, float64 (N + 1,), all but the last > 0; any spacing.
        randn_like: draws standard normal noise shaped as its argument; deterministic algorithms do
            not use it.

    Returns:
        The state at sigmas[-1], float64; N evaluations unless said otherwise.
    """

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        randn_like: Callable[[Tensor], Tensor],
    ) -> Tensor: ...


@dataclass(frozen=True)
class Sampler:
    """Samples images from noise with any denoiser.

    Args:
        integrate: the algorithm.
        schedule: u -> sigma; belongs to the sampler, not to the checkpoint.
        steps: number of levels above 0, at least 1. Evaluations of the network may be more.
        spacing: the quantiles u at which the schedule is read, decreasing.
        clip_denoised: clip every denoised image to [-1, 1], as DDPM does; a number for another
            limit, or a function of the image such as `diffusion.guidance.thresholded`.
        unit_start: begin from N(0, 1 + sigma^2), which is x_T ~ N(0, I) of Ho 2020 in the state
            x + sigma eps; otherwise from N(0, sigma^2) as Karras 2022.
        velocity_clamp: of JiT's released sampler; None for none.
    """

    integrate: Integrator
    schedule: Schedule
    steps: int
    spacing: Spacing = uniform
    clip_denoised: Clip = False
    unit_start: bool = False
    velocity_clamp: VelocityClamp | None = None

    def sigmas(self) -> Tensor:
        """The levels visited: float64 (steps + 1,), decreasing to 0.

        Raises:
            UserError: fewer than one step, or more steps than the schedule has levels.
        """
        return levels(self.schedule, self.steps, self.spacing)

    def __call__(
        self, denoise: Denoise, noise: Tensor, randn_like: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Sample images.

        Args:
            denoise: D, called `denoise(x, sigma)` with x (B, C, H, W) and sigma ().
            noise: standard normal (B, C, H, W), on the device to sample on.
            randn_like: draws the noise of stochastic integrators.

        Returns:
            float32 (B, C, H, W), about [-1, 1], not clipped unless `clip_denoised`.
        """
        return self.along(denoise, self.start(noise), self.sigmas(), randn_like)

    def start(self, noise: Tensor) -> Tensor:
        """The state that noise is at the first level, float64."""
        # float64: over 18 steps from 80 to 0.002 the float32 state loses what the order gains
        # (Karras 2022, App. C.2.5).
        return noise.to(torch.float64) * self.start_std

    @property
    def start_std(self) -> float:
        """Standard deviation of the state that the sampler begins from."""
        start = float(self.sigmas()[0])
        return math.sqrt(1 + start**2) if self.unit_start else start

    def along(
        self,
        denoise: Denoise,
        state: Tensor,
        sigmas: Tensor,
        randn_like: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Take a state along levels of its own, as from noise along `sigmas()`.

        Args:
            denoise, state, sigmas, randn_like: as for every `Integrator`; sigmas[-1] = 0.

        Returns:
            float32 (B, C, H, W).
        """
        return self.integrate(self.limited(denoise), state, sigmas, randn_like).to(torch.float32)

    def limited(self, denoise: Denoise) -> Denoise:
        """The denoiser as the steps see it: clipped, its velocity clamped."""
        denoise = clipped(denoise, self.clip_denoised) if self.clip_denoised else denoise
        return self.velocity_clamp(denoise) if self.velocity_clamp else denoise


def steps_along(sigmas: Tensor, x: Tensor) -> Iterator[tuple[float, float, Tensor]]:
    """Each step's level, the next level, and the former as a tensor of x's device and dtype."""
    on_device = sigmas.to(x)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        yield sigma, sigma_next, on_device[step]


class Visiting(Protocol):
    """Whatever knows the levels that it visits."""

    def sigmas(self) -> Tensor: ...


def check_range(sampler: Visiting, sigma_range: tuple[float, float]) -> None:
    """Refuse a sampler whose levels lie outside what the network was trained for.

    Raises:
        UserError: names the levels and the range.
    """
    visited = sampler.sigmas()[:-1]
    low, high = sigma_range
    first, last = float(visited[0]), float(visited[-1])
    tolerance = 1e-6  # a limit copied into YAML is rounded
    if last < low * (1 - tolerance) or first > high * (1 + tolerance):
        raise UserError(
            f"the sampler visits noise levels {first:g} to {last:g}, the network knows "
            f"{high:g} to {low:g}; set the sampler's schedule within that range"
        )
