"""Evaluation: image i depends on (seed, i) alone, and so does every number."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

from diffusion_pl import ranks
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation, ImageGenerator, evaluate, reference_of
from diffusion_pl.evaluation.blocks import evaluate_blocks
from diffusion_pl.evaluation.cost import Cost, estimate
from diffusion_pl.evaluation.measuring import Pieces
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.evaluation.sources import Labels
from diffusion_pl.metrics import real_images, shapes
from diffusion_pl.metrics.features import TILE
from diffusion_pl.metrics.fid import Frechet
from diffusion_pl.metrics.inception_score import InceptionScore
from diffusion_pl.metrics.kid import Kernel
from diffusion_pl.metrics.precision_recall import PrecisionRecall
from diffusion_pl.samplers.deis import deis
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.pyramid import PyramidSampler
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


def generator(sampler=CHURN, **options):
    denoiser = Denoiser(Tinted(), Karras(0.5))
    usual = {"sources": [Labels(4)], "dropout": {"label": 0.1}}
    return ImageGenerator(denoiser, sampler, (3, 16, 16), **(usual | options))


def test_an_image_depends_on_seed_and_index_alone():
    whole, _ = generator().images(range(6))
    one, _ = generator().images([4])
    shuffled, _ = generator().images([5, 0, 4])
    assert torch.equal(one[0], whole[4])
    assert torch.equal(shuffled, whole[[5, 0, 4]])
    assert not torch.equal(whole[0], whole[1])
    other, _ = generator(seed=1).images([4])
    assert not torch.equal(other[0], whole[4])


def test_the_first_noise_is_the_seeds_too():
    quiet = Sampler(heun, Rho(), 4)  # draws no noise of its own
    one, other = (generator(quiet, seed=seed, sources=[]).images([4])[0] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_labels_are_uniform_and_belong_to_the_index():
    labels = generator().labels(range(4000))
    counts = torch.bincount(labels, minlength=4)
    assert counts.min() > 900  # 1000 expected, a standard deviation is 27
    assert torch.equal(generator().labels([7, 3]), labels[[7, 3]])
    assert generator(sources=[]).labels([0]) is None


def test_a_given_label_is_every_images():
    dark, _ = generator(sources=[Labels(4, 0)]).images(range(4))
    bright, _ = generator(sources=[Labels(4, 3)]).images(range(4))
    assert (bright.float().mean(dim=(1, 2, 3)) > dark.float().mean(dim=(1, 2, 3))).all()


def test_an_evaluation_is_one_image_seen_once_by_the_network():
    assert generator().images([0])[1] == 7  # 2 x 4 - 1
    assert generator(guidance=2.0).images([0, 1])[1] == 14  # with the label and without


def test_bytes_are_what_is_drawn():
    images, _ = generator().images([0, 1])
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 16, 16)


def test_conditions_that_the_model_lacks_are_refused():
    with pytest.raises(UserError, match=r"label 4 is not one of the model's classes \(0 to 3\)"):
        Labels(4, 4)
    denoiser = Denoiser(Tinted(), Karras(0.5))
    denoiser.network.classes = 0
    with pytest.raises(UserError, match="guidance needs a model with classes, text or images"):
        ImageGenerator(denoiser, CHURN, (3, 16, 16), guidance=2.0)


def test_images_that_are_not_finite_are_never_measured():
    made = generator()
    with torch.no_grad():
        made.denoiser.network.tint.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        made.images([0])


ALL = (Frechet(), InceptionScore(splits=2), Kernel(subsets=3, size=50), PrecisionRecall())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measure 100 images in a given way."""
    images = Synthetic(200, 16).open()
    extractor = shapes.load()
    folder = tmp_path_factory.mktemp("references")

    def run(measure=evaluate, drawn=None, **options):
        more = {key: options.pop(key) for key in ("first", "blocks") if key in options}
        defaults = {"count": 100, "metrics": ALL, "batch_size": 100, "grid": 9}
        settings = Evaluation(every=1, **(defaults | options))
        reference = reference_of(images, settings, extractor, folder, torch.device("cpu"))
        return measure(drawn or generator(), settings, extractor, reference, **more)

    return run


@pytest.mark.parametrize("batch_size", [1, 7, 33])
def test_numbers_do_not_depend_on_the_batch_size(measured, batch_size):
    (whole, shown), (parts, same) = measured(), measured(batch_size=batch_size)
    assert [row["name"].split("@")[0] for row in whole] == [
        "fd", "cs", "cs_std", "kd", "kd_std", "precision", "recall",
    ]  # fmt: skip
    assert all(row["name"].endswith("@100/synthetic-16/shapes") for row in whole)
    for one, other in zip(whole, parts, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-9)
    assert torch.equal(shown, same)
    assert shown.shape == (9, 3, 16, 16)


def test_images_are_handed_on_by_whole_tiles_from_the_first_on():
    drawn = generator()
    for batch_size in (1, 20, 100):
        pieces = list(Pieces(drawn, range(5, 80), batch_size))
        assert [piece.start for piece in pieces] == [5, 5 + TILE, 5 + 2 * TILE]
        assert [len(piece.images) for piece in pieces] == [TILE, TILE, 75 - 2 * TILE]
        for piece in pieces:
            wanted = range(piece.start, piece.start + len(piece.images))
            assert torch.equal(piece.images, drawn.images(wanted)[0])


def test_the_grid_is_of_the_first_images_measured(measured):
    _, shown = measured(grid=40, metrics=())  # a tile and a part of one
    assert torch.equal(shown, generator().images(range(40))[0])
    _, shown = measured(grid=9, metrics=(), first=100)
    assert torch.equal(shown, generator().images(range(100, 109))[0])


@pytest.mark.parametrize(("rank", "tiles"), [(0, [TILE, TILE]), (1, [TILE, TILE]), (2, [TILE])])
def test_every_rank_shows_whole_tiles_to_the_extractor(measured, monkeypatch, rank, tiles):
    measured(count=150, metrics=(Frechet(),))  # the reference is known before
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    seen = []
    forward = shapes.Shapes.forward

    def count(self, images):
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(shapes.Shapes, "forward", count)
    measured(count=150, metrics=(Frechet(),), batch_size=20)
    assert seen == tiles


def test_a_row_says_what_its_number_depends_on(measured):
    row = measured()[0][0]
    assert (row["n"], row["first"], row["reference"], row["ranks"]) == (100, 0, "synthetic-16", 1)
    assert (row["reference_n"], row["evaluations"], row["seed"]) == (200, 7, 0)
    assert len(row["fingerprint"]) == 64
    assert row["extractor"].startswith("shapes-")
    assert row["sampler"] == "Sampler(integrate=heun(S_churn=10.0), schedule=Rho(), steps=4)"
    assert (row["precision"], row["features"], row["features_error"]) == ("fp32", "fp32", None)
    assert row["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert row["hardware"].endswith("threads")
    assert {"commit", "seconds", "resize", "guidance", "bias", "warning"} <= set(row)


def test_blocks_are_disjoint_and_their_mean_least_and_spread_are_given(measured):
    rows, shown = measured(evaluate_blocks, blocks=3)
    alone = [measured(first=first)[0] for first in (0, 100, 200)]
    for row, *blocks in zip(rows, *alone, strict=True):
        values = [block["value"] for block in blocks]
        assert row["blocks"] == pytest.approx(values, rel=1e-12)
        assert row["value"] == pytest.approx(sum(values) / 3)
        assert (row["min"], row["range"]) == (min(values), max(values) - min(values))
    assert len({block[0]["value"] for block in alone}) == 3
    assert torch.equal(shown, measured()[1])
    with pytest.raises(ValueError, match="blocks must be at least 1"):
        measured(evaluate_blocks, blocks=0)


def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(measured):
    made = generator()
    with torch.no_grad():
        made.denoiser.network.tint.fill_(float("nan"))  # drawing would fail otherwise
    for options, message in (
        ({"metrics": (InceptionScore(),), "count": 9}, "an image in each of 10 splits"),
        ({"metrics": (Kernel(size=1000),)}, "subsets of 1000 need as many images"),
        ({"metrics": (Frechet(of="spatial"),)}, "shapes has no spatial features"),
        ({"metrics": (PrecisionRecall(), Frechet()), "count": 3}, "neighbour 3 needs more images"),
        ({"metrics": (Frechet(),), "count": 1}, "needs at least 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(drawn=made, **options)


def test_a_reference_file_takes_the_place_of_the_data(measured, tmp_path):
    images = Synthetic(50, 16, seed=5).open()
    other = real_images.compute(images, shapes.load())
    other.save(tmp_path / "other.safetensors")
    rows, _ = measured(metrics=(Frechet(),), reference=str(tmp_path / "other.safetensors"))
    assert (rows[0]["reference_n"], rows[0]["fingerprint"]) == (50, images.fingerprint)
    assert rows[0]["value"] != measured()[0][0]["value"]
    with pytest.raises(ValueError, match="has moments only"):
        measured(reference=str(tmp_path / "other.safetensors"))


def test_the_cost_is_the_calls_at_every_size_times_their_seconds():
    made = generator()
    assert made.calls() == {16: 7}
    assert generator(guidance=2.0).calls() == {16: 14}
    pyramid = PyramidSampler(CHURN, levels=[8, 16], restart=0.5)
    calls = generator(sampler=pyramid).calls()
    assert calls[8] == 7 and 0 < calls[16] <= 7
    settings = Evaluation(every=1, count=100, metrics=(Frechet(),))
    cost = estimate(made, settings, shapes.load())
    assert cost.images == 100
    assert cost.sampling > 0 and cost.features > 0
    assert cost.seconds == pytest.approx(100 * (cost.sampling + cost.features))
    said = str(dataclasses.replace(cost, sampling=1e-3, features=2e-3))
    assert "about 0 s each here: 100 images a process, 1 ms to sample one, 2 ms to" in said
    assert "about 4 min each" in str(Cost(1000, 0.2, 0.04))
    assert estimate(made, Evaluation(every=1, count=100), shapes.load()).features == 0


def test_parts_are_described_by_name_and_by_what_differs_from_the_default():
    sampler = Sampler(deis, Rho(sigma_max=15.0), 10, clip_denoised=True)
    assert described(sampler) == (
        "Sampler(integrate=deis, schedule=Rho(sigma_max=15.0), steps=10, clip_denoised=True)"
    )
    assert described([partial(heun), {"a": 1}, torch.bfloat16]) == "[heun, {a=1}, bf16]"


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


def test_balanced_labels_are_the_classes_in_turn_and_a_number_says_so():
    balanced = generator(sources=[Labels(3, balanced=True)])
    assert balanced.labels(range(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert balanced.labels([5, 3]).tolist() == [2, 0]
    assert balanced.about()["labels"] == "balanced"
    usual = generator(sources=[Labels(3)])
    one = generator(sources=[Labels(3, 1, balanced=True)])
    for other in (usual, one, generator(sources=[])):
        assert "labels" not in other.about()
    drawn = usual.labels(range(3000)).bincount()
    assert drawn.min() > 900
    assert drawn.tolist() != [1000, 1000, 1000]
    assert one.labels(range(3)).tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="labels must be random or balanced"):
        Evaluation(every=1, labels="even")
