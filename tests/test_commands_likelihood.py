"""`likelihood` as a user types it, against exact densities; and what decides its number."""

from __future__ import annotations

import math
from pathlib import Path

import homes
import pytest
import torch
from analytic import Mixture
from test_commands_models import TINY

from diffusion_pl.commands import runs
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.classifier_free import conditioned
from diffusion_pl.diffusion.objective import trained_range
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.objectives.ddpm import DDPM, DDPMBound
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.objectives.improved_ddpm import ImprovedDDPM, ImprovedDDPMBound
from diffusion_pl.objectives.likelihood import chain_of, variational_bound
from diffusion_pl.objectives.rectified_flow import RectifiedFlow
from diffusion_pl.objectives.vp import VP
from diffusion_pl.samplers.flow_likelihood import refined

F64 = torch.float64
DATA = Mixture()
# A network under EDM's preconditioning that makes D the exact posterior mean of the mixture.
NETWORK = """
import torch
from torch import nn

CENTRES, STD = (-0.8, 0.1, 0.7), 0.1

class Exact(nn.Module):
    classes, channels = 0, 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def check_resolution(self, height, width):
        if height != 8:
            raise ValueError(f"only of 8 pixels (got {height})")

    def forward(self, x, c_noise, **condition):
        sigma = torch.exp(4 * c_noise.double()).reshape(-1, 1, 1, 1)
        whole = torch.sqrt(sigma**2 + 0.25)
        noisy = x.double() * whole
        variance = (STD**2 + sigma**2)[..., None]
        offset = noisy[..., None] - noisy.new_tensor(CENTRES)
        share = torch.softmax(-(offset**2) / (2 * variance), dim=-1)
        mean = (share * (noisy.new_tensor(CENTRES) + STD**2 / variance * offset)).sum(-1)
        told = (mean - 0.25 / whole**2 * noisy) * whole / (sigma * 0.5)
        return told.float() + 0 * self.weight
"""
EXACT = """# The exact denoiser of a mixture (no published number)
defaults: base
data:
  dataset: {_target_: diffusion_pl.data.synthetic.Synthetic, count: 40, resolution: 8}
  batch_size: 8
network: {_target_: exact_network.Exact}
objective: {_target_: diffusion_pl.objectives.edm.EDM}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20}
sampler: {steps: 18, schedule: {sigma_min: 0.02, sigma_max: 15.0}}
features: {name: shapes}
evaluation: {every: 1000, count: 4, batch_size: 4, grid: 4, metrics: []}
trainer: {total_images: 8, checkpoint_every: 8, log_every: 8, accelerator: cpu, precision: fp32,
  loggers: []}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of the exact denoiser, and one of a table of timesteps with classes."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        (folder / "exact_network.py").write_text(NETWORK)
        homes.trained(folder, TINY)
        patch.chdir(folder)
        Path("experiments/exact.yaml").write_text(EXACT)
        from diffusion_pl.cli import main

        assert main(["train", "exact"]) == 0
    return folder


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    return homes.answering(capsys)


def refused(run, *words):
    code, result, err = run("likelihood", *words)
    assert (code, result) == (2, None), err
    assert err.count("\n") == 1 and err.startswith("error: ")
    return err


def images(count):
    return Synthetic(40, 8).open().read(torch.arange(count)).to(F64) / 127.5 - 1


def log_density(x, sigma):
    """Of the mixture at a noise level, by pixel."""
    std = math.hypot(DATA.std, sigma)
    z = (x[..., None] - x.new_tensor(DATA.centres)) / std
    inside = -z.square() / 2 - math.log(std * math.sqrt(2 * math.pi) * len(DATA.centres))
    return torch.logsumexp(inside, dim=-1)


def exact_bits(count, low, high, prior_std, seed=0):
    """Bits per dimension of the first images: the flow's exact end under the prior, and its volume.

    Between two levels of the exact flow the volume changes as the densities there do.
    """
    inside = torch.special.ndtr(ImageNoise(seed, range(count), "bins")(images(count)))
    x = images(count) + (inside - 0.5) / 127.5
    end = DATA.flow(x, low, high)
    prior = -(end**2) / (2 * prior_std**2) - math.log(prior_std * math.sqrt(2 * math.pi))
    nats = prior + log_density(x, low) - log_density(end, high)
    return float(-nats.mean() / math.log(2) + math.log2(127.5))


WORDS = ("runs/exact", "--allow", "exact_network", "--count", 6)


def test_the_flow_meets_the_exact_density_within_its_stated_error(run):
    """Of independent pixels a probe of +-1 is exact, so that the grid is all that errs."""
    code, row, err = run("likelihood", *WORDS)
    assert code == 0 and "->" not in err, err
    low, high = trained_range(EDM())
    assert row["sigma"] == pytest.approx([low, high])
    assert low < 0.002 and high > 80  # the run's sampler visits 0.02 to 15
    assert row["prior_std"] == high
    found, expected = row["bits_per_dim"], exact_bits(6, low, high, high)
    assert row["steps_error"] < min(row["standard_error"], 0.01)
    assert abs(found - expected) < row["steps_error"]
    assert row["evaluations"] == 2 * row["steps"] >= 256
    # And the sampler's own number of steps and range would not have done.
    code, coarse, err = run("likelihood", *WORDS, "--steps", 18)
    assert code == 0 and coarse["steps"] == 18
    assert abs(coarse["bits_per_dim"] - expected) > 0.05
    assert coarse["steps_error"] > 0.05 and "use --steps 36" in err


@pytest.mark.parametrize(
    "words",
    [("--sampler", "ancestral"), ("--set", "sampler.steps=3"),
     ("--set", "sampler.schedule.sigma_max=1.0"), ("--set", "sampler.clip_denoised=true")],
)  # fmt: skip
def test_no_sampler_changes_the_likelihood(run, words):
    first, again = (run("likelihood", *WORDS, "--steps", 8, *more)[1] for more in ((), words))
    assert first["bits_per_dim"] == again["bits_per_dim"]


def test_the_grid_is_no_table_of_timesteps(run):
    """24 steps where the run's sampler has 20 levels in all."""
    code, row, err = run("likelihood", "runs/tiny", "--count", 1, "--steps", 24)
    assert (code, row["steps"]) == (0, 24), err
    assert row["sigma"] == pytest.approx(list(LinearBetas(20, 1e-3, 0.4).sigma_range))


def test_the_prior_is_the_runs_start_at_the_networks_highest_level(run):
    narrow = ("--set", "objective.P_mean=-3.0", "--set", "objective.P_std=0.6")
    low, high = trained_range(EDM(-3.0, 0.6))
    assert high < 1
    for unit, std in (("false", high), ("true", math.sqrt(1 + high**2))):
        words = (*WORDS, *narrow, "--set", f"sampler.unit_start={unit}", "--steps", 128)
        words = (*words, "--set", "sampler.schedule={sigma_min: 0.02, sigma_max: 0.5}")
        code, row, err = run("likelihood", *words)
        assert code == 0, err
        assert row["prior_std"] == pytest.approx(std)
        assert row["bits_per_dim"] == pytest.approx(exact_bits(6, low, high, std), abs=2e-3)


def test_the_bins_noise_is_the_images_own_whatever_its_batch(run):
    words = (*WORDS, "--steps", 8)
    whole = run("likelihood", *words)[1]["bits_per_dim"]
    for size in (1, 4):
        parts = run("likelihood", *words, "--batch-size", size)[1]["bits_per_dim"]
        assert parts == pytest.approx(whole, rel=1e-9)
    assert run("likelihood", *words, "--seed", 1)[1]["bits_per_dim"] != pytest.approx(
        whole, rel=1e-6
    )


@pytest.mark.parametrize(
    ("objective", "low", "high"),
    [
        (EDM(), math.exp(-1.2 - 1.2 * 4.7534243), math.exp(-1.2 + 1.2 * 4.7534243)),
        (DDPM(), 0.0100005, 157.4066),
        (VP(), *VP().preconditioning.sigma_range),
        (RectifiedFlow(), 1.0099e-4, 9900.0),
    ],
)
def test_the_range_is_all_that_the_network_knows(objective, low, high):
    assert trained_range(objective) == pytest.approx((low, high), rel=2e-3)


def test_steps_are_doubled_until_the_change_is_small_enough():
    asked = []

    def measure(steps):
        asked.append(steps)
        return torch.tensor([1.0 + 64 / steps, 3.0 + 64 / steps])

    found = refined(measure, lambda value: 0.2)
    assert (asked, found.steps, found.change) == ([64, 128, 256, 512], 512, pytest.approx(0.125))
    asked.clear()
    assert refined(measure, lambda value: 0.0, first=2, most=8).steps == 8
    assert asked == [2, 4, 8]


# --- the bound ------------------------------------------------------------------------------------


def bound_bits(count, variance, clip=True):
    model = runs.open_model(Path("runs/tiny"))
    labels = Synthetic(40, 8).open().labels[:count]
    bound = variational_bound(
        conditioned(model.denoiser, label=labels), images(count).float(),
        LinearBetas(20, 1e-3, 0.4), ImageNoise(0, range(count), "bound"), variance=variance,
        clip=clip,
    )  # fmt: skip
    return float(bound.total.mean())


@pytest.mark.parametrize("words", [(), ("--sampler", "heun"), ("--sampler", "ancestral"),
                                   ("--set", "sampler.integrate.variance=small"),
                                   ("--set", "sampler.clip_denoised=false")])  # fmt: skip
def test_the_bound_is_of_the_objectives_chain_whatever_draws(run, words):
    code, row, err = run("likelihood", "runs/tiny", "--count", 4, "--by", "bound", *words)
    assert code == 0, err
    assert (row["variance"], row["clip"], row["timesteps"]) == ("large", True, 20)
    assert row["bits_per_dim"] == pytest.approx(bound_bits(4, "large"), rel=1e-5)
    assert bound_bits(4, "large") != pytest.approx(bound_bits(4, "large", clip=False), rel=1e-3)


def test_an_objectives_own_chain_decides_or_the_command_line(run):
    words = ("likelihood", "runs/tiny", "--count", 4, "--by", "bound")
    table = "T: 20, beta_1: 1e-3, beta_T: 0.4"
    chain = f"{{_target_: diffusion_pl.objectives.ddpm.DDPMBound, {table}, variance: small}}"
    _, row, err = run(*words, "--set", f"objective={chain}")
    assert row["variance"] == "small", err
    assert row["bits_per_dim"] == pytest.approx(bound_bits(4, "small"), rel=1e-5)
    assert bound_bits(4, "small") != pytest.approx(bound_bits(4, "large"), rel=1e-3)
    assert run(*words, "--variance", "small")[1]["bits_per_dim"] == row["bits_per_dim"]
    code, _, err = run(*words, "--variance", "learned")
    assert code == 2 and "the network gives no variance" in err


def test_the_chain_of_an_objective():
    assert chain_of(DDPMBound(T=10, variance="small")).variance == "small"
    assert chain_of(ImprovedDDPM(10)).variance == "learned"
    assert chain_of(ImprovedDDPMBound(10)).variance == "learned"
    assert chain_of(DDPM(10)) is None and chain_of(EDM()) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("runs/tiny", "--guidance", 2), "--guidance: a guided model has no likelihood"),
        (("runs/tiny", "--guide", "runs/tiny"), "--guide: a guided model has no likelihood"),
        (("runs/tiny", "--guidance-interval", "1,2"), "--guidance-interval: a guided model has no"),
        (("runs/tiny", "--by", "bound", "--steps", 3), "--steps: the bound visits every timestep"),
        (("runs/tiny", "--by", "bound", "--probes", 3), "--probes: the bound has no trace"),
        (("runs/tiny", "--variance", "small"), "--variance: the flow has none"),
        (("runs/tiny", "--steps", 1), "--steps must be at least 2"),
        (("runs/tiny", "--count", 0), "--count must be positive"),
        ((*WORDS, "--by", "bound"), "the run's objective has no discrete timesteps"),
        ((*WORDS, "--set", "data.dataset.resolution=16"), "only of 8 pixels (got 16)"),
        (
            ("runs/tiny", "--count", 4, "--set", "data.dataset.shapes=[disc, square]"),
            "has 2 classes, and the model 8",
        ),
    ],
)
def test_what_has_no_likelihood_is_one_line(run, words, message):
    assert message in refused(run, *words)
