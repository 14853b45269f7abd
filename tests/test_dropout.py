"""Dropout's masks belong to the images: any cut of a batch, any number of devices has the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from diffusion_pl.networks.adm import ADM
from diffusion_pl.networks.ddpm_unet import DDPMUNet
from diffusion_pl.networks.dropout import PLACES, Dropout
from diffusion_pl.networks.edm2_unet import EDM2UNet
from diffusion_pl.networks.linear_unet import LinearUNet
from diffusion_pl.networks.simple_unet import SimpleUNet
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.networks.uvit import UViT
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.training.counted import CountedRandomness
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.settings import TrainerConfig

NETWORKS = {
    "song": partial(SongUNet, model_channels=8, channel_mult=(1, 2), blocks=1, attention=(8,)),
    "ddpm": partial(
        DDPMUNet, model_channels=8, channel_mult=(1, 2), blocks=1, attention=(8,), groups=4
    ),
    "adm": partial(ADM, model_channels=8, channel_mult=(1, 2), blocks=1, attention=(8,)),
    "edm2": partial(EDM2UNet, model_channels=8, channel_mult=(1, 2), blocks=1, attention=()),
    "simple": partial(
        SimpleUNet, model_channels=8, channel_mult=(1, 2), blocks=(1, 1), attention=(8,), heads=1,
        embedding_channels=16,
    ),
    "linear": partial(
        LinearUNet, model_channels=8, channel_mult=(1, 2), heads=1, head_channels=4, memories=1
    ),
    "uvit": partial(
        UViT, model_channels=8, channel_mult=(1, 2), blocks=(1,), transformers=2, heads=2,
        embedding_channels=16,
    ),
}  # fmt: skip


def module(name="song", *, dropout=0.3, seed=0, **settings):
    torch.manual_seed(0)
    network = NETWORKS[name](16, dropout=dropout).to(memory_format=torch.channels_last)
    for parameter in network.parameters():  # layers that begin near zero would hide the masks
        nn.init.normal_(parameter, std=0.2)
    return DiffusionModule(
        network,
        EDM(),
        partial(torch.optim.Adam, lr=1e-3),
        EMA(10),
        TrainerConfig(total_images=1, checkpoint_every=1, **settings),
        batch_size=8,
        resolution=16,
        seed=seed,
    )


IMAGE = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()


def losses(made, first=0, count=8):
    """Of some images of the step."""
    index = torch.arange(first, first + count)
    batch = {"image": IMAGE[index % 8], "index": index}
    return torch.cat(list(made.image_losses(batch))).detach()


@pytest.mark.parametrize("name", NETWORKS)
def test_neither_the_cut_into_passes_nor_that_onto_devices_changes_what_is_dropped(name):
    whole = losses(module(name))
    for limit in (1, 3, 4):
        torch.manual_seed(limit)  # torch's own generator has no part in it
        torch.testing.assert_close(
            losses(module(name, device_batch_size=limit)), whole, rtol=2e-5, atol=0
        )
    made = module(name)
    shares = [losses(made, first, 4) for first in (0, 4)]
    torch.testing.assert_close(torch.cat(shares), whole, rtol=2e-5, atol=0)
    # And something is dropped, differently by the seed.
    without, other = losses(module(name, dropout=0.0)), losses(module(name, seed=1))
    assert ((without - whole).abs() > 4e-5 * whole).sum() >= 7
    assert ((other - whole).abs() > 4e-5 * whole).sum() >= 7


def test_a_block_that_is_run_again_in_the_backward_pass_drops_the_same():
    gradients = []
    for activation_checkpointing in (False, True):
        made = module("uvit")
        made.denoiser.network.activation_checkpointing = activation_checkpointing
        losses_of = made.image_losses({"image": IMAGE, "index": torch.arange(8)})
        next(losses_of).sum().backward()
        gradients.append([parameter.grad for parameter in made.denoiser.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


class Layers(nn.Module):
    """Two layers of dropout and nothing else."""

    def __init__(self, p=0.3):
        super().__init__()
        self.first, self.second = Dropout(p), Dropout(p)


def kept(positions, seed=0, p=0.3, shape=(16, 8, 8)):
    """What each layer keeps of images full of ones, (layers, B, C, H, W)."""
    layers = Layers(p)
    CountedRandomness(layers, seed).begin(torch.as_tensor(positions), torch.device("cpu"))
    ones = torch.ones(len(positions), *shape)
    return torch.stack([layers.first(ones), layers.second(ones)])


def test_units_are_dropped_with_their_probability_and_independently():
    n = 4000
    values = kept(range(n), shape=(4, 2, 2))
    assert values.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    dropped = (values == 0).double()
    # Within 5 standard errors of a binomial share.
    assert dropped.mean().item() == pytest.approx(0.3, abs=5 * (0.21 / dropped.numel()) ** 0.5)
    units = dropped.transpose(1, 0).reshape(n, -1)  # both layers' 32 units, over the images
    assert (units.mean(0) - 0.3).abs().max() < 5 * (0.21 / n) ** 0.5
    correlation = torch.corrcoef(units.T) - torch.eye(32)
    assert correlation.abs().max() < 5.5 / n**0.5
    # Images beside one another have nothing in common either.
    after = torch.corrcoef(torch.cat([units[:-1], units[1:]], dim=1).T)[:32, 32:]
    assert after.abs().max() < 5.5 / n**0.5


def test_a_mask_is_the_images_and_the_seeds_own_wherever_it_stands_in_the_batch():
    whole = kept([5, 6, 7])
    assert torch.equal(kept([7, 5]), whole[:, [2, 0]])
    for other in (kept([5], seed=1)[:, 0], kept([4])[:, 0], whole[[1, 0], 0]):
        assert not torch.equal(other, whole[:, 0])
    # In either order of memory.
    layer = Dropout(0.5)
    layer.begin(torch.rand(2 * PLACES) > 0.5, torch.tensor([0, 9]))
    x = torch.randn(2, 5, 3, 4)
    assert torch.equal(layer(x), layer(x.contiguous(memory_format=torch.channels_last)))


def test_a_batch_seen_twice_has_its_masks_twice_and_another_one_is_refused():
    layer = Dropout(0.5)
    layer.begin(torch.rand(2 * PLACES) > 0.5, torch.tensor([0, 9]))
    once = layer(torch.ones(2, 3, 4, 4))
    assert torch.equal(layer(torch.ones(4, 3, 4, 4)), torch.cat([once, once]))
    with pytest.raises(ValueError, match="masks for 2 images .got 3"):
        layer(torch.ones(3, 3, 4, 4))


def test_more_units_than_places_are_dropped_too():
    layer = Dropout(0.25)
    row = torch.rand(PLACES, generator=torch.Generator().manual_seed(0)) >= 0.25
    layer.begin(row.repeat(2), torch.tensor([3]))
    out = layer(torch.ones(1, 1, PLACES + 5))[0, 0] > 0
    assert torch.equal(out, torch.cat([row[3:], row[:3], row[3:8]]))


def test_nothing_is_dropped_in_evaluation_or_at_probability_0():
    x = torch.ones(2, 4, 4, 4)
    layer = Dropout(0.5)
    layer.begin(torch.zeros(2 * PLACES, dtype=torch.bool), torch.tensor([0, 1]))
    assert not layer(x).any()
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
            Dropout(p)


def test_without_a_run_the_masks_are_torchs_own():
    x = torch.ones(2, 4, 4, 4)
    torch.manual_seed(3)
    expected = nn.functional.dropout(x, 0.4)
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.4)(x), expected)


def test_dropout_that_is_not_counted_is_named(caplog):
    CountedRandomness(nn.ModuleDict({"late": nn.Sequential(nn.Dropout(0.1))}), 0)
    [told] = caplog.messages
    assert (
        "late.0 draws new masks in each forward pass" in told and "networks.dropout.Dropout" in told
    )
    caplog.clear()
    CountedRandomness(nn.ModuleDict({"late": nn.Dropout(0.0), "own": Dropout(0.1)}), 0)
    assert not caplog.records


class Foreign(nn.Module):
    """A raw network with torch's own dropout."""

    classes, channels = 0, 3

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.late = nn.Dropout(0.5)

    def forward(self, x, c_noise):
        return self.late(self.conv(x))


def test_other_dropout_is_drawn_anew_for_every_step_and_the_same_when_a_step_is_made_again():
    torch.manual_seed(0)
    settings = TrainerConfig(total_images=1, checkpoint_every=1)
    made = DiffusionModule(
        Foreign(), EDM(), partial(torch.optim.Adam, lr=1e-3), EMA(10), settings,
        batch_size=8, resolution=16,
    )  # fmt: skip
    masks = []
    made.denoiser.network.late.register_forward_hook(
        lambda module, inputs, output: masks.append(output == 0)
    )
    for first in (0, 0, 8):
        losses(made, first)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
