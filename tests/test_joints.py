"""Single lines of networks and training that no other test would miss."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.diffusion.timesteps import CosineBetas, LinearBetas
from diffusion_pl.networks.simple_layers import Condition
from diffusion_pl.networks.uvit import UViT
from diffusion_pl.objectives.ddpm import PredictNoise
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.settings import TrainerConfig


class Passing(nn.Module):
    """A raw network that keeps what noise condition it was given."""

    classes, channels = 4, 3

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, c_noise, label=None, augment=None):
        self.c_noise = c_noise
        return self.gain * x


def test_the_cs_come_from_the_level_before_it_is_rounded():
    # A level of a table names its timestep exactly only in float64.
    for table in (LinearBetas(4000, 0.25e-4, 0.005), CosineBetas(4000)):
        network = Passing()
        denoiser = Denoiser(network, PredictNoise(table))
        sigma = table.sigmas()
        denoiser(torch.zeros(len(sigma), 1, 1, 1), sigma)
        rounded = PredictNoise(table)(sigma.float()).c_noise.float()
        exact = torch.arange(4000, dtype=torch.float32)
        assert (rounded != exact).any()  # else nothing would be seen here
        assert torch.equal(network.c_noise, exact)


class Recorded:
    """An augmentation that keeps its random numbers and changes nothing."""

    draws = 3

    def __call__(self, image, uniform):
        self.uniform = uniform
        return image, uniform


def test_labels_are_dropped_by_numbers_that_the_augmentation_does_not_see():
    augment = Recorded()
    made = DiffusionModule(
        Passing(), EDM(), partial(torch.optim.Adam, lr=1e-3), EMA(10),
        TrainerConfig(total_images=1, checkpoint_every=1, dropout={"label": 0.5}),
        batch_size=2048, resolution=4, augment=augment,
    )  # fmt: skip
    label = torch.zeros(2048, dtype=torch.long)
    _, u, _, condition = made.draw(torch.zeros(2048, 3, 4, 4), torch.arange(2048), {"label": label})
    dropped = (condition["label"] < 0).double()
    assert augment.uniform.shape == (2048, 3)
    within = u * 2048 - (u * 2048).floor()  # where in its stratum
    together = torch.stack([dropped, within, *augment.uniform.double().T])
    correlation = torch.corrcoef(together) - torch.eye(5)
    assert correlation.abs().max() < 5 / 2048**0.5


def test_a_label_weighs_as_if_its_row_of_the_unit_matrix_had_unit_variance():
    torch.manual_seed(0)
    condition = Condition(8, 16, classes=9)
    label = torch.tensor([3, 8, -1])
    noise = torch.tensor([0.1, -0.5, 2.0])
    phase = noise[:, None] * 10000 ** (-torch.arange(4) / 3)  # the last frequency is 1 / 10000
    waves = torch.cat([phase.sin(), phase.cos()], dim=1)
    vector = condition.dense1(F.silu(condition.dense0(waves)))
    rows = torch.zeros(3, 9)
    rows[0, 3] = rows[1, 8] = math.sqrt(9)
    expected = F.silu(vector + rows @ condition.label.weight.T)
    torch.testing.assert_close(condition(noise, label), expected)


def test_the_residual_uvit_has_one_skip_a_level_and_it_carries_what_was_not_halved():
    torch.manual_seed(0)
    network = UViT(
        16, model_channels=8, channel_mult=(1, 2), blocks=(1,), transformers=1, heads=2,
        embedding_channels=16, dropout=0.0, residual=True,
    )  # fmt: skip
    x = torch.zeros(1, 3, 16, 16)
    x[..., ::2, ::2], x[..., 1::2, 1::2] = 1.0, 1.0  # a checkerboard, which halving averages away
    c_noise = torch.zeros(1)
    with torch.no_grad():
        nn.init.normal_(network.head.conv.weight, std=0.1)
        smooth = network(x.mean() * torch.ones_like(x), c_noise)
        detail = network(x, c_noise)
        # With an inner level that says nothing the detail still comes through.
        assert (detail - smooth).abs().mean() > 0.01 * smooth.abs().mean()
