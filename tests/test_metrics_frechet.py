"""The Fréchet distance against closed forms, scipy, torch-fidelity and exact arithmetic."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.utilities import dim_zero_sum

from diffusion_pl.metrics import frechet, shapes
from diffusion_pl.metrics.accumulated import FrechetDistance
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.frechet import Frechet
from diffusion_pl.metrics.reference import Reference


def normal(count: int, dimension: int, seed: int) -> Tensor:
    """Correlated features with unequal scales, float64 (count, dimension)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -2, dimension, dtype=torch.float64)
    values = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return values @ (mixing * scales) + torch.randn(dimension, generator=generator)


def white(count: int, dimension: int, seed: int) -> Tensor:
    """Values whose sample mean is 0 and sample covariance is the identity, but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(values - values.mean(dim=0)).Q * math.sqrt(count - 1)


def reference_of(real: Tensor, extractor: str = "shapes") -> Reference:
    return Reference(
        name="real",
        fingerprint="f",
        resolution=32,
        count=len(real),
        extractor=extractor,
        digest="0" * 12,
        resize="none",
        mean=real.mean(dim=0),
        covariance=real.T.cov(),
    )


def measure(real: Tensor, generated: Tensor, batch: int = 1000) -> float:
    metric = FrechetDistance(reference_of(real))
    for part in generated.split(batch):
        metric.update(Features(part, torch.empty(0)))
    return metric.compute()["fd"]


def exact(real: Tensor, generated: Tensor) -> float:
    """From the features themselves: the trace of the root is the nuclear norm of X1 X2^T.

    Singular values carry no square root of a rounding error, so this holds at any rank.
    """
    x, y = real - real.mean(dim=0), generated - generated.mean(dim=0)
    n, m = len(x) - 1, len(y) - 1
    root = torch.linalg.matrix_norm(x @ y.T, "nuc") / math.sqrt(n * m)
    difference = (real.mean(dim=0) - generated.mean(dim=0)).square().sum()
    return (difference + x.square().sum() / n + y.square().sum() / m - 2 * root).item()


def fidelity(real: Tensor, generated: Tensor) -> float:
    one, two = (fid_features_to_statistics(values) for values in (real, generated))
    return fid_statistics_to_metric(one, two, False)["frechet_inception_distance"]


def test_distance_of_gaussians_with_commuting_covariances_is_the_closed_form() -> None:
    dimension = 6
    rotation = torch.linalg.qr(normal(6, dimension, seed=0)).Q
    a = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.0], dtype=torch.float64)
    b = torch.tensor([1.0, 2.0, 4.0, 0.2, 0.3, 0.7], dtype=torch.float64)
    shift = torch.arange(dimension, dtype=torch.float64)
    real = white(50, dimension, seed=1) * a @ rotation.T
    generated = white(70, dimension, seed=2) * b @ rotation.T + shift
    truth = shift.square().sum() + (a - b).square().sum()
    assert measure(real, generated) == pytest.approx(truth.item(), rel=1e-9)


@pytest.mark.parametrize(("real", "generated"), [(300, 200), (300, 20), (25, 200), (25, 20)])
def test_distance_is_exact_at_any_rank(real: int, generated: int) -> None:
    one, two = normal(real, 64, seed=1), normal(generated, 64, seed=2)
    assert measure(one, two) == pytest.approx(exact(one, two), rel=1e-9)


@pytest.mark.parametrize("generated", [200, 20])
def test_distance_is_that_of_torch_fidelity(generated: int) -> None:
    one, two = normal(300, 64, seed=1), normal(generated, 64, seed=2)
    assert measure(one, two) == pytest.approx(fidelity(one, two), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("generated", [2500, 500])
def test_distance_is_that_of_torch_fidelity_at_full_size(generated: int) -> None:
    one, two = normal(2500, 2048, seed=1), normal(generated, 2048, seed=2)
    assert measure(one, two) == pytest.approx(fidelity(one, two), rel=1e-6)


def test_distance_is_the_formula_with_a_general_matrix_square_root() -> None:
    one, two = normal(300, 32, seed=3).numpy(), normal(200, 32, seed=4).numpy()
    cov_one, cov_two = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = scipy.linalg.sqrtm(cov_one @ cov_two).real
    truth = np.square(one.mean(0) - two.mean(0)).sum() + np.trace(cov_one + cov_two - 2 * root)
    got = measure(torch.from_numpy(one), torch.from_numpy(two))
    assert got == pytest.approx(truth, rel=1e-6)


def test_distance_is_symmetric_and_zero_only_to_itself() -> None:
    one, two = normal(100, 16, seed=5), normal(100, 16, seed=6)
    assert measure(one, two) == pytest.approx(measure(two, one), rel=1e-9)
    assert 0 <= measure(one, one) < 1e-9 * one.var(dim=0).sum()
    assert measure(one, one + 0.1) == pytest.approx(16 * 0.01, rel=1e-9)


def test_shards_summed_over_ranks_give_the_whole() -> None:
    real, generated = normal(100, 16, seed=7), normal(90, 16, seed=8)
    ranks = [FrechetDistance(reference_of(real)) for _ in range(2)]
    # Uneven on purpose: no padding is needed.
    for metric, part in zip(ranks, (generated[:37], generated[37:]), strict=True):
        metric.update(Features(part, torch.empty(0)))
    for state, reduce in ranks[0]._reductions.items():
        assert reduce is dim_zero_sum
        setattr(ranks[0], state, sum(getattr(metric, state) for metric in ranks))
    assert ranks[0].compute()["fd"] == pytest.approx(measure(real, generated), rel=1e-9)


def test_batch_size_does_not_matter() -> None:
    real, generated = normal(100, 16, seed=9), normal(64, 16, seed=10)
    assert measure(real, generated, batch=1) == pytest.approx(
        measure(real, generated, batch=64), rel=1e-9
    )


def test_moments_keep_their_digits_far_from_the_origin() -> None:
    # About the origin the sums would agree with the squared mean, 1e16, in all their digits.
    real, generated = normal(100, 8, seed=11), normal(100, 8, seed=12)
    assert measure(real + 1e8, generated + 1e8) == pytest.approx(measure(real, generated), rel=1e-6)


def test_half_precision_features_are_summed_in_float64() -> None:
    features = torch.full((70_000, 1), 1.0, dtype=torch.bfloat16)
    features[::2] = -1.0
    metric = FrechetDistance(reference_of(white(10, 1, seed=13)))
    metric.update(Features(features, torch.empty(0)))
    assert metric.second.item() == 70_000


def test_only_the_published_inception_is_called_fid() -> None:
    real = normal(30, 4, seed=14)
    for extractor, key in (("inception", "fid"), ("inception-01234567", "fd"), ("shapes", "fd")):
        metric = FrechetDistance(reference_of(real, extractor))
        metric.update(Features(real, torch.empty(0)))
        assert list(metric.compute()) == [key]


def test_compute_can_be_repeated_after_reset() -> None:
    real, generated = normal(30, 4, seed=15), normal(30, 4, seed=16)
    metric = FrechetDistance(reference_of(real))
    values = []
    for part in (generated, real, generated):
        metric.reset()
        metric.update(Features(part, torch.empty(0)))
        values.append(metric.compute()["fd"])
    assert values[0] == values[2] != values[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    metric = FrechetDistance(reference_of(normal(30, 4, seed=17)))
    metric.update(Features(torch.full((3, 4), bad), torch.empty(0)))
    with pytest.raises(ValueError, match="not finite"):
        metric.compute()


def test_one_image_has_no_covariance() -> None:
    metric = FrechetDistance(reference_of(normal(30, 4, seed=18)))
    metric.update(Features(torch.zeros(1, 4), torch.empty(0)))
    with pytest.raises(ValueError, match="at least 2 images"):
        metric.compute()


def test_the_reference_must_be_there_and_of_the_same_extractor() -> None:
    extractor = shapes.load()
    with pytest.raises(ValueError, match="needs a reference"):
        Frechet().build(extractor, None)
    with pytest.raises(ValueError, match="extractor digest is 000000000000"):
        Frechet().build(extractor, reference_of(normal(30, 128, seed=19)))


def test_factor_squares_to_the_covariance() -> None:
    full, poor = normal(100, 16, seed=20).T.cov(), normal(10, 16, seed=21).T.cov()
    for covariance, count, rank in ((full, 100, 16), (poor, 10, 9)):
        root = frechet.factor(covariance, count)
        assert root.shape == (16, rank)
        torch.testing.assert_close(root @ root.T, covariance, rtol=1e-12, atol=1e-12)
