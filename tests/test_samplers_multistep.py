"""The multistep rule on EDM's levels: half of Heun's evaluations, a fraction of its error."""

from __future__ import annotations

import statistics

import torch
from problems import Spectrum, held_out, relative_error, ring, spectrum, start

from diffusion_pl.diffusion.schedules import Rho, levels
from diffusion_pl.samplers.deis import deis
from diffusion_pl.samplers.heun import heun


def no_noise(like):
    raise AssertionError("a deterministic sampler drew noise")


def errors(problem):
    """Of Heun's method at 35 evaluations, of `deis` at 18 and at 35."""
    x = start(problem, 64, seed=1)
    exact = problem.end(x, 80.0)
    runs = [(heun, 18), (deis, 18), (deis, 35)]
    return [
        relative_error(integrate(problem.denoise, x, levels(Rho(), steps), no_noise), exact)
        for integrate, steps in runs
    ]


def test_the_multistep_rule_beats_heun_at_half_the_evaluations():
    # A cheap part of the held-out problems; `make bench BENCH=samplers` measures all of them.
    problems = [each for each in held_out() if isinstance(each, Spectrum)] + [ring(5, 0.07, 22)]
    found = [errors(problem) for problem in problems]
    assert all(few < heuns for heuns, few, _ in found)
    heuns, few, many = (statistics.median(column) for column in zip(*found, strict=True))
    assert few <= min(1.2e-2, heuns / 4)
    assert many <= min(2e-3, heuns / 10)


def test_a_spectrum_ends_where_its_flow_says():
    problem = spectrum(1.0, 8, 5)
    x = start(problem, 4, seed=0)
    fine = heun(problem.denoise, x, levels(Rho(1e-5), 1000), no_noise)
    assert relative_error(fine, problem.end(x, 80.0)) < 1e-4


def test_modes_denoise_to_the_posterior_mean():
    problem = ring(3, 0.1, 4)
    x = torch.tensor([[0.2, -0.4]], dtype=torch.float64).reshape(1, 2, 1, 1)
    sigma, variance = torch.tensor(0.3, dtype=torch.float64), 0.1**2 + 0.3**2
    mean, total = torch.zeros_like(x), 0.0
    for centre in problem.centres:
        density = torch.exp(-(x - centre).square().sum() / (2 * variance))
        mean += density * (centre + 0.1**2 / variance * (x - centre))
        total += density
    torch.testing.assert_close(problem.denoise(x, sigma), mean / total)
