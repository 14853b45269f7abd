"""Guidance: which models are asked, at which levels, and how their answers are put together."""

from __future__ import annotations

import pytest
import torch
from analytic import Gaussian
from torch import nn

from diffusion_pl.diffusion.classifier_free import classifier_free, conditioned
from diffusion_pl.diffusion.guidance import (
    Guide,
    autoguided,
    guided,
    within,
)
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.recording import Counted, Recorded
from diffusion_pl.diffusion.schedules import Rho, levels
from diffusion_pl.evaluation import ImageGenerator
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Sampler

F64 = torch.float64
GOOD, BAD = Gaussian(0.2, 0.5), Gaussian(-0.1, 0.8)
X = torch.linspace(-3, 3, 8, dtype=F64).reshape(2, 1, 2, 2)


def answers(label_or_none):
    """A model of two classes around different means; label -1 knows neither."""

    def denoise(x, sigma, label=None):
        label = torch.full((len(x),), -1) if label is None else label
        assert len(label) == len(x)
        mean = torch.tensor([0.5, -0.5, 0.0], dtype=x.dtype)[label].reshape(-1, 1, 1, 1)
        return mean + Gaussian(0.0, 0.3).denoise(x - mean, sigma)

    return denoise


def test_autoguidance_extrapolates_from_the_guide_to_the_model():
    sigma = torch.tensor(0.7, dtype=F64)
    answer = autoguided(GOOD.denoise, BAD.denoise, weight=1.7)(X, sigma)
    good, bad = GOOD.denoise(X, sigma), BAD.denoise(X, sigma)
    torch.testing.assert_close(answer, 1.7 * good - 0.7 * bad)


@pytest.mark.parametrize(
    ("sigma", "strong"), [(0.1, False), (0.28, False), (0.281, True), (2.9, True), (2.91, False)]
)
def test_the_interval_is_open_below_and_closed_above(sigma, strong):
    guide = within(lambda x, s: x * 0 + 1, lambda x, s: x * 0, (0.28, 2.9))
    assert bool(guide(X, torch.tensor(sigma, dtype=F64)).mean() == 1) is strong


def test_the_published_interval_guides_the_published_steps():
    """Kynkaanniemi 2024, released setting for EDM2-XXL: steps 17 to 22 of 32, both included."""
    sigmas = levels(Rho(), 32)[:-1]
    guided_steps = [i for i, sigma in enumerate(sigmas.tolist()) if 0.28 < sigma <= 1.61]
    assert guided_steps == list(range(17, 23))


def test_levels_of_one_batch_may_differ():
    guide = within(lambda x, s: x * 0 + 1, lambda x, s: x * 0, (0.5, 2.0))
    answer = guide(X, torch.tensor([1.0, 3.0], dtype=F64))
    assert answer[0].mean() == 1 and answer[1].mean() == 0


def test_each_guidance_costs_what_it_asks_of_the_networks():
    main, weak = Counted(answers(None)), Counted(answers(None))
    label, sigma = torch.tensor([0, 1]), torch.tensor(1.0, dtype=F64)
    cost = []
    for options in (
        {"weight": 1.0},
        {"weight": 2.0},
        {"weight": 2.0, "interval": (1.0, 5.0)},
        {"weight": 2.0, "guide": weak},
    ):
        main.seen = weak.seen = 0
        guided(main, condition={"label": label}, **options)(X, sigma)
        cost.append((main.seen / 2, weak.seen / 2))
    assert cost == [(1, 0), (2, 0), (1, 0), (1, 1)]


def test_guide_and_model_see_the_same_label():
    label, sigma = torch.tensor([0, 1]), torch.tensor(1.0, dtype=F64)
    denoise = answers(None)
    # A guide as good as the model changes nothing, whatever the weight.
    same = guided(denoise, condition={"label": label}, weight=3.0, guide=denoise)(X, sigma)
    torch.testing.assert_close(same, conditioned(denoise, label=label)(X, sigma))


def test_a_model_without_classes_is_guided_by_a_weaker_one():
    sigma = torch.tensor(0.7, dtype=F64)
    answer = guided(GOOD.denoise, condition={}, weight=2.0, guide=BAD.denoise)(X, sigma)
    expected = 2 * GOOD.denoise(X, sigma) - BAD.denoise(X, sigma)
    torch.testing.assert_close(answer, expected)


def test_the_variance_stays_that_of_the_conditional_model():
    def denoise(x, sigma, label, variance=True):
        own = label.reshape(-1, 1, 1, 1).to(x.dtype).expand_as(x)
        return torch.cat([own, 10 + own], dim=1)

    label = torch.tensor([3, 5])
    both = classifier_free(denoise, condition={"label": label}, weight=2.0)(
        X, torch.tensor(1.0), variance=True
    )
    assert both[:, :1].amax(dim=(1, 2, 3)).tolist() == [7, 11]  # -1 + 2 (3 + 1)
    assert both[:, 1:].amax(dim=(1, 2, 3)).tolist() == [13, 15]


@pytest.mark.parametrize("interval", [(2.9, 0.28), (1.0, 1.0), (-1.0, 1.0)])
def test_an_interval_upside_down_is_refused(interval):
    with pytest.raises(ValueError, match="needs 0 <= low < high"):
        within(GOOD.denoise, GOOD.denoise, interval)


class Plain(nn.Module):
    """A raw network of any classes."""

    def __init__(self, classes=0, channels=3, divisor=2):
        super().__init__()
        self.classes, self.channels, self.divisor = classes, channels, divisor
        self.gain = nn.Parameter(torch.tensor(0.3))

    def check_resolution(self, height, width):
        if height % self.divisor:
            raise ValueError(f"must be multiples of {self.divisor}")

    def forward(self, x, c_noise, label=None):
        return self.gain * x


def generator(**options):
    return ImageGenerator(
        Denoiser(Plain(), Karras(0.5)), Sampler(heun, Rho(), 4), (3, 6, 6), **options
    )


@pytest.mark.parametrize(
    ("network", "weight", "message"),
    [
        (Plain(), 1.0, "does nothing at guidance 1"),
        (Plain(classes=4), 2.0, "it has channels 3, classes 4, the model channels 3"),
        (Plain(channels=1), 2.0, "it has channels 1, the model channels 3"),
        (Plain(divisor=4), 2.0, "must be multiples of 4"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(network, weight, message):
    with pytest.raises(ValueError, match=f"runs/bad: .*{message}"):
        generator(guidance=weight, guide=Guide("runs/bad", Denoiser(network, Karras(0.5))))


def test_images_drawn_with_a_guide_cost_both_networks():
    guide = Guide("runs/bad", Denoiser(Plain(), Karras(0.5)))
    plain, seven = generator().images([0, 1])
    images, evaluations = generator(guidance=3.0, guide=guide).images([0, 1])
    assert (seven, evaluations) == (7, 14)  # 2 x 4 - 1 of each
    assert torch.equal(images, plain)  # the same weights: nothing to extrapolate
    first = generator(guidance=3.0, guide=guide, guidance_interval=(1.0, 1e9)).images([0, 1])[1]
    above = sum(sigma > 1 for sigma in levels(Rho(), 4).tolist())
    assert first == 7 + 2 * above - 1  # Heun asks twice at every level but the first


def test_what_the_network_denoised_is_recorded_at_the_chosen_levels():
    sigmas = levels(Rho(), 8)
    recorded = Recorded(GOOD.denoise, [float(sigmas[0]), 1.0, float(sigmas[-2])])
    start = 80.0 * ImageNoise(0, range(2))(torch.empty(2, 1, 2, 2, dtype=F64))
    euler(recorded, start, sigmas)
    # Asked for 1.0, what the first level at or below it showed.
    visited = sigmas.tolist()
    for image, sigma in zip(
        recorded.images, [visited[0], next(s for s in visited if s <= 1), visited[-2]], strict=True
    ):
        state = euler(GOOD.denoise, start, sigmas[: visited.index(sigma) + 1])
        torch.testing.assert_close(image, GOOD.denoise(state, torch.tensor(sigma, dtype=F64)))
