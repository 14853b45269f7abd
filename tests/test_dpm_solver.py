"""DPM-Solver++(3M) as others run it, against their code; our rule; what old runs name."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from analytic import Mixture
from problems import relative_error, spectrum, start

from diffusion_pl import config
from diffusion_pl.diffusion.schedules import Rho, levels
from diffusion_pl.samplers.dpm_solver import dpmpp_3m
from diffusion_pl.samplers.exponential_adams import exponential_adams
from diffusion_pl.samplers.named import NAMED

F64 = torch.float64
X = 80 * torch.linspace(-2, 2, 7, dtype=F64).reshape(7, 1, 1, 1)


def by_diffusers(steps):
    """The end and the levels of the library's own third-order scheduler, on the mixture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("diffusers")
    scheduler = library.DPMSolverMultistepScheduler(
        solver_order=3,
        algorithm_type="dpmsolver++",
        solver_type="heun",  # the second step's straight line is integrated exactly
        lower_order_final=False,
        final_sigmas_type="zero",
        use_karras_sigmas=True,
        prediction_type="sample",  # its model answers D
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.to(F64)
    signal = 1 / torch.sqrt(1 + sigmas**2)  # its state is the variance-preserving one
    x = X * signal[0]
    for step, timestep in enumerate(scheduler.timesteps):
        denoised = Mixture().denoise(x / signal[step], sigmas[step])
        x = scheduler.step(denoised, timestep, x).prev_sample
    return x.to(F64), sigmas


# The library's SDE form of the third order has another sign in its last term; k-diffusion's is
# this rule's, and the next test's.
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # the library's own
@pytest.mark.parametrize("steps", [4, 9, 18])
def test_dpmpp_3m_is_the_rule_that_others_release(steps):
    expected, sigmas = by_diffusers(steps)
    end = dpmpp_3m(Mixture().denoise, X, sigmas, torch.zeros_like)
    torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-4)  # their levels are float32
    ours = exponential_adams(Mixture().denoise, X, sigmas, torch.zeros_like)
    assert (ours - expected).abs().max() > 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_released_rule_takes_half_of_the_second_difference(eta):
    """D = tau^2 in the share of the third step, alone: half of its integral by parts."""
    sigmas = torch.tensor([8.0, 4.0, 1.5, 0.5], dtype=F64)
    h = math.log(1.5 / 0.5)
    g = (1 + eta) * h
    given = iter([math.log(1.5 / sigma) / h] for sigma in (8.0, 4.0, 1.5))
    seen: list[float] = []

    def denoise(x, sigma):
        seen.append(x.item())
        (share,) = next(given)
        return torch.full_like(x, share**2)

    zero = torch.zeros(1, 1, 1, 1, dtype=F64)
    end = dpmpp_3m(denoise, zero, sigmas, torch.zeros_like, eta=eta).item()
    # Through its values at tau < 0 and 0 the parabola tau^2 has no line of its own at 0.
    whole = 1 - 2 / g * (1 - (1 - math.exp(-g)) / g)
    assert end == pytest.approx(math.exp(-g) * seen[2] + whole / 2, rel=1e-12)


def test_of_few_steps_the_released_rule_has_the_smaller_error():
    """What docs/samplers.md says of both, on a problem whose flow is known."""
    problem = spectrum(0.5, 8, 11)
    x = start(problem, 8, seed=0)
    exact = problem.end(x, 80.0)
    for steps, least in ((9, 1.05), (18, 2.0)):
        errors = [
            relative_error(
                integrate(problem.denoise, x, levels(Rho(), steps), torch.zeros_like), exact
            )
            for integrate in (exponential_adams, dpmpp_3m)
        ]
        assert errors[0] > least * errors[1]


def test_each_rule_has_its_name():
    assert NAMED["dpmpp_3m"][0] is dpmpp_3m
    assert NAMED["exponential_adams"][0] is exponential_adams
    for name, integrate in (("dpmpp_3m", dpmpp_3m), ("exponential_adams", exponential_adams)):
        with_noise = NAMED[f"{name}_sde"][0]
        assert isinstance(with_noise, partial) and with_noise.func is integrate
        assert with_noise.keywords == {"eta": 1.0}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_a_run_begun_before_names_draws_as_before(eta):
    """Their configs say dpmpp_3m.dpmpp_3m, which was the exact integral of the parabola."""
    node = {"_target_": "diffusion_pl.samplers.dpmpp_3m.dpmpp_3m", "_partial_": True, "eta": eta}
    old = config.build(config.load_resolved({"integrate": node}, "old.ckpt"), "integrate")
    sigmas = levels(Rho(), 9)
    one, other = (
        integrate(Mixture().denoise, X, sigmas, torch.ones_like)
        for integrate in (old, partial(exponential_adams, eta=eta))
    )
    assert torch.equal(one, other)
