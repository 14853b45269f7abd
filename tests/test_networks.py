"""Networks: published parameter counts, published outputs, and what every network promises."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from published import Fixture, ddpm_unet, song_unet

from diffusion_pl.diffusion.preconditioning import Karras
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.networks.ddpm_unet import DDPMUNet
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.objectives.ddpm import DDPM
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Sampler

CELEBA = {"channel_mult": (1, 1, 2, 2, 4, 4), "dropout": 0.0}
SMALL = {"model_channels": 16, "channel_mult": (1, 2), "blocks": 1, "attention": (8,)}
NETWORKS = {
    "ddpm++": partial(SongUNet, 16, classes=5, dropout=0.0, **SMALL),
    "ddpm": partial(DDPMUNet, 16, classes=5, dropout=0.0, groups=8, **SMALL),
}


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def awake(network):
    """Give the layers that begin near zero some weight, so that a change in them shows."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))
    return network.eval()


# Karras 2022 (measured on the released code) and Ho 2020, App. B.
@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (partial(SongUNet, 32, augment=9), 55_733_891),
        (partial(SongUNet, 32, augment=9, classes=10), 55_735_299),
        (partial(SongUNet, 64, augment=9, channel_mult=(1, 2, 2, 2)), 61_805_571),
        (partial(SongUNet, 32, channel_mult=(1, 2, 2, 2)), 61_804_419),
        (partial(DDPMUNet, 32), 35_746_307),
        (partial(DDPMUNet, 256, **CELEBA), 113_673_219),
        (partial(DDPMUNet, 256, model_channels=192, **CELEBA), 255_677_955),
    ],
)
def test_networks_have_the_published_number_of_parameters(make, parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == parameters


@pytest.fixture
def edm(parity):
    fixture = Fixture(parity / "edm_ddpmpp.npz")
    return fixture, EDM().denoiser(song_unet(fixture))


@torch.no_grad()
def test_ddpmpp_and_edm_preconditioning_are_the_published_ones(edm):
    fixture, denoiser = edm
    sigma, augment = fixture["sigma"], fixture["augment_labels"]
    level = sigma.reshape(-1, 1, 1, 1)
    raw = denoiser.network(fixture["x"], fixture["c_noise"], augment=augment)
    assert relative(raw, fixture["out/raw_output"]) < 1e-5
    denoised = denoiser(fixture["x"] * level, sigma, augment=augment)
    assert relative(denoised, fixture["out/denoised_x"]) < 1e-5
    noisy = fixture["y"] + fixture["noise"] * level
    denoised = denoiser(noisy, sigma, augment=augment)
    assert relative(denoised, fixture["out/denoised_yn"]) < 1e-5
    torch.testing.assert_close(Karras(0.5)(sigma).c_noise, fixture["c_noise"])


@torch.no_grad()
def test_the_edm_loss_is_the_published_one(edm):
    fixture, denoiser = edm
    # The quantile whose level is the fixture's.
    u = torch.special.ndtr((fixture["sigma"].double().log() + 1.2) / 1.2)
    image, noise, augment = fixture["y"], fixture["noise"], fixture["augment_labels"]
    loss = EDM().loss(denoiser, image, u, noise, augment=augment)
    assert relative(loss, fixture["out/weighted_sq_error"].sum(dim=(1, 2, 3))) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("steps", [8, 18])
def test_heun_trajectories_end_where_the_published_ones_do(edm, steps):
    fixture, denoiser = edm
    end = Sampler(heun, Rho(), steps)(denoiser, fixture["latents"], torch.zeros_like)
    assert relative(end, fixture[f"out/heun_{steps}"]) < 1e-4


@torch.no_grad()
def test_churned_trajectories_end_where_the_published_ones_do(edm):
    fixture, denoiser = edm
    churn = partial(heun, S_churn=40.0, S_tmin=0.05, S_tmax=50.0, S_noise=1.003)
    # The reference draws at every level, also at 80 where nothing is churned; ours does not.
    noise = iter(fixture["churn_noise"][1:])
    end = Sampler(churn, Rho(), 10)(denoiser, fixture["latents"], lambda like: next(noise))
    assert relative(end, fixture["out/churn_10"]) < 1e-4


@torch.no_grad()
def test_labels_enter_as_in_the_published_network(parity):
    fixture = Fixture(parity / "vp_ddpmpp_cond.npz")
    network = song_unet(fixture)
    label = fixture["class_labels"].argmax(dim=1)
    raw = network(fixture["x"], fixture["c_noise"], label=label)
    assert relative(raw, fixture["out/raw_output"]) < 1e-5
    # No label is the published all-zero one-hot, given as -1 or left out.
    none = network(fixture["x"], fixture["c_noise"], label=torch.full_like(label, -1))
    assert torch.equal(none, network(fixture["x"], fixture["c_noise"]))
    assert relative(none, raw) > 1e-3


@pytest.fixture
def ho(parity):
    fixture = Fixture(parity / "ddpm_unet.npz")
    return fixture, DDPM().denoiser(ddpm_unet(fixture))


@torch.no_grad()
def test_the_ddpm_network_and_noising_are_the_published_ones(ho):
    fixture, denoiser = ho
    t = fixture["t"]
    eps = denoiser.network(fixture["x"], t.double())
    assert relative(eps, fixture["out/eps"]) < 1e-5
    sigma = LinearBetas().sigmas()[t]
    c_in = denoiser.preconditioning(sigma).c_in
    x_t = c_in.reshape(-1, 1, 1, 1) * (fixture["y"] + sigma.reshape(-1, 1, 1, 1) * fixture["noise"])
    assert relative(x_t, fixture["out/q_sample"]) < 1e-5
    torch.testing.assert_close(denoiser.preconditioning(sigma).c_noise, t.double())


def test_the_ddpm_table_is_the_published_one(ho):
    fixture, _ = ho
    table = LinearBetas()
    torch.testing.assert_close(table.betas.float(), fixture["out/betas"])
    abar = 1 / (1 + table.sigmas().square())
    torch.testing.assert_close(abar.float(), fixture["out/alphas_cumprod"], rtol=1e-4, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("t", [0, 321, 999])
def test_clipped_posterior_means_are_the_published_ones(ho, t):
    fixture, denoiser = ho
    table = torch.cat([torch.zeros(1, dtype=torch.float64), LinearBetas().sigmas()])
    sigma, following = table[t + 1], table[t]
    row = fixture["t"].tolist().index(t)
    state = fixture["x"][row : row + 1].double() * torch.sqrt(1 + sigma**2)
    x_0 = denoiser(state, sigma)
    assert relative(x_0, fixture[f"out/x0_t{t}"]) < 1e-4
    mean = ancestral(
        lambda x, s: denoiser(x, s).clamp(-1, 1),
        state,
        torch.stack([sigma, following]),
        torch.zeros_like,
    )
    mean = mean / torch.sqrt(1 + following**2)
    assert relative(mean, fixture[f"out/posterior_mean_clipped_t{t}"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_trajectories_end_where_the_published_ones_do(ho, steps):
    fixture, denoiser = ho
    timesteps = fixture[f"out/ddim_{steps}_timesteps"]
    sigmas = torch.cat([LinearBetas().sigmas()[timesteps], torch.zeros(1, dtype=torch.float64)])
    state = fixture["latents"].double() * torch.sqrt(1 + sigmas[0] ** 2)
    end = euler(denoiser, state, sigmas)
    assert relative(end, fixture[f"out/ddim_{steps}"]) < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_label_changes_the_output_and_minus_one_is_none(name):
    network = awake(NETWORKS[name]())
    x, c_noise = torch.randn(2, 3, 16, 16), torch.tensor([0.3, -0.5])
    first = network(x, c_noise, label=torch.tensor([0, 1]))
    other = network(x, c_noise, label=torch.tensor([0, 2]))
    torch.testing.assert_close(first[0], other[0])
    assert relative(first[1], other[1]) > 1e-4
    none = network(x, c_noise, label=torch.tensor([-1, -1]))
    torch.testing.assert_close(none, network(x, c_noise))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_images_of_a_batch_do_not_see_one_another(name):
    network = awake(NETWORKS[name]())
    x, c_noise = torch.randn(3, 3, 16, 16), torch.tensor([0.3, -0.5, 0.1])
    alone = network(x[1:2], c_noise[1:2])
    torch.testing.assert_close(network(x, c_noise)[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_other_resolutions_that_the_levels_divide_are_taken(name):
    network = awake(NETWORKS[name]())
    assert network(torch.randn(1, 3, 24, 40), torch.zeros(1)).shape == (1, 3, 24, 40)
    with pytest.raises(ValueError, match=r"multiples of 2 \(got 15 x 16\)"):
        network(torch.randn(1, 3, 15, 16), torch.zeros(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_resolution_that_the_levels_do_not_divide_is_refused_at_once(name):
    with pytest.raises(ValueError, match=r"must be multiples of 2"):
        NETWORKS[name].func(15, **SMALL)


@pytest.mark.parametrize("name", NETWORKS)
def test_labels_for_a_network_without_classes_are_refused(name):
    network = NETWORKS[name](classes=0)
    with pytest.raises(ValueError, match="without classes"):
        network(torch.randn(1, 3, 16, 16), torch.zeros(1), label=torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_bf16_stays_near_float32(name):
    network = awake(NETWORKS[name]())
    x, c_noise = torch.randn(2, 3, 16, 16), torch.tensor([0.3, -0.5])
    exact = network(x, c_noise)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x, c_noise)
        embedding = network.embed(c_noise, None, None) if name == "ddpm++" else None
    assert relative(rounded, exact) < 2e-2  # bf16 has 8 bits: 4e-3 a rounding
    if embedding is not None:
        assert embedding.dtype == torch.float32


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_starts_near_zero(name):
    output = NETWORKS[name]()(torch.randn(2, 3, 16, 16), torch.zeros(2))
    assert output.abs().max() < 1e-3  # so the denoiser starts at c_skip x


def test_dropout_acts_in_training_only():
    network = awake(SongUNet(16, dropout=0.5, **SMALL))
    x, c_noise = torch.randn(1, 3, 16, 16), torch.zeros(1)
    assert torch.equal(network(x, c_noise), network(x, c_noise))
    network.train()
    assert not torch.equal(network(x, c_noise), network(x, c_noise))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_network_is_one_graph(name):
    network = awake(NETWORKS[name]())
    x, c_noise, label = torch.randn(2, 3, 16, 16), torch.zeros(2), torch.tensor([1, -1])
    # The "eager" backend traces as any other does, and a break of the graph raises.
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, c_noise, label=label), network(x, c_noise, label=label))
