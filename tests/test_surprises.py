"""What the libraries that users come from do, as docs/from_*.md and docs/libraries.md say it.

One of these fails when a library has changed: mend the row that names it, and its version.
"""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

# Of numpy, in what diffusers computes when a scheduler is made.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_501_leading_steps_of_diffusers_begin_in_the_middle(name):
    scheduler = getattr(diffusers, name)()
    assert scheduler.config.timestep_spacing == "leading"
    scheduler.set_timesteps(501)
    assert scheduler.timesteps[[0, -1]].tolist() == [500, 0]
    scheduler.set_timesteps(500)
    assert scheduler.timesteps[[0, 1, -1]].tolist() == [998, 996, 0]


def test_leading_steps_of_dpm_solver_in_diffusers_divide_by_one_more():
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(500)
    assert scheduler.timesteps[[0, 1]].tolist() == [500, 499]
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps.unique().tolist() == [0]


@torch.no_grad()
def test_a_network_of_diffusers_cuts_a_time_that_is_a_number_to_an_integer():
    network = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).eval()
    x = seeded(1, 3, 8, 8)
    assert torch.equal(network(x, 0.7).sample, network(x, 0).sample)
    assert not torch.equal(network(x, torch.tensor([0.7])).sample, network(x, 0).sample)


def test_a_scheduler_from_anothers_defaults_has_its_own_and_through_a_folder_the_others(tmp_path):
    chain = diffusers.DDPMScheduler()
    assert (chain.config.beta_start, chain.config.beta_end) == (1e-4, 0.02)
    from_defaults = diffusers.HeunDiscreteScheduler.from_config(chain.config)
    assert (from_defaults.config.beta_start, from_defaults.config.beta_end) == (0.00085, 0.012)
    chain.save_pretrained(tmp_path)
    from_folder = diffusers.HeunDiscreteScheduler.from_pretrained(tmp_path)
    assert (from_folder.config.beta_start, from_folder.config.beta_end) == (1e-4, 0.02)


def test_the_average_of_diffusers_warms_up_though_told_not_to():
    average = EMAModel([nn.Parameter(torch.zeros(1))], decay=0.9999, use_ema_warmup=False)
    assert [average.get_decay(step) for step in (1, 10, 100)] == [0, 10 / 19, 100 / 109]


def test_the_distance_of_torchmetrics_resizes_otherwise_and_loses_levels():
    seen = []

    class Network(nn.Module):
        num_features = 4

        def forward(self, images):
            seen.append(images)
            return images.flatten(1)[:, :4].double()

    distance = FrechetInceptionDistance(Network(), normalize=True, input_img_size=(3, 16, 16))
    assert inspect.signature(FrechetInceptionDistance).parameters["antialias"].default is True
    distance.used_custom_model = False  # its own network, which is a download, is given bytes
    seen.clear()
    levels = torch.arange(256, dtype=torch.uint8)
    images = levels.reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    there_and_back = ((images / 127.5 - 1) + 1) / 2
    distance.update(there_and_back, real=True)
    assert (seen[0] != images)[0, 0].sum() == 63


def test_the_last_16_numbers_of_randn_depend_on_how_many_there_are():
    assert ((seeded(100) != seeded(104)[:100]).nonzero() >= 84).all()
    assert not torch.equal(seeded(100), seeded(104)[:100])
    assert torch.equal(seeded(96), seeded(112)[:96])


def test_noise_like_a_channels_last_tensor_is_other_noise():
    image = torch.zeros(2, 4, 8, 8)
    torch.manual_seed(0)
    plain = torch.randn_like(image)
    torch.manual_seed(0)
    assert not torch.equal(torch.randn_like(image.to(memory_format=torch.channels_last)), plain)


def test_bicubic_has_another_kernel_with_antialias():
    impulse = torch.zeros(1, 1, 1, 9)
    impulse[..., 4] = 1
    for antialias, a in ((False, -0.75), (True, -0.5)):
        found = F.interpolate(impulse, size=(1, 18), mode="bicubic", antialias=antialias)
        # Keys 1981 between one and two pixels off, at 1.25 of them.
        expected = a * (1.25**3 - 5 * 1.25**2 + 8 * 1.25 - 4)
        assert found[0, 0, 0, 11].item() == pytest.approx(expected, abs=1e-6)


def test_torchs_muon_decays_by_a_tenth_unless_told_and_takes_matrices_alone():
    optimizer = torch.optim.Muon([nn.Parameter(torch.ones(2, 2))])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([nn.Parameter(torch.ones(2))])


def test_a_tuple_in_omegaconf_equals_no_list():
    section = OmegaConf.create({"sizes": (64, 128)})
    assert section.sizes != [64, 128]
    assert OmegaConf.create({"sizes": [64, 128]}).sizes == [64, 128]
