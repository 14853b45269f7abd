"""The kernel distance against torch-fidelity, a double loop and what unbiased means."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_metrics_fid import Known, normal, reference_of
from torch import Tensor
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_kid import kid_features_to_metric

from diffusion_pl.metrics.accumulated import Kept
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.kid import Kernel, discrepancies, discrepancy
from diffusion_pl.metrics.reference import Reference


def kept(real: Tensor, extractor: str = "shapes") -> Reference:
    return dataclasses.replace(reference_of(real, extractor), features=real)


def metric_of(drawn: Kernel, real: Tensor, count: int, name: str = "shapes") -> Kept:
    return drawn.build(Known(real.shape[1], name), kept(real, name), count)


def measure(drawn: Kernel, real: Tensor, generated: Tensor) -> tuple[float, float | None]:
    metric = metric_of(drawn, real, len(generated))
    for part in generated.split(13):
        metric.update(Features(part))
    values = metric.compute()
    return values["kd"], values.get("kd_std")


@pytest.mark.parametrize(
    ("real", "generated", "drawn"),
    [
        (60, 60, Kernel(subsets=10, size=59)),
        (90, 60, Kernel(subsets=10, size=25)),
        (60, 90, Kernel(subsets=3, size=50, seed=7)),
    ],
)
def test_mean_and_spread_are_those_of_torch_fidelity(
    real: int, generated: int, drawn: Kernel
) -> None:
    one, other = normal(real, 8, seed=1), normal(generated, 8, seed=2)
    theirs = kid_features_to_metric(
        other,
        one,
        kid_subsets=drawn.subsets,
        kid_subset_size=drawn.size,
        rng_seed=drawn.seed,
        verbose=False,
    )
    mean, spread = measure(drawn, one, other)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)


def test_the_settings_are_those_of_the_literature_and_of_torch_fidelity() -> None:
    drawn = Kernel()
    names = ("kid_subsets", "kid_subset_size", "rng_seed")
    size = drawn.size_for(50_000, 10_000)
    assert [drawn.subsets, size, drawn.seed] == [DEFAULTS[name] for name in names]
    assert (DEFAULTS["kid_kernel"], DEFAULTS["kid_kernel_poly_degree"]) == ("poly", 3)


def test_a_discrepancy_is_the_formula_term_by_term() -> None:
    one, other = normal(7, 3, seed=5), normal(7, 3, seed=6)

    def k(x: Tensor, y: Tensor) -> float:
        return (sum(float(a * b) for a, b in zip(x, y, strict=True)) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(k(x[i], x[j]) for x in (one, other) for i, j in pairs if i != j) / 42
    between = sum(k(one[i], other[j]) for i, j in pairs) / 49
    assert discrepancy(one, other) == pytest.approx(within - 2 * between, rel=1e-12)


def test_sets_of_one_distribution_are_at_zero_on_average_and_others_are_not() -> None:
    generator = torch.Generator().manual_seed(7)
    equal, other = [], []
    for _ in range(500):
        x, y = torch.randn(2, 10, 4, generator=generator, dtype=torch.float64)
        equal.append(discrepancy(x, y))
        other.append(discrepancy(x, y + 0.5))
    for values, near in ((torch.tensor(equal), True), (torch.tensor(other), False)):
        mean, error = values.mean().item(), values.std().item() / len(values) ** 0.5
        assert (abs(mean) < 2 * error) is near, (mean, error)
    assert min(equal) < 0 < max(equal)


def test_every_subset_is_drawn_without_repeating_an_image() -> None:
    # All of a set, in any order: what repeats an image cannot give the same value each time.
    one, other = normal(30, 4, seed=8), normal(30, 4, seed=9)
    values = discrepancies(one, other, subsets=5, size=30, seed=0)
    assert values == pytest.approx([discrepancy(one, other)] * 5, rel=1e-9)
    fewer = discrepancies(one, other, subsets=5, size=10, seed=0)
    assert len(set(fewer)) == 5


def test_single_precision_features_are_measured_in_double() -> None:
    one, other = (normal(40, 4, seed=seed).float() + 30 for seed in (10, 11))
    drawn = Kernel(subsets=2, size=20)
    assert measure(drawn, one, other) == measure(drawn, one.double(), other.double())


def test_only_with_the_published_inception_it_is_called_kid() -> None:
    real = normal(20, 4, seed=12)
    for name, key in (("inception", "kid"), ("inception-01234567", "kd"), ("shapes", "kd")):
        metric = metric_of(Kernel(subsets=2, size=5), real, 20, name)
        metric.update(Features(real))
        assert list(metric.compute()) == [key, f"{key}_std"]


@pytest.mark.parametrize(
    ("drawn", "generated", "real"),
    [
        (Kernel(size=20), 20, 20),
        (Kernel(size=20), 20, 40),
        (Kernel(size=20), 40, 20),
        (Kernel(subsets=1, size=5), 20, 20),
        (Kernel(subsets=1), 20, 20),
    ],
)
def test_subsets_that_cannot_vary_have_no_spread(drawn: Kernel, generated: int, real: int) -> None:
    one, other = normal(real, 4, seed=1), normal(generated, 4, seed=2)
    mean, spread = measure(drawn, one, other)
    assert spread is None
    if generated == real == drawn.size:
        assert mean == pytest.approx(discrepancy(other, one), rel=1e-9)


@pytest.mark.parametrize(
    ("generated", "real", "size"),
    [(320, 320, 160), (320, 50_000, 160), (50_000, 7, 3), (1999, 5000, 999), (4, 4, 2)],
)
def test_a_subset_is_half_of_the_smaller_set_or_the_literatures(
    generated: int, real: int, size: int
) -> None:
    assert Kernel().size_for(generated, real) == size
    Kernel().check_count(generated, real)


def test_the_spread_of_as_many_drawn_as_real_is_that_of_halves() -> None:
    # The variance of subsets of m of n is about (1 / m - 1 / n) / (1 / m) of that of fresh sets.
    generator = torch.Generator().manual_seed(3)
    one, other = torch.randn(2, 320, 6, generator=generator, dtype=torch.float64)
    other += 0.3
    mean, spread = measure(Kernel(), one, other)
    pairs = torch.randn(200, 2, 160, 6, generator=generator, dtype=torch.float64)
    fresh = [discrepancy(x, y + 0.3) for x, y in pairs]
    assert spread is not None
    expected = torch.tensor(fresh).std().item() * 0.5**0.5
    assert expected / 1.5 < spread < expected * 1.5
    assert mean == pytest.approx(discrepancy(other, one), abs=spread)
    metric = metric_of(Kernel(), one, 320)
    assert metric.notes == {"subsets": 100, "subset_size": 160}


def test_what_cannot_be_measured_is_refused() -> None:
    real, extractor = normal(20, 4, seed=13), Known(4)
    for drawn, count, expected in (
        (Kernel(size=21), 30, r"subsets of 21 need as many images \(got 30 gen.*, 20 real\)"),
        (Kernel(size=20), 19, r"subsets of 20 need as many images \(got 19 gen.*, 20 real\)"),
        (Kernel(), 3, r"needs at least 4 images on either side \(got 3 gen.*, 20 real\)"),
        (Kernel(size=1), 20, "needs a subset, and two images in it"),
        (Kernel(subsets=0, size=5), 20, "needs a subset, and two images in it"),
    ):
        with pytest.raises(ValueError, match=expected):
            metric_of(drawn, real, count)
    small = Kernel(subsets=1, size=2)
    with pytest.raises(ValueError, match="kernel distance: needs a reference"):
        small.build(extractor, None, 20)
    with pytest.raises(ValueError, match="kernel distance: reference .* has moments only"):
        small.build(extractor, reference_of(real), 20)
    with pytest.raises(ValueError, match="extractor is shapes, the evaluation has pixels"):
        small.build(Known(4, "pixels"), kept(real), 20)
    metric_of(small, real, 2)


def test_features_that_are_not_finite_are_refused() -> None:
    metric = metric_of(Kernel(subsets=1, size=5), normal(20, 4, seed=14), 20)
    metric.update(Features(torch.full((20, 4), torch.inf)))
    with pytest.raises(ValueError, match="not finite"):
        metric.compute()
