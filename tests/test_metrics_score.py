"""The inception score against torch-fidelity and the values it has by definition."""

import math

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric

from diffusion_pl.metrics import shapes
from diffusion_pl.metrics.accumulated import ClassifierScore
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.inception_score import InceptionScore


def draw(count: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, classes, generator=generator)


def measure(logits: Tensor, *, batch: int = 1000, splits: int = 10) -> tuple[float, float]:
    metric = ClassifierScore("is", splits, 2020)
    for part in logits.split(batch):
        metric.update(Features(torch.empty(len(part), 0), part))
    values = metric.compute()
    assert list(values) == ["is", "is_std"]
    return values["is"], values["is_std"]


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
    extractor = shapes.load()
    assert extractor.name == "shapes"
    metric = InceptionScore().build(extractor, None)
    metric.update(Features(torch.empty(20, 0), draw(20, 8)))
    assert list(metric.compute()) == ["cs", "cs_std"]


def test_what_cannot_be_scored_is_refused() -> None:
    few = ClassifierScore("is", 10, 2020)
    few.update(Features(torch.empty(9, 0), draw(9, 4)))
    with pytest.raises(ValueError, match="each of 10 splits"):
        few.compute()
    broken = ClassifierScore("is", 10, 2020)
    broken.update(Features(torch.empty(20, 0), torch.full((20, 4), math.nan)))
    with pytest.raises(ValueError, match="not finite"):
        broken.compute()
    with pytest.raises(ValueError, match="splits must be at least 1"):
        InceptionScore(splits=0).build(shapes.load(), None)
