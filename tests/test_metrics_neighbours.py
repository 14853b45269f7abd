"""Precision and recall, density and coverage: against torch-fidelity, numpy and known values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from test_metrics_frechet import Known, normal, reference_of
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from diffusion_pl.metrics import neighbours
from diffusion_pl.metrics.density_coverage import DensityCoverage
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.precision_recall import PrecisionRecall

NAMES = ["precision", "recall", "density", "coverage"]


@dataclass(frozen=True)
class Counts:
    """The four numbers of two sets."""

    precision: float
    recall: float
    density: float
    coverage: float


def measure(real: Tensor, generated: Tensor, k: int) -> Counts:
    known = dataclasses.replace(reference_of(real), features=real)
    values = {}
    for kind in (PrecisionRecall(k), DensityCoverage(k)):
        metric = kind.build(Known(real.shape[1]), known, len(generated))
        for part in generated.split(11):
            metric.update(Features(part))
        values |= metric.compute()
    assert list(values) == NAMES
    return Counts(**values)


def brute(real: Tensor, generated: Tensor, k: int) -> Counts:
    """By numpy from all differences, one feature at a time."""
    x, y = real.double().numpy(), generated.double().numpy()

    def reaches(values: np.ndarray) -> list[float]:
        others = [np.delete(values, i, axis=0) for i in range(len(values))]
        return [
            float(np.sort(np.linalg.norm(rest - value, axis=1))[k - 1])
            for value, rest in zip(values, others, strict=True)
        ]

    holds = np.array(
        [
            [np.linalg.norm(g - r) <= reach for r, reach in zip(x, reaches(x), strict=True)]
            for g in y
        ]
    )
    held = np.array(
        [
            [np.linalg.norm(g - r) <= reach for g, reach in zip(y, reaches(y), strict=True)]
            for r in x
        ]
    )
    return Counts(
        precision=holds.any(axis=1).mean(),
        recall=held.any(axis=1).mean(),
        density=holds.sum() / (k * len(y)),
        coverage=holds.any(axis=0).mean(),
    )


def sets(real: int, generated: int, *, apart: float = 0.5) -> tuple[Tensor, Tensor]:
    """Two sets that lie in one another in part."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(real, 3, generator=generator, dtype=torch.float64)
    other = torch.randn(generated, 3, generator=generator, dtype=torch.float64)
    return one, 0.7 * other + apart


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rows", [7, 1000])
def test_precision_and_recall_are_those_of_torch_fidelity(
    monkeypatch: pytest.MonkeyPatch, rows: int, k: int
) -> None:
    monkeypatch.setattr(neighbours, "ROWS", rows)
    real, generated = sets(60, 45)
    theirs = prc_features_to_metric(generated, real, prc_neighborhood=k, verbose=False)
    got = measure(real, generated, k)
    assert (got.precision, got.recall) == pytest.approx(
        (theirs["precision"], theirs["recall"]), abs=1e-7
    )
    assert 0.1 < got.recall < got.precision < 1, "the sets tell too little"


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize(("real", "generated", "k"), [(60, 45, 3), (45, 60, 5), (21, 21, 1)])
def test_all_four_are_what_every_pair_says(
    monkeypatch: pytest.MonkeyPatch, real: int, generated: int, k: int, rows: int
) -> None:
    monkeypatch.setattr(neighbours, "ROWS", rows)
    one, other = sets(real, generated)
    expected = dataclasses.asdict(brute(one, other, k))
    assert dataclasses.asdict(measure(one, other, k)) == pytest.approx(expected, rel=1e-12)
    assert len(set(expected.values())) == 4, "the sets do not tell the numbers apart"


def test_a_set_covers_itself() -> None:
    real = normal(50, 4, seed=1)
    got = measure(real, real, 3)
    assert (got.precision, got.recall, got.coverage) == (1, 1, 1)
    # Each ball holds its own feature, two nearer than its rim, and one on it, as rounding has it.
    assert (1 + 2) / 3 <= got.density <= (1 + 3) / 3


def test_sets_far_apart_share_nothing() -> None:
    real, generated = sets(40, 30, apart=100)
    assert measure(real, generated, 3) == Counts(0, 0, 0, 0)


def test_density_of_equal_distributions_is_one() -> None:
    generator = torch.Generator().manual_seed(2)
    values = []
    for _ in range(30):
        real, generated = torch.randn(2, 150, 8, generator=generator, dtype=torch.float64)
        values.append(measure(real, generated, 5).density)
    mean, error = np.mean(values), np.std(values) / len(values) ** 0.5
    assert abs(mean - 1) < 3 * error, (mean, error)
    assert error < 0.05


def test_coverage_of_equal_distributions_is_the_closed_form() -> None:
    # Naeem et al. 2020, section 3.3: 1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k)), here N = M.
    generator = torch.Generator().manual_seed(3)
    n, k = 100, 3
    expected = 1 - np.prod([(n - i) / (2 * n - i) for i in range(1, k + 1)])
    values = []
    for _ in range(40):
        real, generated = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
        values.append(measure(real, generated, k).coverage)
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values) - expected) < 3 * error, (np.mean(values), expected, error)
    assert error < 0.01


def test_one_outlier_raises_recall_and_not_coverage() -> None:
    real, generated = sets(40, 30, apart=100)
    outlier = torch.full((1, 3), -1000.0, dtype=torch.float64)
    got = measure(real, torch.cat([generated, outlier]), 3)
    assert (got.recall, got.coverage, got.precision) == (1, 0, 0)


def test_distances_far_from_the_origin_keep_their_digits() -> None:
    # In float32 the squares would be 3e8 and the differences lost.
    real, generated = ((values + 1e4).float() for values in sets(60, 45))
    expected = dataclasses.asdict(brute(real, generated, 3))
    assert dataclasses.asdict(measure(real, generated, 3)) == pytest.approx(expected, rel=1e-12)


def test_blocks_are_squared_distances_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS", 4)
    one, other = sets(10, 6)
    parts = list(neighbours.blocks(one, other))
    assert [tuple(part.shape) for part in parts] == [(4, 6), (4, 6), (2, 6)]
    expected = (one[:, None] - other[None]).square().sum(dim=2)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-12, atol=1e-12)
    # Of squares of 1e16 the last digit counts 4, and rounding goes either way.
    assert all(part.min() >= 0 for part in neighbours.blocks(one + 1e8, one + 1e8))


def test_centring_moves_both_sets_alike() -> None:
    one, other = sets(10, 6)
    here, there = neighbours.centred(one.float() + 100, other.float() + 100)
    assert here.dtype == there.dtype == torch.float64
    torch.testing.assert_close(here.mean(dim=0), -there.mean(dim=0), rtol=1e-9, atol=1e-9)
    expected = torch.cdist(one.float().double(), other.float().double())
    torch.testing.assert_close(torch.cdist(here, there), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [PrecisionRecall, DensityCoverage])
@pytest.mark.parametrize("k", [0, -1, 20])
def test_a_neighbour_that_is_not_there_is_refused(
    kind: type[PrecisionRecall] | type[DensityCoverage], k: int
) -> None:
    real = normal(20, 4, seed=4)
    known = dataclasses.replace(reference_of(real), features=real)
    with pytest.raises(ValueError, match=rf"neighbour {k} needs more"):
        kind(neighbours=k).build(Known(4), known, 100)
    kind(neighbours=19).build(Known(4), known, 100)


def test_only_balls_around_generated_images_need_more_of_them() -> None:
    real = normal(20, 4, seed=5)
    known = dataclasses.replace(reference_of(real), features=real)
    with pytest.raises(ValueError, match=r"got 3 generated, 20 real"):
        PrecisionRecall(neighbours=3).build(Known(4), known, 3)
    DensityCoverage(neighbours=3).build(Known(4), known, 3)


@pytest.mark.parametrize("kind", [PrecisionRecall, DensityCoverage])
def test_the_reference_must_have_features_of_the_same_extractor(
    kind: type[PrecisionRecall] | type[DensityCoverage],
) -> None:
    real = normal(20, 4, seed=6)
    known = dataclasses.replace(reference_of(real), features=real)
    with pytest.raises(ValueError, match="need a reference"):
        kind().build(Known(4), None, 20)
    with pytest.raises(ValueError, match="has moments only"):
        kind().build(Known(4), reference_of(real), 20)
    with pytest.raises(ValueError, match="extractor is shapes, the evaluation has pixels"):
        kind().build(Known(4, "pixels"), known, 20)
