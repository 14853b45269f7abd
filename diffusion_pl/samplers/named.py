"""Samplers by name: an algorithm for a run's own levels, or one at its usual settings."""

from __future__ import annotations

from functools import partial

from diffusion_pl.diffusion.paths import VariancePreserving
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.errors import UserError
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.deis import deis
from diffusion_pl.samplers.dpm_solver import dpmpp_2m, dpmpp_3m
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.exponential_adams import exponential_adams
from diffusion_pl.samplers.generalised import generalised
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Integrator, Sampler
from diffusion_pl.samplers.unipc import unipc

# Name: the algorithm and its usual number of steps.
NAMED: dict[str, tuple[Integrator, int]] = {
    "heun": (heun, 18),  # Karras 2022's setting for CIFAR-10, 35 evaluations
    "churn": (partial(heun, S_churn=40.0, S_tmin=0.05, S_tmax=50.0, S_noise=1.003), 256),
    "midpoint": (partial(heun, alpha=0.5), 18),
    "flow_heun": (partial(heun, noise_scale=1.0), 50),  # Li & He 2025, 99 evaluations
    "deis": (deis, 18),
    "dpmpp_2m": (dpmpp_2m, 18),
    "dpmpp_3m": (dpmpp_3m, 18),
    "dpmpp_2m_sde": (partial(dpmpp_2m, eta=1.0), 50),
    "dpmpp_3m_sde": (partial(dpmpp_3m, eta=1.0), 50),
    "exponential_adams": (exponential_adams, 18),
    "exponential_adams_sde": (partial(exponential_adams, eta=1.0), 50),
    "unipc": (unipc, 18),
    "euler": (euler, 50),
    "ddim": (euler, 50),
    "ancestral": (partial(ancestral, variance="small"), 250),
    "vp_euler": (partial(generalised, path=VariancePreserving(), scaled=True, order=1), 250),
}


def integrator(name: str) -> Integrator:
    """The algorithm of a name.

    Args:
        name: a key of NAMED.

    Raises:
        UserError: an unknown name.
    """
    if name not in NAMED:
        raise UserError(
            f"there is no sampler {name!r}; there are {', '.join(NAMED)}, or give the dotted path "
            "of a function of your own"
        )
    return NAMED[name][0]


def named(name: str, sigma_range: tuple[float, float], steps: int | None = None) -> Sampler:
    """A sampler on EDM's rho spacing between 80 and 0.002, or the network's limits where narrower.

    Args:
        name: a key of NAMED.
        sigma_range: lowest and highest level that the network knows.
        steps: the usual number when not given.

    Raises:
        UserError: an unknown name.
    """
    integrate = integrator(name)
    usual = NAMED[name][1]
    low, high = sigma_range
    schedule = Rho(sigma_min=max(0.002, low), sigma_max=min(80.0, high))
    return Sampler(integrate, schedule, usual if steps is None else steps)
