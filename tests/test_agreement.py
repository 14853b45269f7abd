"""Captions of synthetic scenes say what is drawn, and the judge of images agrees on true ones."""

from __future__ import annotations

import colorsys
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from diffusion_pl.data.captions import captions, facts, without
from diffusion_pl.data.scenes import GROUNDS, latents
from diffusion_pl.data.shapes import SHAPES
from diffusion_pl.data.synthetic import render
from diffusion_pl.errors import UserError
from diffusion_pl.metrics import agreement as judged
from diffusion_pl.metrics import shapes
from diffusion_pl.metrics.agreement import ANSWERS, UNASKED, Agreement, agreement, asked, seen
from diffusion_pl.metrics.features import TILE, Features
from diffusion_pl.scene_words import (
    COLOURS,
    HUES,
    KINDS,
    UNSEEN_WORDINGS,
    WORDINGS,
    Facts,
    caption,
    colour_of,
    facts_of,
    hue_and_chroma,
    luma,
)
from diffusion_pl.scene_words import SHAPES as SHAPE_WORDS

SEED = 100  # not one that the classifier was trained or selected on


def test_every_shape_and_ground_has_a_word():
    assert tuple(SHAPES) == SHAPE_WORDS
    assert tuple(KINDS) == GROUNDS


def test_hue_and_chroma_are_those_of_hsv():
    """The definition, by Python's own library."""
    colours = np.random.default_rng(0).uniform(size=(200, 3))
    colours[0] = 0.5
    hue, chroma = hue_and_chroma(colours)
    for rgb, h, c in zip(colours, hue, chroma, strict=True):
        expected, saturation, value = colorsys.rgb_to_hsv(*rgb)
        assert h == pytest.approx(expected, abs=1e-9)
        assert c == pytest.approx(saturation * value, abs=1e-9)
    assert luma(np.array([1.0, 0.0, 0.0])) == pytest.approx(0.299)


def test_a_hue_has_the_name_of_the_nearest_middle_round_the_circle():
    names, margins = colour_of(np.array([*HUES.values(), 0.96, 0.945, 0.04, 0.2449]))
    assert [COLOURS[name] for name in names] == [*COLOURS, "red", "pink", "red", "yellow"]
    # Red's neighbours are orange at 0.08 and pink at 0.90: the boundaries lie at 0.04 and 0.95.
    assert margins[0] == pytest.approx(0.04)
    assert margins[-4:] == pytest.approx([0.01, 0.005, 0.0, 0.0001], abs=1e-9)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "a large red heart on a green ground",
            Facts(shape="heart", colour="red", size="large", ground_colours=("green",)),
        ),
        (
            "A blue triangle on a YELLOW ground.",
            Facts(shape="triangle", colour="blue", ground_colours=("yellow",)),
        ),
        (
            "a dark striped background of yellow and blue, with a light teal ring",
            # What stands before a noun belongs to it, so two colours of a ring are none.
            Facts(shape="ring", tone="light", ground_tone="dark", kind="striped"),
        ),
        (
            "a disc on a striped yellow and blue ground",
            Facts(shape="disc", kind="striped", ground_colours=("yellow", "blue")),
        ),
        ("a heart and a star on a light ground", Facts(ground_tone="light")),
        ("a disc on a plain red, green and blue ground", Facts(shape="disc", kind="plain")),
        ("a photograph of my cat", Facts()),
    ],
)
def test_words_are_read_as_facts(words, expected):
    assert facts_of(words) == expected


def test_the_shape_and_its_ground_have_opposite_tones():
    assert Facts(tone="dark").tone_of_ground == "light"
    assert Facts(tone="light").tone_of_ground == "dark"
    assert Facts(tone="light", ground_tone="light").tone_of_ground == "light"
    assert Facts().tone_of_ground is None


@pytest.mark.parametrize("wording", WORDINGS + UNSEEN_WORDINGS)
def test_what_a_wording_says_is_read_again_and_true(wording):
    """Every combination of facts that are said and left out."""
    told = set()
    for colour, tone, size, ground, kind, colours in itertools.product(
        (None, "orange"), ("dark",), (None, "small"), ("light",), ("plain", "checked"),
        ((), ("teal",), ("red", "blue")),
    ):  # fmt: skip
        whole = Facts("star", colour, tone, size, ground, kind, colours)
        words = caption(whole, wording)
        assert "  " not in words and "{" not in words and " a o" not in words
        read = facts_of(words)
        assert read.shape == "star"
        for field in dataclasses.fields(Facts):
            said = getattr(read, field.name)
            assert not said or said == getattr(whole, field.name)
            if said:
                told.add(field.name)
    slots = {"ground_colour": "ground_colours"}
    assert told == {
        slots.get(name, name)
        for name in ("shape", "colour", "tone", "size", "ground_tone", "kind", "ground_colour")
        if "{" + name + "}" in wording
    }


def test_facts_are_those_of_the_scene():
    scenes = latents(SEED, 0, 4000)
    for i, fact in enumerate(facts(scenes)):
        rgb = scenes.colour[i].astype(float)
        assert fact.shape == list(SHAPES)[scenes.label[i]]
        assert (fact.tone == "dark") == (rgb @ [0.299, 0.587, 0.114] < 0.5)
        near = scenes.near[i].astype(float) @ [0.299, 0.587, 0.114]
        assert fact.ground_tone == ("light" if near > 0.5 else "dark")
        hue = colorsys.rgb_to_hsv(*rgb)[0]
        away = sorted((min(abs(hue - at), 1 - abs(hue - at)), name) for name, at in HUES.items())
        # 0.01 from the boundary is 0.02 between the distances.
        if away[1][0] - away[0][0] > 0.0201:
            assert fact.colour == away[0][1]
        elif away[1][0] - away[0][0] < 0.0199:
            assert fact.colour is None
        assert (fact.size == "large") == (scenes.radius[i] > 0.35)
        assert (fact.size == "small") == (scenes.radius[i] < 0.31)
        flat = GROUNDS[scenes.ground[i]] == "flat"
        assert fact.kind == KINDS[GROUNDS[scenes.ground[i]]]
        assert len(fact.ground_colours) <= (1 if flat else 2)
        for name, colour in zip(fact.ground_colours[:1], (scenes.near[i],), strict=False):
            hue = colorsys.rgb_to_hsv(*colour.astype(float))[0]
            assert min(abs(hue - HUES[name]), 1 - abs(hue - HUES[name])) < 0.086
            assert colour.max() - colour.min() >= 0.15 - 1e-6


def test_a_caption_depends_on_seed_and_scene_alone():
    scenes = latents(SEED, 0, 300)
    whole = captions(scenes, SEED, range(300))
    rows = np.array([250, 3])
    assert captions(scenes[rows], SEED, [250, 3]) == [whole[250], whole[3]]
    assert captions(scenes, SEED + 1, range(300)) != whole
    # All wordings are in use, each as often: a count is binomial, 5 standard deviations.
    used = [
        sum(
            words == caption(fact, wording)
            for words, fact in zip(whole, facts(scenes), strict=True)
        )
        for wording in WORDINGS
    ]
    assert min(used) > 300 / 7 - 5 * 6.1
    for words, fact in zip(whole, facts(scenes), strict=True):
        assert facts_of(words).shape == fact.shape


def test_scenes_of_pairs_are_found_by_the_nearest_name():
    scenes = latents(SEED, 0, 4000)
    kept = without(scenes, [("heart", "green"), ("star", "red")])
    hues = [colorsys.rgb_to_hsv(*rgb.astype(float))[0] for rgb in scenes.colour]
    names = np.array(list(SHAPES))[scenes.label]
    out = [
        # Midway between the middles: yellow .16, green .33, teal .50; pink .90, red 0, orange .08.
        (name == "heart" and 0.245 < hue < 0.415) or (name == "star" and not 0.04 < hue < 0.95)
        for name, hue in zip(names, hues, strict=True)
    ]
    assert kept.tolist() == [not each for each in out]


@pytest.mark.parametrize(("resolution", "least"), [(16, 0.98), (32, 0.995), (64, 0.995)])
@pytest.mark.parametrize("grounds", [("flat",), GROUNDS], ids=["flat", "all"])
def test_true_renders_agree_with_their_captions(resolution, least, grounds):
    """What a judge is worth: on true images shape and colour 98 to 100 %, tone 100 %."""
    scenes = latents(SEED, 0, 480, grounds)
    images = torch.from_numpy(render(scenes, resolution))
    judge = shapes.load()
    shown = torch.cat([seen(images[at : at + TILE], judge) for at in range(0, 480, TILE)])
    said = [caption(each, WORDINGS[1]) for each in facts(scenes)]
    values, notes = agreement(asked(said), shown)
    assert values["agreement_tone"] == 1.0
    assert values["agreement_shape"] >= least
    assert values["agreement_colour"] >= least
    assert notes["asked"]["agreement_shape"] == 480
    if grounds == ("flat",):
        assert values["agreement_ground"] >= 0.98
    # Shuffled: the true marginals, near to guessing for as many answers.
    assert notes["shuffled"]["agreement_shape"] == pytest.approx(1 / 8, abs=0.02)
    assert notes["shuffled"]["agreement_colour"] == pytest.approx(1 / 8, abs=0.03)
    assert notes["shuffled"]["agreement_tone"] == pytest.approx(1 / 2, abs=0.02)
    assert notes["chance"]["agreement_shape"] == 1 / 8
    assert notes["chance"]["agreement_tone"] == 1 / 2


def test_agreement_counts_what_is_asked():
    """By hand: columns shape, colour, tone, ground."""
    none = UNASKED
    wanted = torch.tensor([[3, 0, 1, none], [4, none, none, none], [none] * 4, [3, 5, 1, 2]])
    shown = torch.tensor([[3, 0, 1, 6], [3, 0, 0, 0], [3, 0, 1, 2], [3, 0, 1, 2]])
    values, notes = agreement(wanted, shown)
    assert values == {
        "agreement": pytest.approx(1 / 3),
        "agreement_shape": pytest.approx(2 / 3),
        "agreement_colour": pytest.approx(1 / 2),
        "agreement_tone": 1.0,
        "agreement_ground": 1.0,
    }
    assert notes["asked"] == {
        "agreement": 3, "agreement_shape": 3, "agreement_colour": 2, "agreement_tone": 2,
        "agreement_ground": 1,
    }  # fmt: skip
    chance = (1 / 128 + 1 / 8 + 1 / 1024) / 3
    assert notes["chance"]["agreement"] == pytest.approx(chance)
    assert notes["chance"]["agreement_colour"] == pytest.approx(1 / 8)
    # Each of the captions against the three other images.
    assert notes["shuffled"]["agreement_shape"] == pytest.approx((3 + 0 + 3) / 9)
    assert notes["shuffled"]["agreement_tone"] == pytest.approx((2 + 2) / 6)
    assert notes["shuffled"]["agreement"] == pytest.approx((2 + 0 + 0) / 9)


def test_what_is_not_judged_is_not_asked():
    rows = asked(["a red heart on a striped yellow and blue ground", "a dark star", "my cat"])
    assert rows.tolist() == [[3, 0, UNASKED, UNASKED], [7, UNASKED, 0, UNASKED], [UNASKED] * 4]
    assert asked(["a disc on a striped yellow ground"])[0, 3] == UNASKED
    assert asked(["a disc on a yellow ground"])[0, 3] == COLOURS.index("yellow")
    with pytest.raises(UserError, match=r"no caption names a shape \(disc.*, a colour"):
        agreement(rows[2:], torch.zeros(1, 4, dtype=torch.int64))


def test_the_metric_judges_batches_of_any_size_as_one():
    scenes = latents(SEED, 0, 40, ("flat",))
    images = torch.from_numpy(render(scenes, 16))
    said = tuple(caption(each, WORDINGS[0]) for each in facts(scenes))
    said = ("a star on a plain ground", *said[1:])
    settings = Agreement()
    metric = settings.build(shapes.load(), None, 40)
    for part in (slice(0, 32), slice(32, 40)):
        metric.update(Features(torch.zeros(1, 1), images=images[part], captions=said[part]))
    values = metric.compute()
    rows = torch.cat([seen(images[:32], shapes.load()), seen(images[32:], shapes.load())])
    assert (values, metric.notes) == agreement(asked(said), rows)
    assert tuple(values) == settings.numbers(shapes.load())
    assert settings.wants_captions
    assert set(ANSWERS) == {"shape", "colour", "tone", "ground"}
    assert judged.UNASKED == -1


def framed(*parts: tuple[int, tuple[float, float, float]]) -> torch.Tensor:
    """An image of 16 pixels whose border, from the top left by rows, has so many of each colour."""
    edge = np.ones((16, 16), dtype=bool)
    edge[1:-1, 1:-1] = False
    image = np.zeros((16, 16, 3))
    image[edge] = [rgb for count, rgb in parts for _ in range(count)]
    return torch.from_numpy((255 * image).round().astype(np.uint8).transpose(2, 0, 1))[None]


def test_the_ground_is_the_median_of_the_whole_border():
    """Not of its rows alone, and no mean, which outliers would move to another name or tone."""
    judge = shapes.load()
    blue, red, white, grey = (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (1.0,) * 3, (0.45,) * 3
    ground = [seen(framed((34, blue), (26, red)), judge)[0, 3]]
    assert [COLOURS[place] for place in ground] == ["blue"]  # the mean's hue is a purple
    tones = [framed((40, grey), (20, white)), framed((16, white), (44, grey))]
    # The rows at the top and the bottom are mostly white, the border is not: 24 of 60.
    rows = framed((12, white), (36, grey), (12, white))
    assert [seen(each, judge)[0, 2] for each in (*tones, rows)] == [1, 1, 1]


def test_an_image_is_judged_by_itself():
    """The contrast of its neighbours in a batch is nothing to it."""
    judge, faint = shapes.load(), torch.full((1, 3, 16, 16), 128, dtype=torch.uint8)
    faint[:, :, 4:12, 4:12] = torch.tensor([120, 120, 150], dtype=torch.uint8)[:, None, None]
    strong = torch.zeros_like(faint)
    strong[:, :, 4:12, 4:12] = 255
    both = seen(torch.cat([faint, strong]), judge)
    assert COLOURS[both[0, 1]] == "blue"
    assert torch.equal(both, torch.cat([seen(faint, judge), seen(strong, judge)]))


def test_an_image_without_an_object_is_judged_without_complaint():
    """Equal pixels have no object and no hue; the numbers stay finite."""
    grey = torch.full((2, 3, 16, 16), 128, dtype=torch.uint8)
    assert seen(grey, shapes.load()).shape == (2, 4)
