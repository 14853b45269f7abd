"""Orders of convergence against exact flows, and the weights of multistep rules."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from analytic import Gaussian, Mixture

from diffusion_pl.diffusion.paths import Linear, VarianceExploding, VariancePreserving
from diffusion_pl.diffusion.schedules import LogUniform, Rho, levels
from diffusion_pl.samplers.deis import deis
from diffusion_pl.samplers.dpm_solver import dpmpp_2m, dpmpp_3m
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.exponential_adams import exponential_adams
from diffusion_pl.samplers.generalised import generalised
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.quadrature import POINTS, exponential_weights, weights
from diffusion_pl.samplers.unipc import unipc

F64 = torch.float64


def no_noise(like):
    raise AssertionError("a deterministic sampler drew noise")


ORDERS = {
    "euler": (euler, 1),
    "heun": (heun, 2),
    "alpha 0.8": (partial(heun, alpha=0.8), 2),
    "2M": (dpmpp_2m, 2),
    "3M": (dpmpp_3m, 2),
    "exponential Adams": (exponential_adams, 3),
    "deis 1": (partial(deis, order=1), 1),
    "deis 2": (partial(deis, order=2), 2),
    "deis 3": (deis, 3),
    "deis 3, rho 2.5": (partial(deis, rho=2.5), 3),
    "UniPC-1": (partial(unipc, order=1), 2),
    "UniPC-2": (unipc, 3),
    "UniPC-3": (partial(unipc, order=3), 4),
    "VP Euler": (partial(generalised, path=VariancePreserving(), scaled=True, order=1), 1),
    "VP Heun": (partial(generalised, path=VariancePreserving(), scaled=True), 2),
    "VE Heun": (partial(generalised, path=VarianceExploding()), 2),
}


@pytest.mark.parametrize(("integrate", "order"), ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("data", [Gaussian(std=0.5), Mixture()])
def test_order_of_convergence(integrate, order, data):
    # From a level so high that the first steps of multistep rules, which know too little for their
    # order, do no harm, to a level above 0, so that the last step is like the others.
    high, low = 80.0, 0.1
    x = high * torch.linspace(-2, 2, 7, dtype=F64).reshape(7, 1, 1, 1)
    exact = data.flow(x, high, low)
    error = {
        n: (integrate(data.denoise, x, levels(LogUniform(low, high), n + 1)[:-1], no_noise) - exact)
        .norm()
        .item()
        for n in (256, 512)
    }
    assert math.log2(error[256] / error[512]) == pytest.approx(order, abs=0.15)


def test_along_sigma_the_generalised_sampler_is_euler_and_heun():
    x = 80 * torch.linspace(-2, 2, 5, dtype=F64).reshape(5, 1, 1, 1)
    for order, plain in ((1, euler), (2, heun)):
        end = generalised(Mixture().denoise, x, levels(Rho(), 9), path=Linear(), order=order)
        torch.testing.assert_close(end, plain(Mixture().denoise, x, levels(Rho(), 9), no_noise))


def test_the_scaled_ode_is_songs_drift():
    """One Euler step of the VP SDE's probability flow, dz/dt = -beta/2 (z + score) (Song 2021)."""
    path, t, dt = VariancePreserving(), 0.6, -0.1
    time = torch.tensor([t, t + dt], dtype=F64)
    sigmas = path.sigma(time)
    beta = path.beta_d * t + path.beta_min
    z = torch.linspace(-1.5, 1.5, 5, dtype=F64).reshape(5, 1, 1, 1)
    s = 1 / torch.sqrt(1 + sigmas**2)
    score = (s[0] * Mixture().denoise(z / s[0], sigmas[0]) - z) / (1 - s[0] ** 2)
    expected = z + dt * (-beta / 2) * (z + score)
    end = generalised(Mixture().denoise, z / s[0], sigmas, path=path, scaled=True, order=1)
    torch.testing.assert_close(end * s[1], expected)


def test_unip_2_is_dpm_solver_2m():
    """Without its corrector UniPC-2 with B_2 is DPM-Solver++(2M): the first two steps show it."""
    sigmas = torch.tensor([80.0, 30.0, 7.0, 2.0], dtype=F64)
    seen: dict[str, list[float]] = {}
    for name, integrate in (("unipc", unipc), ("2m", dpmpp_2m)):
        seen[name] = []

        def denoise(x, sigma, name=name):
            seen[name].append(x.item())
            return torch.full_like(x, len(seen[name]))  # D = 1, 2, 3, whatever the state

        integrate(denoise, torch.full((1, 1, 1, 1), 50.0, dtype=F64), sigmas, no_noise)
    # UniC-1 joins D = 1 and 2 by halves, which leaves (1 - e^(-h)) / 2 more in the state.
    moved = (1 - 30 / 80) / 2 * 7 / 30
    assert seen["unipc"][:2] == pytest.approx(seen["2m"][:2])
    assert seen["unipc"][2] - moved == pytest.approx(seen["2m"][2])


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_deis_is_exact_where_eps_is_a_parabola(rho):
    """eps = a + b q + c q^2 in q = sigma^(1/rho): the third step and all after are exact."""
    a, b, c = 0.7, -0.4, 0.3
    sigmas = levels(Rho(), 6)
    root = sigmas ** (1 / rho)
    integral = sum(
        k * rho / (rho + n) * root ** (rho + n) for n, k in enumerate((a, b, c))
    )  # of eps d sigma
    eps = a + b * root + c * root**2
    start = torch.zeros(1, 1, 1, 1, dtype=F64)
    states = []

    def denoise(x, sigma):
        states.append(x.item())
        return x - sigma * eps[len(states) - 1]

    end = deis(denoise, start, sigmas, rho=rho)
    states.append(end.item())
    moved = [after - before for before, after in pairwise(states)]
    exact = integral.diff().tolist()
    assert moved[2:] == pytest.approx(exact[2:], rel=1e-9, abs=1e-11)
    assert moved[0] == pytest.approx(eps[0].item() * sigmas.diff()[0].item())  # Euler
    assert moved[1] != pytest.approx(exact[1], rel=1e-4)  # a straight line


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_adams_is_exact_where_the_denoised_image_is_a_parabola(eta):
    """D = tau^2 in the share of the third step: the integral by parts is closed form."""
    sigmas = torch.tensor([8.0, 4.0, 1.5, 0.5], dtype=F64)
    h = math.log(1.5 / 0.5)
    g = (1 + eta) * h
    shares = [math.log(1.5 / sigma) / h for sigma in (8.0, 4.0, 1.5)]
    given = iter(share**2 for share in shares)
    end = exponential_adams(
        lambda x, s: torch.full_like(x, next(given)),
        torch.zeros(1, 1, 1, 1, dtype=F64),
        sigmas,
        torch.zeros_like,
        eta=eta,
    )
    before = dpmpp_2m_state(shares, sigmas, eta)
    parts = 1 - 2 / g * (1 - (1 - math.exp(-g)) / g)  # integral of g e^(-g (1 - tau)) tau^2
    assert end.item() == pytest.approx(math.exp(-g) * before + parts, rel=1e-12)


def dpmpp_2m_state(shares, sigmas, eta):
    """The state before the third step: one value, then the straight line through two, exactly."""
    x, logs = 0.0, [-math.log(sigma) for sigma in sigmas.tolist()]
    for step in range(2):
        g = (1 + eta) * (logs[step + 1] - logs[step])
        x = math.exp(-g) * x + (1 - math.exp(-g)) * shares[step] ** 2
        if step:
            slope = (shares[1] ** 2 - shares[0] ** 2) / (logs[1] - logs[0]) * (logs[2] - logs[1])
            x += slope * (1 - (1 - math.exp(-g)) / g)
    return x


@pytest.mark.parametrize("integrate", [dpmpp_2m, dpmpp_3m, exponential_adams])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_a_stochastic_step_keeps_the_marginals(integrate, eta):
    """Were D the image x_0 itself, a step from x_0 + sigma eps would end in x_0 + s eps."""
    zero, one = (torch.full((1, 1, 1, 1), value, dtype=F64) for value in (0.0, 1.0))
    sigma, following = 3.0, 1.2
    pair = torch.tensor([sigma, following], dtype=F64)
    kept = integrate(lambda x, s: zero, one, pair, torch.zeros_like, eta=eta).item()
    added = integrate(lambda x, s: zero, zero, pair, torch.ones_like, eta=eta).item()
    assert (kept * sigma) ** 2 + added**2 == pytest.approx(following**2)
    assert kept == pytest.approx((following / sigma) ** (1 + eta))
    assert integrate(lambda x, s: one, zero, pair, torch.zeros_like, eta=eta).item() == (
        pytest.approx(1 - kept)
    )


def test_gauss_quadrature_is_exact_to_degree_15():
    for degree in range(16):
        found = sum(share * place**degree for place, share in POINTS)
        assert found == pytest.approx(1 / (degree + 1), rel=1e-13)


def test_weights_reproduce_every_polynomial_of_their_degree():
    nodes = [2.0, 2.5, 3.5]
    shares = weights(nodes, lambda q: q**2, 2.0, 1.0)
    for degree in range(3):
        found = sum(share * node**degree for node, share in zip(nodes, shares, strict=True))
        exact = (1.0 - 2.0 ** (degree + 3)) / (degree + 3)
        assert found == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("length", [1e-3, 0.5, 4.0])
def test_exponential_weights_are_those_of_lu_2022(length):
    """phi_1, phi_2 of the exponential integrator: values 1, then 1 and tau."""
    assert exponential_weights([0.0], length) == pytest.approx([-math.expm1(-length)])
    _, at_end = exponential_weights([0.0, 1.0], length)
    assert at_end == pytest.approx(1 + math.expm1(-length) / length, rel=1e-8)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (partial(deis, order=0), "at least 1"),
        (partial(deis, rho=0.5), "at least 1"),
        (partial(unipc, order=0), "at least 1"),
        (partial(dpmpp_2m, eta=-1.0), "must not be negative"),
        (partial(dpmpp_3m, eta=-1.0), "must not be negative"),
        (partial(exponential_adams, eta=-1.0), "must not be negative"),
    ],
)
def test_impossible_settings_are_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run(Mixture().denoise, torch.zeros(1, 1, 1, 1), levels(Rho(), 3), no_noise)
