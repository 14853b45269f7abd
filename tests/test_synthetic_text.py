"""Synthetic images that describe themselves, and pairs of shape and colour that are held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared import prepare
from worded import minilm_or_skip

from diffusion_pl import config, text
from diffusion_pl.data.captions import captions, facts
from diffusion_pl.data.scenes import latents
from diffusion_pl.data.synthetic import Synthetic, render
from diffusion_pl.errors import UserError
from diffusion_pl.scene_words import COLOURS, UNSEEN_WORDINGS, WORDINGS, caption, facts_of

ROOT = Path(__file__).parents[1]
PAIRS = (("heart", "green"), ("disc", "purple"))
SHAPES = ("disc", "heart")


@pytest.fixture(scope="module")
def minilm() -> text.Encoder:
    minilm_or_skip()
    return text.encoder("minilm", length=24)


def test_held_out_pairs_never_occur_and_the_count_stays():
    source = Synthetic(500, 8, 3, ["flat"], SHAPES, held_out=PAIRS)
    scenes, indices = source.scenes()
    assert len(scenes) == len(indices) == source.open().shape[0] == 500
    every = latents(3, 0, int(indices[-1]) + 1, ["flat"], SHAPES)
    assert np.array_equal(scenes.colour, every.colour[indices])
    # Nothing else is left out: what is missing is what has the pair, or no name close to it.
    missing = np.setdiff1d(np.arange(len(every)), indices)
    named = {(each.shape, each.colour) for each in facts(every[missing])}
    assert named - {("heart", None), ("disc", None)} == set(PAIRS)
    assert not {(each.shape, each.colour) for each in facts(scenes)} & set(PAIRS)
    # A pair takes about its share of a circle of hues, of half of the scenes.
    assert len(missing) / len(every) == pytest.approx((0.17 + 0.13) / 2, abs=0.04)


def test_held_out_sets_are_beginnings_of_longer_ones():
    few, many = (Synthetic(n, 8, 3, ["flat"], SHAPES, held_out=PAIRS) for n in (40, 300))
    assert np.array_equal(few.scenes()[1], many.scenes()[1][:40])
    images = few.open()
    assert images.name == "synthetic-8-disc-heart-flat-without-2-pairs"
    expected = torch.from_numpy(render(few.scenes()[0], 8))
    assert torch.equal(images.read(torch.arange(40)), expected)
    assert images.labels is not None
    assert images.labels.tolist() == [
        SHAPES.index(each.shape) for each in facts(few.scenes()[0]) if each.shape
    ]


def test_without_captions_nothing_changes():
    plain = Synthetic(20, 8, 3)
    scenes, indices = plain.scenes()
    assert indices.tolist() == list(range(20))
    assert np.array_equal(scenes.colour, latents(3, 0, 20).colour)
    assert plain.open().texts is None


def test_images_carry_the_states_of_their_captions(minilm):
    source = Synthetic(30, 8, 3, ["flat"], SHAPES, "minilm", held_out=PAIRS)
    images, plain = source.open(), Synthetic(30, 8, 3, ["flat"], SHAPES, held_out=PAIRS).open()
    assert images.fingerprint == plain.fingerprint
    texts = images.texts
    assert texts is not None
    scenes, indices = source.scenes()
    words = captions(scenes, 3, indices.tolist())
    assert [texts.captions_of(i) for i in range(30)] == [(each,) for each in words]
    assert (texts.encoder, texts.digest, texts.width) == ("minilm", minilm.digest, 384)
    assert texts.length == 24
    rows = torch.tensor([7, 0, 7])
    tokens, mask = texts.read(rows, torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64))
    expected = minilm.encode([words[i] for i in rows.tolist()])
    assert torch.equal(tokens, expected.tokens) and torch.equal(mask, expected.mask)
    null = minilm.encode([""])
    assert torch.equal(texts.null[0], null.tokens[0]) and torch.equal(texts.null[1], null.mask[0])


def test_prepared_scenes_describe_themselves_if_captions_are_wanted(tmp_path):
    kept, bare = tmp_path / "kept", tmp_path / "bare"
    options = ("--count", 12, "--seed", 3)
    assert prepare("synthetic", kept, *options, "--captions", resolutions="8") == 0
    assert prepare("synthetic", bare, *options, resolutions="8") == 0
    words = captions(latents(3, 0, 12), 3, range(12))
    assert (kept / "text" / "captions.txt").read_text().splitlines() == list(dict.fromkeys(words))
    assert not (bare / "text").exists()
    index = "dataset.json"
    assert json.loads((kept / index).read_text())["captions"]["origin"] == "the scene"
    assert "captions" not in json.loads((bare / index).read_text())


def test_no_caption_of_the_grammar_is_cut(minilm):
    scenes = latents(3, 0, 200)
    longest = [caption(each, w) for each in facts(scenes) for w in WORDINGS + UNSEEN_WORDINGS]
    assert not minilm.encode(sorted(longest, key=len)[-64:]).cut


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (Synthetic(held_out=[("heart", "mauve")]), r"held_out are pairs.*\['heart', 'mauve'\]"),
        (Synthetic(shapes=["disc"], held_out=[("star", "red")]), r"of disc and a colour"),
        (
            Synthetic(shapes=["disc"], held_out=[("disc", name) for name in COLOURS]),
            "leaves no pair",
        ),
        (Synthetic(captions="morse"), "unknown text encoder 'morse'"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_clear_line(source, complaint):
    with pytest.raises(UserError, match=complaint):
        source.prepare()


def test_the_experiment_is_measured_on_what_it_never_sees():
    """Its prompts name held-out pairs, in wordings that training does not have."""
    experiment = config.load("synthetic_text", (), ROOT / "experiments")
    source = config.build(experiment, "data.dataset")
    pairs = {tuple(pair) for pair in source.held_out}
    prompts = (ROOT / experiment.tree["evaluation"]["prompts"]).read_text().splitlines()
    assert len(prompts) == experiment.tree["evaluation"]["count"] == 500
    asked = [facts_of(prompt) for prompt in prompts]
    assert {(each.shape, each.colour) for each in asked} == pairs
    assert all(each.tone_of_ground for each in asked)
    scenes, indices = source.scenes()
    assert not set(prompts) & set(captions(scenes, source.seed, indices.tolist()))
    starts = {prompt.split()[0] for prompt in prompts}
    assert starts & {"there", "look", "the"} and len(set(prompts)) > 100
