"""Conditions: nulls, dropout in training, guidance by kind, and where they come from."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from worded import WordEncoder

from diffusion_pl.data.encoding import text_table
from diffusion_pl.diffusion.classifier_free import check_guidance, classifier_free
from diffusion_pl.diffusion.conditions import received, sizes, without
from diffusion_pl.diffusion.guidance import guided
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.diffusion.recording import Counted
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator
from diffusion_pl.evaluation.prompts import encoded
from diffusion_pl.evaluation.sources import Captions, Labels, own_condition, sources_of
from diffusion_pl.images import Images
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Sampler
from diffusion_pl.texts import Captions as Numbered
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.settings import TrainerConfig

WORDS = ("a red star", "a star", "one blue moon", "two")
ENCODER = WordEncoder(width=6, length=5)
TABLE = text_table(Numbered.of([(word, f"{word} again") for word in WORDS] * 2), ENCODER)
IMAGES = Images(
    "eight", torch.zeros(8, 3, 8, 8, dtype=torch.uint8), "f" * 64,
    labels=torch.arange(8) % 3, classes=3, texts=TABLE,
)  # fmt: skip


class Mixed(nn.Module):
    """A raw network of label and text: both shift the image; knows its null."""

    channels = 3

    def __init__(self, classes=3, text_width=6, text_length=5):
        super().__init__()
        self.classes, self.text_width, self.text_length = classes, text_width, text_length
        self.tint = nn.Parameter(torch.linspace(-1, 1, classes + 1)[:, None])
        self.project = nn.Linear(text_width, 3) if text_width else None
        self.register_buffer("null_text", torch.zeros(text_length, text_width))
        self.register_buffer("null_text_mask", torch.zeros(text_length, dtype=torch.bool))

    def set_null_text(self, text, mask):
        self.null_text.copy_(text)
        self.null_text_mask.copy_(mask)

    def check_resolution(self, height, width):
        pass

    def forward(self, x, c_noise, label=None, text=None, text_mask=None, augment=None):
        shift = torch.zeros(len(x), 3)
        if self.classes:
            label = torch.full((len(x),), -1) if label is None else label
            shift = shift + self.tint[label + 1]
        if self.project is not None:
            if text is None:
                text = torch.zeros(len(x), self.text_length, self.text_width)
                text_mask = torch.zeros(len(x), self.text_length, dtype=torch.bool)
            assert self.null_text_mask.any() and text.dtype == torch.float32
            none = ~text_mask.any(dim=1)
            text = torch.where(none[:, None, None], self.null_text, text)
            mask = torch.where(none[:, None], self.null_text_mask, text_mask)
            states = F.silu(self.project(text)).masked_fill(~mask[:, :, None], 0)
            shift = shift + states.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return 0.3 * x + shift[:, :, None, None]


def network(**options):
    torch.manual_seed(0)
    made = Mixed(**options)
    if made.project is not None:
        made.set_null_text(*TABLE.null)
    return made


def condition(count=4, **options):
    """The labels and captions of the first images of the data."""
    taken = {"label": 3, "text": 6} | options
    return received(network(), own_condition(IMAGES, torch.arange(count), taken))


X = torch.linspace(-2, 2, 4 * 3 * 4 * 4).reshape(4, 3, 4, 4)
SIGMA = torch.tensor(0.7)


# --- nulls ----------------------------------------------------------------------------------------


def test_the_null_of_a_label_is_minus_one_and_of_a_text_no_token():
    given = condition()
    rows = torch.tensor([True, False, False, True])
    hidden = without(given, ["label", "text"], rows)
    assert hidden["label"].tolist() == [-1, 1, 2, -1]
    assert torch.equal(hidden["text_mask"], given["text_mask"] & ~rows[:, None])
    assert hidden["text_mask"].any(dim=1).tolist() == [False, True, True, False]
    assert given["label"].tolist() == [0, 1, 2, 0] and given["text_mask"].any(dim=1).all()
    everywhere = without(given, ["label", "text"])
    assert everywhere["label"].tolist() == [-1] * 4 and not everywhere["text_mask"].any()
    alone = without(given, ["text"])
    assert torch.equal(alone["label"], given["label"]) and not alone["text_mask"].any()
    # A kind that was not given is not made up.
    assert set(without({"label": given["label"]}, ["label", "text"])) == {"label"}


@torch.no_grad()
def test_no_text_is_the_encoding_of_nothing():
    made = network()
    null, mask = TABLE.null
    given = condition()
    said = {"text": null.float().expand(4, -1, -1), "text_mask": mask.expand(4, -1)}
    hidden = without(given, ["text"])
    answer = made(X, torch.zeros(4), **hidden)
    assert torch.equal(answer, made(X, torch.zeros(4), **(given | said)))
    assert torch.equal(answer, made(X, torch.zeros(4), label=given["label"]))
    assert not torch.isclose(answer, made(X, torch.zeros(4), **given)).all(dim=(1, 2, 3)).any()


def test_a_network_gets_what_it_takes():
    given = condition() | {"position": torch.zeros(4, 2, 4, 4), "own": torch.zeros(4)}
    both = {"label", "text", "text_mask", "position", "own"}
    assert set(received(network(), given)) == both
    assert set(received(network(classes=0), given)) == both - {"label"}
    assert set(received(network(text_width=0), given)) == both - {"text", "text_mask"}
    assert set(received(nn.Identity(), given)) == {"position", "own"}
    half = {"text": torch.ones(1, 5, 6, dtype=torch.float16), "label": torch.ones(1).long()}
    found = received(network(), half)
    assert found["text"].dtype == torch.float32 and found["label"].dtype == torch.int64
    assert sizes(network(classes=0)) == {"label": 0, "text": 6, "image": 0}


# --- guidance -------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_weight_removes_all_conditions_together():
    denoise, given = Denoiser(network(), Karras(0.5)), condition()
    none = denoise(X, SIGMA, **without(given, ["label", "text"]))
    everything = denoise(X, SIGMA, **given)
    found = guided(denoise, condition=given, weight=2.5)(X, SIGMA)
    torch.testing.assert_close(found, none + 2.5 * (everything - none))
    # Of a model that always had its label in training only the text is removed.
    kept = denoise(X, SIGMA, **without(given, ["text"]))
    found = guided(denoise, condition=given, weight=2.5, kinds=("text",))(X, SIGMA)
    torch.testing.assert_close(found, kept + 2.5 * (everything - kept))


@torch.no_grad()
def test_each_kind_has_its_weight():
    denoise, given = Denoiser(network(), Karras(0.5)), condition()
    everything = denoise(X, SIGMA, **given)
    no_label = denoise(X, SIGMA, **without(given, ["label"]))
    no_text = denoise(X, SIGMA, **without(given, ["text"]))
    counted = Counted(denoise)
    found = guided(counted, condition=given, weight={"label": 1.5, "text": 4.0})(X, SIGMA)
    expected = everything + 0.5 * (everything - no_label) + 3.0 * (everything - no_text)
    torch.testing.assert_close(found, expected)
    assert counted.seen == 3 * 4
    # A weight of 1 costs nothing; without another the model alone is asked.
    counted.seen = 0
    found = guided(counted, condition=given, weight={"label": 1.0, "text": 4.0})(X, SIGMA)
    torch.testing.assert_close(found, everything + 3.0 * (everything - no_text))
    assert counted.seen == 2 * 4
    counted.seen = 0
    assert torch.equal(guided(counted, condition=given, weight={"text": 1})(X, SIGMA), everything)
    assert counted.seen == 4


@torch.no_grad()
def test_the_weight_of_one_kind_is_plain_guidance_to_the_bit():
    denoise = Denoiser(network(text_width=0), Karras(0.5))
    given = {"label": condition()["label"]}
    plain = classifier_free(denoise, condition=given, weight=2.5)(X, SIGMA)
    assert torch.equal(
        classifier_free(denoise, condition=given, weight={"label": 2.5})(X, SIGMA), plain
    )


@torch.no_grad()
def test_levels_of_a_batch_stay_with_their_images():
    denoise, given = Denoiser(network(), Karras(0.5)), condition()
    levels = torch.tensor([0.1, 0.5, 2.0, 9.0])
    weight = {"label": 1.5, "text": 4.0}
    whole = guided(denoise, condition=given, weight=weight)(X, levels)
    for row in range(4):
        own = {key: value[row : row + 1] for key, value in given.items()}
        alone = guided(denoise, condition=own, weight=weight)(X[row : row + 1], levels[row])
        torch.testing.assert_close(whole[row : row + 1], alone)


@pytest.mark.parametrize(
    ("weight", "taken", "dropout", "message"),
    [
        (2.0, {"label": 0, "text": 0}, {}, "needs a model with classes, text or images"),
        (2.0, {"label": 3, "text": 6}, {}, "without its label, which was never trained"),
        (2.0, {"label": 0, "text": 6}, {"label": 0.1}, r"\(trainer.dropout.text is 0\)"),
        (2.0, {"label": 0, "text": 6}, {"text": 1.0}, "with its text, which was never trained"),
        ({"text": 2.0}, {"label": 3, "text": 0}, {"label": 0.1}, "guidance.text: is no condition"),
        ({"text": 2.0}, {"label": 3, "text": 6}, {"label": 0.1}, "guidance 2 needs the model with"),
        ({"words": 2.0}, {"label": 3, "text": 6}, {"label": 0.1}, "which takes label, text"),
    ],
)
def test_guidance_by_what_was_never_trained_is_refused(weight, taken, dropout, message):
    with pytest.raises(UserError, match=message):
        check_guidance(weight, taken=taken, dropout=dropout)


def test_guidance_by_what_was_trained_is_not():
    both = {"label": 3, "text": 6}
    check_guidance(2.0, taken=both, dropout={"text": 0.1})
    check_guidance({"text": 2.0, "label": 1}, taken=both, dropout={"text": 0.1})
    check_guidance({"text": 1.0}, taken=both, dropout={})


# --- training -------------------------------------------------------------------------------------


def module(batch_size=4096, seed=0, augment=None, at_a_time=None, **dropout):
    settings = {"device_batch_size": at_a_time, "dropout": dropout}
    return DiffusionModule(
        network(), EDM(), partial(torch.optim.Adam, lr=1e-3), EMA(10),
        TrainerConfig(total_images=1, checkpoint_every=1, **settings),
        batch_size=batch_size, resolution=4, augment=augment, seed=seed,
    )  # fmt: skip


def dropped(made, first=0, count=4096):
    """Which labels and texts are hidden from the images of a step."""
    index = torch.arange(first, first + count)
    given = {
        "label": torch.zeros(count, dtype=torch.long),
        "text": torch.zeros(count, 5, 6),
        "text_mask": torch.ones(count, 5, dtype=torch.bool),
    }
    found = made.draw(torch.zeros(count, 1, 1, 1), index, given)[3]
    mask = found["text_mask"]
    assert torch.equal(mask.any(dim=1), mask.all(dim=1))  # a caption is hidden whole
    return found["label"] < 0, ~mask.any(dim=1)


def test_each_kind_is_dropped_at_its_rate_on_its_own():
    label, text = dropped(module(label=0.2, text=0.5))
    # Standard deviations of the shares are 0.006 and 0.008.
    assert label.double().mean() == pytest.approx(0.2, abs=0.03)
    assert text.double().mean() == pytest.approx(0.5, abs=0.04)
    assert torch.corrcoef(torch.stack([label, text]).double())[0, 1].abs() < 5 / 4096**0.5
    none, same = dropped(module(text=0.5))
    assert not none.any() and torch.equal(same, text)
    alone, none = dropped(module(label=0.2))
    assert not none.any() and torch.equal(alone, label)


def test_a_kind_may_be_hidden_never_or_always():
    label, text = dropped(module(label=0.0, text=1.0))
    assert not label.any() and text.all()


def test_text_is_dropped_by_seed_and_place_in_the_run_alone():
    made = module(batch_size=64, text=0.5)
    _, whole = dropped(made, 128, 64)
    _, part = dropped(made, 160, 32)  # of another device
    assert torch.equal(whole[32:], part)
    assert not torch.equal(whole, dropped(made, 192, 64)[1])
    assert not torch.equal(whole, dropped(module(batch_size=64, seed=1, text=0.5), 128, 64)[1])


class Recorded:
    draws = 2

    def __call__(self, image, uniform):
        self.uniform = uniform
        return image, uniform


def test_text_is_dropped_by_numbers_that_nothing_else_sees():
    augment = Recorded()
    made = module(augment=augment, label=0.5, text=0.5)
    label, text = dropped(made)
    index = torch.arange(4096)
    u = made.draw(torch.zeros(4096, 1, 1, 1), index, {})[1]
    within = u * 4096 - (u * 4096).floor()
    rows = [text.double(), label.double(), within, *augment.uniform.double().T]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(5)
    assert correlation.abs().max() < 5 / 4096**0.5


def test_a_loss_sees_captions_and_their_nulls():
    """The loss of a dropped row is that of an image without a caption."""
    made = module(batch_size=8, text=0.5)
    text, mask = TABLE.read(torch.arange(8), torch.zeros(8, dtype=torch.float64))
    batch = {
        "image": torch.randint(0, 256, (8, 3, 4, 4)).byte(), "index": torch.arange(8),
        "label": torch.arange(8) % 3, "text": text, "text_mask": mask,
    }  # fmt: skip
    hidden = ~made.draw(torch.zeros(8, 3, 4, 4), batch["index"], made.condition(batch))[3][
        "text_mask"
    ].any(dim=1)
    assert 0 < hidden.sum() < 8
    with_text = torch.cat(list(made.image_losses(batch)))
    bare = batch | {"text_mask": torch.zeros_like(mask)}
    without_text = torch.cat(list(made.image_losses(bare)))
    assert torch.equal(with_text[hidden], without_text[hidden])
    assert not torch.isclose(with_text[~hidden], without_text[~hidden]).any()
    # In micro-batches each image keeps its own.
    parts = list(module(batch_size=8, at_a_time=3, text=0.5).image_losses(batch))
    assert len(parts) == 3
    torch.testing.assert_close(torch.cat(parts), with_text, rtol=1e-5, atol=0)
    # What lies under the mask never matters.
    noise = torch.where(mask[:, :, None], text, torch.full_like(text, 7.0))
    assert torch.equal(torch.cat(list(made.image_losses(batch | {"text": noise}))), with_text)


@pytest.mark.parametrize(
    ("dropout", "message"),
    [
        (
            {"words": 0.1},
            "dropout.words: is no condition that can be hidden; there are label, text",
        ),
        ({"position": 0.1}, "dropout.position: is no condition that can be hidden"),
        ({"text": 1.5}, r"dropout.text must be in \[0, 1\]"),
    ],
)
def test_a_dropout_that_cannot_be_is_refused(dropout, message):
    with pytest.raises(UserError, match=message):
        TrainerConfig(total_images=1, checkpoint_every=1, dropout=dropout)


# --- sampling -------------------------------------------------------------------------------------


def generator(sources, **options):
    denoiser = Denoiser(network(), Karras(0.5))
    usual = {"dropout": {"label": 0.1, "text": 0.1}, "guidance": 2.0}
    made = Sampler(heun, Rho(), 3)
    return ImageGenerator(denoiser, made, (3, 8, 8), sources=sources, **(usual | options))


def prompts(*words):
    return encoded(words, ENCODER)


def test_image_i_has_prompt_i_modulo_their_number():
    source = prompts("a red star", "a blue moon", "two")
    made = generator([Labels(3), source])
    whole, _ = made.images(range(5))
    assert made.captions([0, 1, 2, 3]) == ("a red star", "a blue moon", "two", "a red star")
    assert torch.equal(made.images([4])[0][0], whole[4])
    only = generator([Labels(3), prompts("a blue moon")])
    assert torch.equal(only.images([4])[0][0], whole[4])
    assert not torch.equal(only.images([3])[0][0], whole[3])


def test_guidance_of_generated_images_removes_what_training_hid():
    """What was always there stays: one weight is then that of the other kind (to a rounding)."""
    given = [Labels(3, 1), prompts("a red star", "two")]

    def images(weight, **dropout):
        return generator(given, guidance=weight, dropout=dropout).images(range(4))[0].int()

    both, text = images(2.0, label=0.1, text=0.1), images(2.0, text=0.1)
    alone = images({"text": 2.0}, label=0.1, text=0.1)
    assert (text - alone).abs().max() <= 1 < (text - both).abs().max()
    assert (text - images(1.0, text=0.1)).abs().max() > 1


def test_captions_of_the_data_are_drawn_from_seed_and_index():
    source = Captions(IMAGES)
    words = source.captions(0, range(400))
    assert source.captions(0, [7, 3]) == (words[7], words[3])
    other = source.captions(1, range(400))
    # Of another image of the four, not only another of its two captions.
    assert [each.removesuffix(" again") for each in other] != [
        each.removesuffix(" again") for each in words
    ]
    # 8 captions that are equally likely: 50 each, a standard deviation is 6.6.
    counts = [words.count(each) for each in set(words)]
    assert len(counts) == 8 and min(counts) > 20
    found = source.condition(0, range(400))
    encoded = ENCODER.encode(words)
    assert torch.equal(found["text_mask"], encoded.mask)
    kept = encoded.mask[:, :, None]
    assert torch.equal(found["text"].masked_fill(~kept, 0), encoded.tokens.masked_fill(~kept, 0))


def test_a_caption_of_the_data_comes_with_its_images_class():
    both = {"label": 3, "text": 6}
    [source] = sources_of(both, IMAGES)
    found, words = source.condition(0, range(50)), source.captions(0, range(50))
    own = {word: {i % 3 for i in (n, n + 4)} for n, word in enumerate(WORDS)}
    for label, word in zip(found["label"].tolist(), words, strict=True):
        assert label in own[word.removesuffix(" again")]
    made = generator(sources_of(both, IMAGES, label=2))
    assert made.labels(range(3)).tolist() == [2, 2, 2]
    named = made.captions(range(50))
    assert all(2 in own[word.removesuffix(" again")] for word in named)
    with pytest.raises(UserError, match="has no image of class 1, whose caption"):
        sources_of(both, dataclasses.replace(IMAGES, labels=torch.zeros(8).long()), label=1)
    for changes in ({"labels": None}, {"classes": 5}):
        with pytest.raises(UserError, match="and the model"):
            sources_of(both, dataclasses.replace(IMAGES, **changes))
    assert sources_of({"label": 0, "text": 0}, None) == ()


def test_no_class_is_drawn_beside_a_prompt():
    both, words = {"label": 3, "text": 6}, prompts("a red star")
    made = generator(sources_of(both, None, prompts=words, dropout={"label": 0.1, "text": 0.1}))
    assert made.labels(range(3)) is None and made.captions([0]) == ("a red star",)
    given = generator(sources_of(both, None, prompts=words, label=2, dropout={"label": 0.1}))
    assert given.labels(range(2)).tolist() == [2, 2]
    # A model that never saw an image without its class is asked for one.
    always = generator(sources_of(both, None, prompts=words))
    assert set(always.labels(range(50)).tolist()) == {0, 1, 2}
    classes = generator(sources_of({"label": 3, "text": 0}, None, dropout={"label": 0.1}))
    assert set(classes.labels(range(50)).tolist()) == {0, 1, 2}


def test_a_number_says_what_was_asked():
    one = generator([Labels(3, 1), prompts("a red star")]).about()
    assert (one["label"], one["prompt"]) == (1, "a red star")
    many = generator([Labels(3), prompts("a red star", "two")]).about()
    assert many["prompts"].startswith("2 ") and many["label"] is None
    other = generator([Labels(3), prompts("two", "a red star")]).about()
    assert other["prompts"] != many["prompts"]
    drawn = generator(sources_of({"label": 3, "text": 6}, IMAGES), guidance={"text": 3.0}).about()
    assert drawn["captions"] == f"eight {TABLE.fingerprint[:12]}"
    assert drawn["guidance"] == {"text": 3.0}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (dataclasses.replace(IMAGES, texts=None), "has no encoded captions"),
        (dataclasses.replace(IMAGES, labels=None), "has no labels"),
        (dataclasses.replace(IMAGES, classes=5), "has 5 classes, and the model 3"),
    ],
)
def test_data_without_what_the_model_takes_is_refused(images, message):
    with pytest.raises(UserError, match=message):
        own_condition(images, torch.arange(2), {"label": 3, "text": 6})
    with pytest.raises(UserError, match="words gives 6 numbers a token, and the model takes 7"):
        own_condition(IMAGES, torch.arange(2), {"label": 3, "text": 7})
