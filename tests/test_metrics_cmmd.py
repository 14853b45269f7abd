"""CMMD against its definition: a double loop, closed forms, and moments of Gaussians."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_metrics_fid import Known, normal, reference_of
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.metrics import cmmd
from diffusion_pl.metrics.cmmd import CMMD, discrepancy
from diffusion_pl.metrics.features import Features


def measured(real: Tensor, generated: Tensor, name: str = "shapes") -> dict[str, float]:
    reference = dataclasses.replace(reference_of(real, name), features=real)
    metric = CMMD().build(Known(real.shape[1], name), reference, len(generated))
    for part in generated.split(7):
        metric.update(Features(part))
    return metric.compute()


def by_hand(one: Tensor, other: Tensor) -> float:
    """Scale and width are the paper's; every pair is counted, also an image with itself."""

    def unit(x: Tensor) -> list[float]:
        length = math.sqrt(sum(value * value for value in x.tolist()))
        return [value / length for value in x.tolist()]

    def kernel(x: list[float], y: list[float]) -> float:
        squared = sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
        return math.exp(-squared / (2 * 10**2))

    xs, ys = [unit(x) for x in one], [unit(y) for y in other]
    means = [
        math.fsum(kernel(a, b) for a in left for b in right) / (len(left) * len(right))
        for left, right in ((xs, xs), (ys, ys), (xs, ys))
    ]
    return 1000 * (means[0] + means[1] - 2 * means[2])


def test_it_is_the_definition_by_a_double_loop(monkeypatch) -> None:
    real, generated = normal(40, 6, seed=1), normal(25, 6, seed=2) + 0.5
    known = by_hand(real, generated)
    assert known > 0.1
    assert measured(real, generated) == {"mmd": pytest.approx(known, rel=1e-9)}
    monkeypatch.setattr(cmmd, "_ROWS", 8)
    assert measured(real, generated)["mmd"] == pytest.approx(known, rel=1e-9)


def test_two_opposite_points_have_the_closed_form() -> None:
    # Distance 2 on the unit sphere: 2 - 2 exp(-4 / 200), at any length of the features.
    one, other = torch.tensor([[3.0, 0.0]]), torch.tensor([[-0.1, 0.0]])
    assert discrepancy(one, other) == pytest.approx(2 - 2 * math.exp(-4 / 200), rel=1e-12)
    assert discrepancy(one, other, sigma=1.0) == pytest.approx(2 - 2 * math.exp(-2), rel=1e-12)


def test_the_same_features_are_at_zero_and_others_are_not() -> None:
    x = normal(30, 5, seed=3)
    assert abs(discrepancy(x, x.flip(0))) < 1e-15
    assert discrepancy(x, normal(30, 5, seed=4)) > 1e-6


def test_small_differences_are_not_lost_to_rounding() -> None:
    # Two unit vectors an angle t apart: 2 - 2 exp(-2 (1 - cos t) / 200) = t^2 / 100 + O(t^4).
    t = 1e-4
    one = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[math.cos(t), math.sin(t)]], dtype=torch.float64)
    assert discrepancy(one, other) == pytest.approx(t**2 / 100, rel=1e-6)


def test_a_row_of_the_published_embedding_says_how_the_paper_resizes() -> None:
    for name, said in (("clip-vit-l-14-336px", True), ("shapes", False)):
        reference = dataclasses.replace(reference_of(x := normal(4, 3, seed=6), name), features=x)
        notes = CMMD().build(Known(3, name), reference, 4).notes
        assert ("antialiased bicubic to 336 px" in notes.values()) is said


def test_only_the_published_embedding_makes_it_cmmd() -> None:
    x = normal(4, 3, seed=5)
    assert list(measured(x, x, "clip-vit-l-14-336px")) == ["cmmd"]
    for name in ("clip-vit-l-14", "inception", "pixels"):
        assert list(measured(x, x, name)) == ["mmd"]


def test_what_cannot_be_measured_is_refused() -> None:
    real = normal(5, 3, seed=6)
    with pytest.raises(UserError, match="^CMMD: needs a reference"):
        CMMD().build(Known(3, "shapes"), None, 5)
    with pytest.raises(UserError, match="^CMMD: reference .* has moments only"):
        CMMD().build(Known(3, "shapes"), reference_of(real, "shapes"), 5)
    for counts in ((1, None), (5, 1)):
        with pytest.raises(UserError, match="^CMMD: needs at least 2 images on either side$"):
            CMMD().check_count(*counts)
    CMMD().check_count(2, 2)
    with pytest.raises(UserError, match="^CMMD: needs at least 2"):
        CMMD().build(Known(3, "x"), dataclasses.replace(reference_of(real, "x"), features=real), 1)


def test_features_that_are_not_finite_are_refused() -> None:
    x = normal(4, 3, seed=7)
    with pytest.raises(UserError, match="some features are not finite"):
        measured(x, torch.full_like(x, torch.nan))
