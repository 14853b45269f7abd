"""Captions and token states: the right caption's states, nothing where there is none, once each."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from loaders import loader
from worded import WordEncoder

from diffusion_pl.data.dataset import load, reduced
from diffusion_pl.data.encoding import batch_size, text_table
from diffusion_pl.data.order import Order
from diffusion_pl.errors import UserError
from diffusion_pl.texts import Captions, TextTable
from diffusion_pl.training import sameness

# Several captions, one, none, one in several images, letters of several bytes.
SPOKEN = [
    ("a red star", "a star", "the red star"),
    ("a blue ring",),
    (),
    ("a star",),
    ("ein grüner 円", "a blue ring"),
    ("a long caption of seven words altogether",),
    (),
]


@pytest.fixture
def table() -> TextTable:
    return text_table(Captions.of(SPOKEN), WordEncoder())


def images_with(table, count=7, side=8):
    pixels = torch.arange(count * 3 * side * side).remainder(256).to(torch.uint8)
    images = load("spoken", pixels.view(count, 3, side, side))
    return dataclasses.replace(images, texts=table)


def test_captions_come_back_as_they_went_in(table):
    assert [table.captions_of(image) for image in range(len(SPOKEN))] == SPOKEN
    assert len(table.captions) == len({each for spoken in SPOKEN for each in spoken})


def test_each_different_caption_and_the_empty_one_are_encoded_once():
    encoder = WordEncoder()
    text_table(Captions.of(SPOKEN * 30), encoder)
    different = {each for spoken in SPOKEN for each in spoken}
    assert sorted(encoder.asked) == sorted(different | {""})


def test_an_image_gets_the_states_of_its_chosen_caption_and_zeros_behind_them(table):
    encoder = WordEncoder()
    for image, spoken in enumerate(SPOKEN):
        for place, caption in enumerate(spoken):
            # Any choice in [place / k, (place + 1) / k) takes it.
            for within in (0.0, 0.5, 0.999):
                choice = torch.tensor([(place + within) / len(spoken)], dtype=torch.float64)
                text, mask = table.read(torch.tensor([image]), choice)
                states = encoder.states(caption)
                assert text.dtype == torch.float16 and mask.dtype == torch.bool
                assert text.shape == (1, 5, 6) and mask.shape == (1, 5)
                assert mask[0].tolist() == [True] * len(states) + [False] * (5 - len(states))
                assert torch.equal(text[0, : len(states)], torch.from_numpy(states))
                assert not text[0, len(states) :].any()
                assert table.caption(image, choice.item()) == caption


def test_an_image_without_captions_has_no_token(table):
    choice = torch.tensor([0.0, 0.7], dtype=torch.float64)
    text, mask = table.read(torch.tensor([2, 6]), choice)
    assert not text.any() and not mask.any()
    assert table.caption(2, 0.3) == ""


def test_the_null_is_the_encoding_of_the_empty_caption(table):
    text, mask = table.null
    assert mask.tolist() == [True, True, False, False, False]
    assert torch.equal(text[:2], torch.from_numpy(WordEncoder().states("")))
    assert not text[2:].any()


def test_the_empty_caption_may_be_a_batch_of_its_own():
    encoder = WordEncoder()
    words = [(f"n {i}",) for i in range(batch_size(encoder))]
    text, mask = text_table(Captions.of(words), encoder).null
    assert torch.equal(text[mask], torch.from_numpy(encoder.states("")))


def test_states_that_float16_cannot_hold_and_captions_without_a_token_are_refused():
    class Loud(WordEncoder):
        def encode(self, captions):
            found = super().encode(captions)
            return found._replace(tokens=found.tokens.float() * 1e5)

    class Mute(WordEncoder):
        def encode(self, captions):
            found = super().encode(captions)
            return found._replace(mask=torch.zeros_like(found.mask))

    for encoder, problem in ((Loud(), "not finite"), (Mute(), "none")):
        with pytest.raises(UserError, match=f"'a red star' are {problem}"):
            text_table(Captions.of(SPOKEN), encoder)


def test_padding_on_the_left_is_left_out_as_that_on_the_right_is(table):
    class Left(WordEncoder):
        def encode(self, captions):
            found = super().encode(captions)
            return found._replace(tokens=found.tokens.flip(1), mask=found.mask.flip(1))

    left = text_table(Captions.of(SPOKEN), Left())
    choice = torch.zeros(7, dtype=torch.float64)
    text, mask = left.read(torch.arange(7), choice)
    other, same = table.read(torch.arange(7), choice)
    assert torch.equal(mask, same)
    for row, count in enumerate(mask.sum(1).tolist()):
        assert torch.equal(text[row, :count].flip(0), other[row, :count])


def test_the_fingerprint_covers_encoder_length_captions_and_whose_they_are(table):
    others = [
        text_table(Captions.of(SPOKEN), WordEncoder(digest="cd" * 32)),
        text_table(Captions.of(SPOKEN), WordEncoder(length=6)),
        text_table(Captions.of(SPOKEN), WordEncoder(width=4)),
        text_table(Captions.of(SPOKEN[::-1]), WordEncoder()),
        text_table(Captions.of([*SPOKEN[:-1], ("a star",)]), WordEncoder()),
        text_table(Captions.of([("a green star", *SPOKEN[0][1:]), *SPOKEN[1:]]), WordEncoder()),
    ]
    prints = {table.fingerprint, *(each.fingerprint for each in others)}
    assert len(prints) == 7
    assert text_table(Captions.of(SPOKEN), WordEncoder()).fingerprint == table.fingerprint


# The loader.


def test_batches_have_the_text_of_their_images_and_data_without_texts_have_none(table):
    batches = loader(images_with(table), 5, 20)
    seen = set()
    for step in range(20):
        batch = batches[step]
        assert batch["text"].dtype == torch.float16 and batch["text_mask"].dtype == torch.bool
        images = Order(7, 0)(5 * step, 5 * step + 5).tolist()
        for row, image in enumerate(images):
            known = {WordEncoder().states(each).tobytes(): each for each in SPOKEN[image]}
            states = batch["text"][row][batch["text_mask"][row]].numpy().tobytes()
            assert states in known or (not SPOKEN[image] and not states)
            seen.add((image, known.get(states)))
    # Each of an image's captions comes up.
    assert seen == {(i, each) for i, s in enumerate(SPOKEN) for each in s or (None,)}
    assert "text" not in loader(images_with(None), 5)[0]


def test_the_choice_depends_on_seed_and_position_alone(table):
    images = images_with(table)
    whole = [loader(images, 6, 9, seed=3)[step] for step in range(9)]
    halves = [
        [loader(images, 6, 9, seed=3, start=2, rank=rank, world_size=2)[step] for rank in (0, 1)]
        for step in range(9)
    ]
    for one, parts in zip(whole, halves, strict=True):
        for name in ("text", "text_mask"):
            assert torch.equal(one[name], torch.cat([part[name] for part in parts]))
    other = [loader(images, 6, 9, seed=4)[step]["text"] for step in range(9)]
    assert any(not torch.equal(a["text"], b) for a, b in zip(whole, other, strict=True))


def test_the_caption_of_an_image_changes_from_epoch_to_epoch():
    table = text_table(Captions.of([("a", "b", "c", "d")]), WordEncoder())
    chosen = [loader(images_with(table, 1), 1, 400)[step]["text"][0, 1] for step in range(400)]
    words = [WordEncoder().states(each)[1] for each in "abcd"]
    counts = [sum(np.array_equal(each.numpy(), word) for each in chosen) for word in words]
    # Binomial: 100 of 400 each, standard deviation 8.7.
    assert sum(counts) == 400 and all(60 < count < 140 for count in counts)


def test_readers_hand_the_texts_over(table):
    wanted = loader(images_with(table), 5, 20, num_workers=2)
    for step, batch in enumerate(wanted):
        here = wanted[step]
        for name in ("image", "text", "text_mask"):
            assert torch.equal(batch[name], here[name]), (step, name)
    assert sum(each.nbytes for each in here.values()) <= wanted.most_bytes


def test_the_bound_of_a_batch_counts_its_text():
    """A batch of small images is mostly text."""
    images = images_with(text_table(Captions.of(SPOKEN), WordEncoder(width=64, length=40)), side=4)
    batches = loader(images, 5)
    assert sum(each.nbytes for each in batches[0].values()) <= batches.most_bytes


def test_reduced_images_keep_their_texts(table):
    assert reduced(images_with(table), 4).texts is table


# Resuming.


def test_another_encoder_or_other_captions_are_other_data(table):
    then = sameness.data_of({8: images_with(table)})
    assert sameness.data_changed(then, sameness.data_of({8: images_with(table)})) is None
    other = text_table(Captions.of(SPOKEN), WordEncoder(name="letters", digest="cd" * 32))
    told = sameness.data_changed(then, sameness.data_of({8: images_with(other)}))
    assert "abababababab" in told and "cdcdcdcdcdcd" in told and "letters" in told
    changed = text_table(Captions.of(SPOKEN[::-1]), WordEncoder())
    assert sameness.data_changed(then, sameness.data_of({8: images_with(changed)}))
    bare = sameness.data_of({8: images_with(None)})
    assert "text" not in bare  # as in runs of earlier versions
    assert "without texts" in sameness.data_changed(then, bare)
    assert "without texts" in sameness.data_changed(bare, then)


def test_what_is_stored_of_captions_is_one_line_each(table):
    files = table.captions.files()
    lines = files["captions.txt"].decode().splitlines()
    assert lines == list(dict.fromkeys(each for spoken in SPOKEN for each in spoken))
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert set(digests) == {"captions.txt", "lines.npy", "starts.npy", "numbers.npy"}
