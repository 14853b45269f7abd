"""Weights beside the papers' own: what they are for each prediction, and the learned one."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_pl.diffusion.objective import EpsWeight, UnitOutput
from diffusion_pl.diffusion.preconditioning import Karras
from diffusion_pl.diffusion.uncertainty import LearnedUncertainty
from diffusion_pl.diffusion.weights import MinSNR, SoftMinSNR, X0Weight
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.objectives.ddpm import DDPM
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.settings import TrainerConfig

F64 = torch.float64
SIGMA = torch.logspace(-2, 2, 41, dtype=F64)
SNR = SIGMA**-2


def test_min_snr_is_the_published_weight_of_every_prediction():
    # Hang 2023: min(SNR, 5) on x_0, min(SNR, 5) / SNR on eps, min(SNR, 5) / (SNR + 1) on v.
    least = torch.minimum(SNR, torch.tensor(5.0, dtype=F64))
    torch.testing.assert_close(MinSNR()(SIGMA), least * X0Weight()(SIGMA))
    torch.testing.assert_close(MinSNR()(SIGMA), least / SNR * EpsWeight()(SIGMA))
    torch.testing.assert_close(MinSNR()(SIGMA), least / (SNR + 1) * UnitOutput(1.0)(SIGMA))


def test_soft_min_snr_is_the_published_factor_on_edms_loss():
    # The published factor on the error of F is (sigma sd)^2 / (sigma^2 + sd^2)^2.
    variance = SIGMA**2 + 0.25
    factor = (SIGMA * 0.5) ** 2 / variance**2
    torch.testing.assert_close(SoftMinSNR(4.0)(SIGMA), factor * UnitOutput(0.5)(SIGMA))
    torch.testing.assert_close(SoftMinSNR(5.0)(SIGMA), 5 * SNR / (SNR + 5))


def test_the_images_own_error_weighs_one():
    assert X0Weight()(SIGMA).tolist() == [1.0] * 41


@pytest.mark.parametrize("make", [MinSNR, SoftMinSNR])
def test_a_bound_that_is_not_positive_is_refused(make):
    with pytest.raises(ValueError, match="gamma must be positive"):
        make(0.0)


def draws(count=64):
    source = torch.Generator().manual_seed(1)
    image, noise = torch.randn(2, count, 1, 4, 4, generator=source)
    return 0.5 * image, (torch.arange(count, dtype=F64) + 0.5) / count, noise


def answer(x, sigma):
    return Karras(0.5)(sigma).c_skip.to(x.dtype).reshape(-1, 1, 1, 1) * x


def learned(objective):
    torch.manual_seed(0)
    return LearnedUncertainty(objective, channels=16)


def test_the_learned_weight_begins_as_none():
    image, u, noise = draws()
    losses = learned(EDM()).loss(answer, image, u, noise)
    torch.testing.assert_close(losses, EDM().loss(answer, image, u, noise))


def test_the_learned_logarithm_rests_at_that_of_the_mean_loss():
    objective = learned(EDM())
    image, u, noise = draws()
    objective.frequency.zero_()
    objective.phase.zero_()  # u is then one number, sqrt(2) times the sum of the weights
    mean = EDM().loss(answer, image, u, noise).mean()
    with torch.no_grad():
        objective.weight.fill_(mean.log() / (math.sqrt(2) * 16))
    loss = objective.loss(answer, image, u, noise).mean()
    loss.backward()
    assert loss.item() == pytest.approx(1 + mean.log().item(), rel=1e-5)
    assert objective.weight.grad.abs().max() < 1e-5


def test_the_learned_logarithm_is_a_sum_of_fourier_features():
    objective = learned(EDM())
    with torch.no_grad():
        objective.weight.zero_()[3] = 0.7
    frequency, phase = objective.frequency[3].item(), objective.phase[3].item()
    expected = [
        0.7 * math.sqrt(2) * math.cos(2 * math.pi * (frequency * math.log(s) / 4 + phase))
        for s in SIGMA.tolist()
    ]
    assert objective.log_loss(SIGMA).tolist() == pytest.approx(expected, abs=1e-5)


def test_an_objective_with_weights_trains_and_is_kept():
    torch.manual_seed(0)
    network = SongUNet(16, model_channels=8, channel_mult=(1, 2), blocks=1, attention=())
    objective = learned(DDPM(T=10, beta_T=0.5))
    module = DiffusionModule(
        network,
        objective,
        lambda p: torch.optim.Adam(p, lr=1e-3),
        EMA(100),
        TrainerConfig(total_images=4, checkpoint_every=4),
        batch_size=4,
        resolution=16,
    )
    optimizer = module.configure_optimizers()
    shape = (4, 3, 16, 16)
    batch = {"image": torch.zeros(shape, dtype=torch.uint8), "index": torch.arange(4)}
    sum(module.losses(batch)).backward()
    optimizer.step()
    assert objective.weight.abs().max() > 0
    state = module.state_dict()
    assert torch.equal(state["objective.weight"], objective.weight)
    assert torch.equal(state["objective.frequency"], objective.frequency)
    assert not any("objective" in key for key in module.ema.state_dict())
