"""The Fréchet distance against closed forms, scipy, torch-fidelity and exact arithmetic."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from diffusion_pl.metrics import fid, moments, shapes
from diffusion_pl.metrics.accumulated import Summed
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.fid import Frechet, distance, distance_to, expected_bias
from diffusion_pl.metrics.moments import Moments
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


@dataclass
class Known:
    """What a metric asks of an extractor, without one."""

    dimension: int
    name: str = "shapes"
    digest: str = "0" * 12
    classes: int = 0
    spatial: int = 0
    resize: str = "none"
    precision: str = "fp32"
    error: float | None = None

    def __call__(self, images: Tensor, /) -> Features:
        raise AssertionError("the features are given")

    def to(self, device: torch.device | str) -> nn.Module:
        raise AssertionError("the features are given")


def moments_of(values: Tensor) -> Moments:
    return Moments(values.mean(dim=0), values.T.cov(), len(values))


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


def metric_of(real: Tensor, count: int = fid.ENOUGH, name: str = "shapes") -> Summed:
    """The metric against real features, as an evaluation of `count` images builds it."""
    return Frechet().build(Known(real.shape[1], name), reference_of(real, name), count)


def measure(real: Tensor, generated: Tensor, batch: int = 1000) -> float:
    metric = metric_of(real)
    for part in generated.split(batch):
        metric.update(Features(part))
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
    here, there = metric_of(real), metric_of(real)
    # Uneven on purpose: no padding is needed.
    for metric, part in ((here, generated[:37]), (there, generated[37:])):
        metric.update(Features(part))
    # Rows that waited are summed by then. States are gathered in the order they were named in.
    there.sync(distributed_available=lambda: False)
    theirs = iter([there.first, there.second, there.count])
    here.dist_sync_fn = lambda mine, group: [mine, next(theirs)]
    here.distributed_available_fn = lambda: True
    assert here.compute()["fd"] == pytest.approx(measure(real, generated), rel=1e-9)


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
    metric = metric_of(white(10, 1, seed=13))
    metric.update(Features(features))
    assert metric.second.item() == 70_000


def test_only_the_published_inception_is_called_fid() -> None:
    real = normal(30, 4, seed=14)
    for extractor, key in (("inception", "fid"), ("inception-01234567", "fd"), ("shapes", "fd")):
        metric = metric_of(real, name=extractor)
        metric.update(Features(real))
        assert list(metric.compute()) == [key]


def test_compute_can_be_repeated_after_reset() -> None:
    real, generated = normal(30, 4, seed=15), normal(30, 4, seed=16)
    metric = metric_of(real)
    values = []
    for part in (generated, real, generated):
        metric.reset()
        metric.update(Features(part))
        values.append(metric.compute()["fd"])
    assert values[0] == values[2] != values[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    metric = metric_of(normal(30, 4, seed=17))
    metric.update(Features(torch.full((3, 4), bad)))
    with pytest.raises(ValueError, match="not finite"):
        metric.compute()


def test_one_image_has_no_covariance() -> None:
    real = normal(30, 4, seed=18)
    with pytest.raises(ValueError, match=r"at least 2 images \(got 1\)"):
        metric_of(real, count=1)
    metric_of(real, count=2)


def test_the_reference_must_be_there_and_of_the_same_extractor() -> None:
    extractor = shapes.load()
    with pytest.raises(ValueError, match="needs a reference"):
        Frechet().build(extractor, None, 100)
    with pytest.raises(ValueError, match="extractor digest is 000000000000"):
        Frechet().build(extractor, reference_of(normal(30, 128, seed=19)), 100)


def test_the_spatial_distance_is_of_the_spatial_features_and_is_called_so() -> None:
    pooled, real, generated = (normal(40, 6, seed=seed) for seed in (30, 31, 32))
    for name, key in (("inception", "sfid"), ("other", "sfd")):
        known = dataclasses.replace(reference_of(pooled, name), spatial=moments_of(real))
        metric = Frechet(of="spatial").build(Known(6, name, spatial=6), known, fid.ENOUGH)
        metric.update(Features(pooled, None, generated))
        assert metric.compute() == {key: pytest.approx(exact(real, generated), rel=1e-9)}


def test_the_spatial_distance_needs_spatial_features_on_both_sides() -> None:
    known = reference_of(normal(30, 4, seed=33))
    with pytest.raises(ValueError, match=r"shapes has no spatial features \(sFID\)"):
        Frechet(of="spatial").build(Known(4), known, 100)
    with pytest.raises(ValueError, match="real: has no moments of spatial features"):
        Frechet(of="spatial").build(Known(4, spatial=4), known, 100)


def test_factor_squares_to_the_covariance() -> None:
    full, poor = normal(100, 16, seed=20).T.cov(), normal(10, 16, seed=21).T.cov()
    for covariance, count, rank in ((full, 100, 16), (poor, 10, 9)):
        root = Moments(torch.zeros(16, dtype=torch.float64), covariance, count).factor
        assert root.shape == (16, rank)
        torch.testing.assert_close(root @ root.T, covariance, rtol=1e-12, atol=1e-12)


def test_moments_of_unknown_number_have_all_directions_and_their_total_variance() -> None:
    covariance = normal(100, 16, seed=22).T.cov()
    unknown = Moments(torch.zeros(16, dtype=torch.float64), covariance, 0)
    assert unknown.rank == 16
    torch.testing.assert_close(unknown.factor @ unknown.factor.T, covariance, rtol=0, atol=1e-12)
    assert unknown.total == pytest.approx(covariance.diagonal().sum().item(), rel=1e-15)


@pytest.mark.parametrize("count", [200, 65, 64, 63, 20, 2])
@pytest.mark.parametrize("real", [300, 25])
def test_the_distance_of_features_is_that_of_their_moments(real: int, count: int) -> None:
    known, generated = moments_of(normal(real, 64, seed=23)), normal(count, 64, seed=24)
    expected = distance(known, moments_of(generated))
    assert distance_to(generated, known) == pytest.approx(expected, rel=1e-9)


def test_the_distance_of_features_is_exact_in_half_of_the_digits_of_single_precision() -> None:
    known, generated = normal(300, 8, seed=25), (normal(90, 8, seed=26) + 100).float()
    expected = exact(known, generated.double())
    assert distance_to(generated, moments_of(known)) == pytest.approx(expected, rel=1e-9)


def test_the_expected_bias_of_equal_distributions_is_their_whole_distance() -> None:
    # Drawn from the very Gaussian that they are compared with: all of the distance is bias.
    mean, covariance = torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    known = Moments(mean, covariance, 0)
    generator = torch.Generator().manual_seed(28)
    bias, measured = 0.0, 0.0
    for _ in range(40):
        drawn = torch.randn(1000, 16, generator=generator, dtype=torch.float64)
        bias += expected_bias(drawn, known)
        measured += distance_to(drawn, known)
    assert bias == pytest.approx(measured, rel=0.1)


def test_the_expected_bias_is_the_line_through_the_distances_of_pieces() -> None:
    known, generated = moments_of(normal(300, 4, seed=29)), normal(64, 4, seed=30)
    inverse = np.array([1 / 64, 1 / 32, 1 / 16])
    pieces = [
        np.mean([distance(known, moments_of(part)) for part in generated.split(size)])
        for size in (64, 32, 16)
    ]
    slope, _ = np.polyfit(inverse, pieces, 1)
    assert expected_bias(generated, known) == pytest.approx(slope / 64, rel=1e-9)


def notes(count: int, dimension: int, expected: int | None = None) -> Iterator[str]:
    """The notes beside the distance of `count` images."""
    metric = metric_of(normal(100, dimension, seed=34), expected or count)
    metric.update(Features(normal(count, dimension, seed=35)))
    metric.compute()
    return iter(metric.notes)


def test_a_singular_covariance_is_warned_of_and_no_other() -> None:
    assert "warning" in notes(16, 16)
    assert "warning" not in notes(17, 16)
    assert "warning" in notes(16, 16, expected=fid.ENOUGH)


def test_the_bias_of_few_images_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "ENOUGH", 50)
    assert list(notes(49, 4)) == ["bias"]
    assert list(notes(50, 4)) == []
    # Seven cannot be cut into four pieces that have a covariance each.
    assert list(notes(8, 4)) == ["bias"]
    assert list(notes(7, 4)) == []
    real, generated = normal(100, 4, seed=36), normal(40, 4, seed=37)
    metric = metric_of(real, 40)
    for part in generated.split(7):
        metric.update(Features(part))
    metric.compute()
    expected = expected_bias(generated, moments_of(real))
    assert metric.notes["bias"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("batch", [3, 10, 25, 64])
def test_rows_that_wait_for_others_change_nothing(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(moments, "ROWS", 10)
    real, generated = normal(100, 16, seed=38), normal(64, 16, seed=39)
    metric = metric_of(real)
    for part in generated.split(batch):
        metric.update(Features(part))
    first = metric.compute()["fd"]
    assert first == pytest.approx(exact(real, generated), rel=1e-9)
    metric._computed = None  # else the metric answers from memory
    assert metric.compute()["fd"] == first


def test_rows_are_given_together_once_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "ROWS", 10)
    rows, values = moments.Rows(), torch.arange(25.0)[:, None]
    assert rows.rest() is None
    given = [rows.add(part) for part in values[:22].split([5, 5, 4, 4, 4])]
    lengths = [None if part is None else len(part) for part in given]
    assert lengths == [None, 10, None, None, 12]
    assert rows.add(values[22:]) is None
    last = rows.rest()
    assert last is not None
    parts = [part for part in given if part is not None]
    assert torch.equal(torch.cat([*parts, last]), values)
    assert rows.rest() is None


def test_reset_forgets_rows_that_wait() -> None:
    real, generated = normal(30, 4, seed=40), normal(30, 4, seed=41)
    metric = metric_of(real, 30)
    metric.update(Features(real + 5))
    metric.reset()
    metric.update(Features(generated))
    assert metric.compute()["fd"] == pytest.approx(exact(real, generated), rel=1e-9)
    assert metric.notes["bias"] == expected_bias(generated, moments_of(real))


def test_one_image_again_and_again_has_no_distance() -> None:
    metric = metric_of(normal(30, 4, seed=30))
    metric.update(Features(torch.ones(20, 4)))
    with pytest.raises(ValueError, match="all generated images look alike"):
        metric.compute()
