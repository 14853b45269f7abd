"""Improved DDPM: what learns the variance, and how timesteps are drawn by their loss."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import defaultdict, deque

import pytest
import torch
from analytic import Gaussian
from torch import nn

from diffusion_pl.diffusion import levels
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.objectives.ddpm import DDPM
from diffusion_pl.objectives.improved_ddpm import (
    ImportanceSampled,
    ImprovedDDPM,
    ImprovedDDPMBound,
    ImprovedDDPMSimple,
)

F64 = torch.float64
LN2 = math.log(2)


class Says(nn.Module):
    """A network with one stated answer."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, c_noise):
        return self.answer


def draws(count=16, seed=1, pixels=4):
    source = torch.Generator().manual_seed(seed)
    image = 0.5 * torch.randn(count, 1, pixels, pixels, generator=source)
    noise, guess, said = torch.randn(3, *image.shape, generator=source)
    return image, (torch.arange(count, dtype=F64) + 0.5) / count, noise, guess, said


def test_the_hybrid_loss_is_the_simple_one_and_a_thousandth_of_the_whole_bound():
    objective = ImprovedDDPM(T=16)
    image, u, noise, guess, said = draws()
    network = Says(torch.cat([guess, said], dim=1))
    losses = objective.loss(objective.denoiser(network), image, u, noise)
    simple = ImprovedDDPMSimple(T=16)
    bound = ImprovedDDPMBound(T=16).objective
    expected = simple.loss(simple.denoiser(Says(guess)), image, u, noise)
    expected = expected + 0.001 * bound.loss(bound.denoiser(network), image, u, noise)
    torch.testing.assert_close(losses, expected)
    # One term stands for the sum of all T.
    sigma = objective.schedule(u)
    level = sigma.float().reshape(-1, 1, 1, 1)
    c = [value.float().reshape(-1, 1, 1, 1) for value in objective.preconditioning(sigma)]
    denoised = c[0] * (image + level * noise) + c[1] * guess
    bits = objective.chain.bits(image, denoised, (said + 1) / 2, torch.arange(16))
    torch.testing.assert_close(
        (losses - simple.loss(simple.denoiser(Says(guess)), image, u, noise)),
        0.016 * bits,
        rtol=1e-3,
        atol=1e-3,
    )


def test_the_bound_teaches_the_variance_alone():
    objective, simple = ImprovedDDPM(T=16), ImprovedDDPMSimple(T=16)
    image, u, noise, guess, said = draws()
    both = nn.Parameter(torch.cat([guess, said], dim=1))
    objective.loss(objective.denoiser(Says(both)), image, u, noise).sum().backward()
    alone = nn.Parameter(guess)
    simple.loss(simple.denoiser(Says(alone)), image, u, noise).sum().backward()
    torch.testing.assert_close(both.grad[:, :1], alone.grad)
    assert (both.grad[1:, 1:] != 0).all()


def test_the_best_variance_is_the_posterior_one_and_the_error_of_the_mean():
    # The true reverse step from sigma to s has variance small + (1 - (s/sigma)^2)^2 E (D - x_0)^2.
    objective, data = ImprovedDDPM(T=10), Gaussian(std=0.5)
    source = torch.Generator().manual_seed(2)
    image, noise = torch.randn(2, 1024, 1, 4, 4, generator=source)
    image, step = 0.5 * image, 6
    sigma, following = objective.schedule.sigmas()[[step, step - 1]].tolist()
    u = torch.full((1024,), (step + 0.5) / 10, dtype=F64)
    kept = 1 - (following / sigma) ** 2
    small = following**2 * kept
    large = (sigma**2 - following**2) * (1 + following**2) / (1 + sigma**2)
    best = small + kept**2 * 0.25 * sigma**2 / (0.25 + sigma**2)
    v = 2 * math.log(best / small) / math.log(large / small) - 1

    def loss(v):
        def denoise(x, sigma, variance):
            return torch.cat([data.denoise(x, sigma.float()), torch.full_like(x, v)], dim=1)

        return objective.loss(denoise, image, u, noise).mean()

    # The parabola's slope at the best is 1 % of that a tenth away: 16,384 pixels, 1.1 % error.
    assert loss(v) < min(loss(v - 0.15), loss(v + 0.15))
    assert abs(loss(v - 0.2) - loss(v + 0.2)) < 0.3 * (loss(v + 0.2) - loss(v))


@pytest.mark.parametrize("make", [ImprovedDDPM, ImprovedDDPMSimple, ImprovedDDPMBound])
def test_any_number_of_timesteps_is_spread_over_a_thousand(make):
    objective = make(T=4000)
    sigma = objective.schedule(torch.tensor([0.0, 0.5, 0.999999], dtype=F64))
    c_noise = objective.preconditioning(sigma).c_noise
    assert c_noise.tolist() == pytest.approx([0, 500, 999.75])


def test_the_tables_are_the_published_ones():
    assert ImprovedDDPM().schedule.betas[0].item() == pytest.approx(9.86581881e-06)
    table = ImprovedDDPM(T=4000, table="linear").schedule
    assert table.betas[[0, -1]].tolist() == pytest.approx([0.25e-4, 0.005])
    ends = [levels.log_snr_from_sigma(t.sigmas()[-1]) for t in (table, LinearBetas())]
    assert ends[0].item() == pytest.approx(ends[1].item(), abs=0.15)
    with pytest.raises(ValueError, match="cosine or linear"):
        ImprovedDDPM(table="sqrt")


def full_of(losses, keep=10):
    """Importance sampling whose every timestep has seen its loss often enough."""
    T = len(losses)
    sampled = ImportanceSampled(DDPM(T=T, beta_T=0.2), LinearBetas(T, beta_T=0.2), keep)
    for _ in range(keep):
        sampled.remember(torch.arange(T), torch.tensor(losses, dtype=F64))
    return sampled


def test_timesteps_are_uniform_until_every_one_is_known():
    sampled = ImportanceSampled(DDPM(T=4), LinearBetas(4), keep=2)
    for t in ([0, 1, 2, 3], [0, 1, 2, 2]):
        sampled.remember(torch.tensor(t), torch.arange(4.0))
        assert sampled.probabilities().tolist() == [0.25] * 4
    sampled.remember(torch.tensor([3]), torch.tensor([8.0]))
    assert sampled.probabilities().tolist() != [0.25] * 4


def test_probabilities_are_the_roots_of_the_mean_squares_and_a_thousandth_uniform():
    sampled = full_of([1.0, 2.0, 3.0, 4.0], keep=1)
    for size in (1.0, 7.0):  # keep = 1: the last alone counts
        sampled.remember(torch.tensor([0]), torch.tensor([size]))
    expected = 0.999 * torch.tensor([7.0, 2, 3, 4], dtype=F64) / 16 + 0.001 / 4
    torch.testing.assert_close(sampled.probabilities(), expected)
    two = full_of([1.0, 1.0], keep=2)
    two.remember(torch.tensor([0]), torch.tensor([7.0]))
    p = two.probabilities()
    assert ((p[0] - 0.0005) / (p[1] - 0.0005)).item() == pytest.approx(5)  # sqrt((49 + 1) / 2)


def test_the_memory_is_that_of_one_loss_at_a_time():
    T, keep = 5, 3
    sampled = ImportanceSampled(DDPM(T=T), LinearBetas(T), keep)
    plain = defaultdict(lambda: deque(maxlen=keep))
    source = torch.Generator().manual_seed(0)
    for _ in range(6):
        t = torch.randint(0, T, (24,), generator=source)  # more of one timestep than are kept
        losses = torch.rand(24, generator=source)
        sampled.remember(t, losses)
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            plain[step].append(loss)
    for step in range(T):
        assert sorted(sampled.history[step].tolist()) == sorted(plain[step])


def test_importance_leaves_the_mean_loss_as_it_was():
    sampled = full_of([0.5, 4.0, 1.0, 2.0])
    sampled.eval()
    count = 4000
    u = (torch.arange(count, dtype=F64) + 0.5) / count
    drawn = sampled.index(u).bincount(minlength=4) / count
    torch.testing.assert_close(drawn.to(F64), sampled.probabilities(), rtol=0, atol=2 / count)
    torch.testing.assert_close(sampled.schedule(u), sampled.timesteps.sigmas()[sampled.index(u)])
    image, noise = torch.zeros(count, 1, 1, 1), torch.ones(count, 1, 1, 1)

    def denoise(x, sigma):  # a loss that is the timestep plus 1
        t = sampled.timesteps.timestep(sigma)
        return (sigma * (t + 1).sqrt()).float().reshape(-1, 1, 1, 1)

    losses = sampled.loss(denoise, image, u, noise)
    assert losses.dtype == torch.float32
    assert losses.mean().item() == pytest.approx(2.5, rel=2e-3)
    assert sampled.seen.tolist() == [10] * 4  # in evaluation nothing is remembered


def test_a_resumed_run_draws_the_same_timesteps():
    image, u, noise, *_ = draws(16)
    first, second = full_of([1.0, 2.0, 3.0, 4.0]), full_of([4.0, 4.0, 4.0, 4.0])
    first.loss(lambda x, sigma: 0 * x, image, u, noise)
    assert first.seen.sum() == 56
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.index(u), second.index(u))
    assert second.preconditioning is not None


def test_what_is_remembered_is_the_loss_before_its_weight():
    sampled = full_of([1.0, 2.0, 3.0, 10.0], keep=1)
    image, u, noise, *_ = draws(8)
    t = sampled.index(u)
    losses = sampled.loss(lambda x, sigma: 0 * x, image, u, noise)
    plain = losses * 4 * full_of([1.0, 2.0, 3.0, 10.0], keep=1).probabilities()[t]
    last = dict(zip(t.tolist(), plain.tolist(), strict=True))
    for step, loss in last.items():
        assert sampled.history[step, 0].item() == pytest.approx(loss, rel=1e-6)


def test_the_whole_bound_is_t_times_the_term():
    image, u, noise, guess, said = draws(16)
    objective = ImprovedDDPMBound(T=16).objective
    network = Says(torch.cat([guess, said], dim=1))
    losses = objective.loss(objective.denoiser(network), image, u, noise)
    sigma = objective.schedule(u).float().reshape(-1, 1, 1, 1)
    denoised = image + sigma * (noise - guess)
    expected = 16 * objective.chain.bits(image, denoised, (said + 1) / 2, torch.arange(16))
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-2)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="keep must be at least 1"):
        ImportanceSampled(DDPM(T=4), LinearBetas(4), keep=0)


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.objectives.ddpm import DDPM
from diffusion_pl.objectives.improved_ddpm import ImportanceSampled
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
sampled = ImportanceSampled(DDPM(T=4), LinearBetas(4), keep=2)
sampled.remember(torch.tensor([2 * rank, 2 * rank + 1]), torch.tensor([1.0 + rank, 3.0]))
print(sampled.history[:, 0].tolist(), sampled.seen.tolist())
dist.destroy_process_group()
"""


def test_two_processes_remember_the_losses_of_both(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, errors = rank.communicate(timeout=300)
        assert output == "[1.0, 3.0, 2.0, 3.0] [1, 1, 1, 1]\n", errors
