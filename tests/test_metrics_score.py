"""The inception score against torch-fidelity and the values it has by definition."""

import math

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric

from diffusion_pl.metrics import shapes
from diffusion_pl.metrics.accumulated import Kept
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.inception_score import InceptionScore


def draw(count: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, classes, generator=generator)


def metric_of(count: int, splits: int = 10) -> Kept:
    return InceptionScore(splits=splits).build(shapes.load(), None, count)


def measure(logits: Tensor, *, batch: int = 1000, splits: int = 10) -> tuple[float, float]:
    metric = metric_of(len(logits), splits)
    for part in logits.split(batch):
        metric.update(Features(torch.empty(len(part), 0), part))
    values = metric.compute()
    assert list(values) == ["cs", "cs_std"]
    return values["cs"], values["cs_std"]


@pytest.mark.parametrize("count", [200, 203, 10])
def test_score_is_that_of_torch_fidelity_with_its_shuffle(count: int) -> None:
    logits = draw(count, 50)
    theirs = isc_features_to_metric(logits)
    mean, spread = measure(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    # One image a split: every split scores 1 and the spread is rounding alone.
    assert spread == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-12)


def test_score_does_not_depend_on_the_batch_size() -> None:
    logits = draw(100, 20)
    assert measure(logits, batch=7) == measure(logits, batch=100)


def test_consecutive_blocks_of_two_ranks_give_the_number_of_one() -> None:
    logits = draw(100, 20)
    blocks = torch.cat([logits[:43], logits[43:]])
    assert measure(blocks, batch=9) == measure(logits)


def test_sure_and_balanced_predictions_score_the_number_of_classes() -> None:
    # Logits of 2,000: the other classes' probability is 0 in float64, and 0 log 0 is 0.
    logits = 2000.0 * torch.eye(8).repeat(5, 1)
    mean, spread = measure(logits, splits=1)
    assert mean == pytest.approx(8.0, rel=1e-12)
    assert spread == 0.0


def test_predictions_that_say_nothing_of_the_image_score_one() -> None:
    mean, spread = measure(draw(1, 8).repeat(40, 1))
    assert (mean, spread) == pytest.approx((1.0, 0.0), abs=1e-12)


def test_a_class_that_no_image_of_a_split_has_leaves_the_score_finite() -> None:
    logits = torch.tensor([2000.0, 0.0, -2000.0]).repeat(20, 1)
    assert measure(logits) == pytest.approx((1.0, 0.0), abs=1e-12)


def test_only_the_published_inception_is_called_inception_score() -> None:
    for name, key in (("inception", "is"), ("inception-01234567", "cs"), ("shapes", "cs")):
        extractor = shapes.load()
        extractor.name = name
        metric = InceptionScore().build(extractor, None, 20)
        metric.update(Features(torch.empty(20, 0), draw(20, 8)))
        assert list(metric.compute()) == [key, f"{key}_std"]


def test_another_seed_shuffles_otherwise_and_is_torch_fidelity_s() -> None:
    logits = draw(200, 50)
    metric = InceptionScore(seed=7).build(shapes.load(), None, 200)
    metric.update(Features(torch.empty(200, 0), logits))
    theirs = isc_features_to_metric(logits, rng_seed=7)["inception_score_mean"]
    assert metric.compute()["cs"] == pytest.approx(theirs, rel=1e-6)
    assert theirs != pytest.approx(measure(logits)[0], rel=1e-6)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"an image in each of 10 splits \(got 9\)"):
        metric_of(9)
    broken = metric_of(20)
    broken.update(Features(torch.empty(20, 0), torch.full((20, 4), math.nan)))
    with pytest.raises(ValueError, match="not finite"):
        broken.compute()
    with pytest.raises(ValueError, match="splits must be at least 1"):
        metric_of(20, splits=0)
