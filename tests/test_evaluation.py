"""Evaluation: image i depends on (seed, i) alone, and so does every number."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.evaluation import Drawing, Evaluation, evaluate, rank_share, reference_of
from diffusion_pl.metrics import shapes
from diffusion_pl.metrics.frechet import Frechet
from diffusion_pl.metrics.inception_score import InceptionScore
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Sampler
from diffusion_pl.seeds import seed_of

CHURN = Sampler(partial(heun, S_churn=10.0), Rho(), 4)


class Tinted(nn.Module):
    """A raw network whose answer has a tint by label, so that labels show in the images."""

    classes, channels = 4, 3

    def __init__(self):
        super().__init__()
        self.tint = nn.Parameter(torch.linspace(-1, 1, 5)[:, None, None, None])

    def forward(self, x, c_noise, label=None):
        tint = 0.0 if label is None else self.tint[label + 1]
        return 0.3 * x + tint


def drawing(**options):
    return Drawing(
        Denoiser(Tinted(), Karras(0.5)), CHURN, (3, 16, 16), **({"classes": 4} | options)
    )


def test_an_image_depends_on_seed_and_index_alone():
    whole, _ = drawing().images(range(6))
    one, _ = drawing().images([4])
    shuffled, _ = drawing().images([5, 0, 4])
    assert torch.equal(one[0], whole[4])
    assert torch.equal(shuffled, whole[[5, 0, 4]])
    assert not torch.equal(whole[0], whole[1])
    other, _ = drawing(seed=1).images([4])
    assert not torch.equal(other[0], whole[4])


def test_labels_are_uniform_and_belong_to_the_index():
    labels = drawing().labels(range(4000))
    counts = torch.bincount(labels, minlength=4)
    assert counts.min() > 900  # 1000 expected, a standard deviation is 27
    assert torch.equal(drawing().labels([7, 3]), labels[[7, 3]])
    assert drawing(classes=0).labels([0]) is None


def test_a_given_label_is_every_images():
    dark, _ = drawing(label=0).images(range(4))
    bright, _ = drawing(label=3).images(range(4))
    assert (bright.float().mean(dim=(1, 2, 3)) > dark.float().mean(dim=(1, 2, 3))).all()


def test_an_evaluation_is_one_image_seen_once_by_the_network():
    assert drawing().images([0])[1] == 7  # 2 x 4 - 1
    assert drawing(guidance=2.0).images([0, 1])[1] == 14  # with the label and without


def test_bytes_are_what_is_drawn():
    images, _ = drawing().images([0, 1])
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": 4}, r"label 4 is not one of the model's classes \(0 to 3\)"),
        ({"label": 0, "classes": 0}, "none: it is unconditional"),
        ({"guidance": 2.0, "classes": 0}, "guidance needs a model with classes"),
    ],
)
def test_conditions_that_the_model_lacks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        drawing(**options)


def test_images_that_are_not_finite_are_never_measured():
    made = drawing()
    with torch.no_grad():
        made.denoiser.network.tint.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        made.images([0])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    images = Synthetic(200, 16, batch_size=8).open()
    extractor = shapes.load()
    folder = tmp_path_factory.mktemp("references")
    reference = reference_of(images, extractor, folder, torch.device("cpu"))

    def run(**options):
        settings = Evaluation(
            every=1,
            count=40,
            metrics=(Frechet(), InceptionScore(splits=2)),
            **({"batch_size": 40, "grid": 9} | options),
        )
        return evaluate(drawing(), settings, extractor, reference)

    return run


def test_numbers_do_not_depend_on_the_batch_size(measured):
    (whole, shown), (parts, same) = measured(), measured(batch_size=7)
    assert [row["name"] for row in whole] == [
        "fd@40/synthetic-16/shapes",
        "cs@40/synthetic-16/shapes",
        "cs_std@40/synthetic-16/shapes",
    ]
    # The extractor's float32 sums depend on its batch in the last digit.
    for one, other in zip(whole, parts, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-4)
    assert torch.equal(shown, same)
    assert shown.shape == (9, 3, 16, 16)


def test_a_row_says_what_its_number_depends_on(measured):
    row = measured()[0][0]
    assert row["n"] == 40
    assert row["reference"] == "synthetic-16"
    assert len(row["fingerprint"]) == 64
    assert row["extractor"].startswith("shapes-")
    assert row["evaluations"] == 7
    assert {"seed", "guidance", "seconds", "resize"} <= set(row)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_images_without_padding_and_in_order(world_size):
    shares = [rank_share(40, rank, world_size) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(40))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_seeds_of_streams_and_indices_differ():
    seeds = {seed_of(s, name, i) for s in range(5) for name in ("a", "b") for i in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_image_noise_goes_on_along_its_own_stream():
    both, alone = ImageNoise(0, [3, 8]), ImageNoise(0, [8])
    like = torch.empty(2, 3, 4, 4)
    for _ in range(3):
        assert torch.equal(both(like)[1], alone(like[:1])[0])
    assert ImageNoise(0, [1])(torch.empty(1, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("change", [{"count": 0}, {"every": 0}, {"batch_size": 0}, {"grid": 0}])
def test_impossible_evaluations_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Evaluation(**({"every": 1} | change))
