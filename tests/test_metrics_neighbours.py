"""Precision and recall, density and coverage: against torch-fidelity, numpy and known values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_metrics_fid import Known, normal, reference_of
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
    # Each ball holds its own feature, two nearer than its rim, and the one on it.
    assert got.density == (1 + 3) / 3


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


def in_fractions(real: Tensor, generated: Tensor, k: int) -> Counts:
    """By rational numbers from all pairs: no rounding anywhere, balls are closed."""
    x, y = ([[Fraction(v) for v in row] for row in rows.tolist()] for rows in (real, generated))

    def squared(a: list[Fraction], b: list[Fraction]) -> Fraction:
        return sum(((p - q) ** 2 for p, q in zip(a, b, strict=True)), Fraction(0))

    def reaches(rows: list[list[Fraction]]) -> list[Fraction]:
        return [sorted(squared(a, b) for b in rows)[k] for a in rows]

    rx, ry = reaches(x), reaches(y)
    holds = [[squared(g, r) <= reach for r, reach in zip(x, rx, strict=True)] for g in y]
    back = [[squared(g, r) <= reach for g, reach in zip(y, ry, strict=True)] for r in x]
    return Counts(
        precision=sum(map(any, holds)) / len(y),
        recall=sum(map(any, back)) / len(x),
        density=sum(map(sum, holds)) / (k * len(y)),
        coverage=sum(map(any, zip(*holds, strict=True))) / len(x),
    )


def copies(seed: int) -> tuple[Tensor, Tensor]:
    """Two sets of float32 features far from zero that share rows, several of them many times."""
    generator = torch.Generator().manual_seed(seed)
    pool = (torch.randn(14, 6, generator=generator) * 3 + 40).float()
    real = pool[torch.randint(0, 10, (36,), generator=generator)]
    return real, pool[torch.randint(4, 14, (31,), generator=generator)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 3, 5])
def test_copies_are_in_a_ball_or_out_of_it_exactly(
    monkeypatch: pytest.MonkeyPatch, seed: int, k: int
) -> None:
    real, generated = copies(seed)
    expected = dataclasses.asdict(in_fractions(real, generated, k))
    for rows, pairs in ((1000, 4096), (3, 5)):
        monkeypatch.setattr(neighbours, "ROWS", rows)
        monkeypatch.setattr(neighbours, "PAIRS", pairs)
        for turn in range(3):
            order = torch.Generator().manual_seed(turn)
            one = real[torch.randperm(len(real), generator=order)]
            other = generated[torch.randperm(len(generated), generator=order)]
            assert dataclasses.asdict(measure(one, other, k)) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_places_on_the_rim_of_a_ball_are_in_it(shift: float) -> None:
    # A square lattice: all four neighbours are equally far, in sums of whole numbers.
    side = torch.arange(6, dtype=torch.float64) + shift
    lattice = torch.cartesian_prod(side, side)
    got = measure(lattice, lattice, 3)
    assert dataclasses.asdict(got) == dataclasses.asdict(in_fractions(lattice, lattice, 3))


def test_one_picture_again_and_again_is_measured() -> None:
    real = torch.full((40, 5), 3.7)
    assert measure(real, real[:9], 5) == Counts(1, 1, 40 / 5, 1)
    other = torch.cat([real[:9], torch.full((3, 5), 4.0)])
    # Balls of no size around nine copies hold copies alone.
    assert measure(real, other, 5) == Counts(9 / 12, 1, 9 * 40 / (5 * 12), 1)


def test_far_more_rows_than_a_block_agree_with_every_pair() -> None:
    generator = torch.Generator().manual_seed(9)
    real, other = (torch.randn(1300, 40, generator=generator).float() + 5 for _ in range(2))
    x, y = real.double(), other.double()
    reach = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(6).values
    inside = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist") <= reach
    got = measure(real, other, 5)
    assert got.density == pytest.approx(inside.sum().item() / (5 * 1300), rel=1e-12)
    assert got.coverage == pytest.approx(inside.any(dim=0).double().mean().item(), rel=1e-12)


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
    with pytest.raises(ValueError, match="needs a reference"):
        kind().build(Known(4), None, 20)
    with pytest.raises(ValueError, match="has moments only"):
        kind().build(Known(4), reference_of(real), 20)
    with pytest.raises(ValueError, match="extractor is shapes, the evaluation has pixels"):
        kind().build(Known(4, "pixels"), known, 20)
