"""Samplers by name, at their usual settings within the noise levels of a network."""

from __future__ import annotations

from functools import partial

from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Integrator, Sampler

# Name: the algorithm and its usual number of steps.
NAMED: dict[str, tuple[Integrator, int]] = {
    "heun": (heun, 18),  # Karras 2022's setting for CIFAR-10, 35 evaluations
    "euler": (euler, 50),
    "ddim": (euler, 50),
    "ancestral": (partial(ancestral, variance="small"), 250),
}


def named(name: str, sigma_range: tuple[float, float], steps: int | None = None) -> Sampler:
    """A sampler on EDM's rho spacing between 80 and 0.002, or the network's limits where narrower.

    Args:
        name: a key of NAMED.
        sigma_range: lowest and highest level that the network knows.
        steps: the usual number when not given.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMED:
        raise ValueError(f"there is no sampler {name!r}; there are {', '.join(NAMED)}")
    integrate, usual = NAMED[name]
    low, high = sigma_range
    schedule = Rho(sigma_min=max(0.002, low), sigma_max=min(80.0, high))
    return Sampler(integrate, schedule, steps or usual)
