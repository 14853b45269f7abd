"""Token states on the disk: the encoder's own, once each, resumable, remote, damaged."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders import loader
from prepared import digests, file, fill, noise, prepare, tarred
from servers import served
from worded import WordEncoder

from diffusion_pl import cli
from diffusion_pl.data import encodings
from diffusion_pl.data.encoding import text_table
from diffusion_pl.data.encodings import encode
from diffusion_pl.data.shards import Shards
from diffusion_pl.data.verify import verify
from diffusion_pl.errors import UserError
from diffusion_pl.texts import Captions
from diffusion_pl.training import sameness

# 132 different captions in 150 images, of which each tenth has none and each seventh two.
SPOKEN = [
    () if i % 10 == 9 else (f"number {i % 145} is spoken", "twice")[: 1 + (i % 7 == 0)]
    for i in range(150)
]


def nothing(before: int, done: int, total: int) -> None:
    pass


def spoken_set(folder: Path, spoken=SPOKEN) -> Path:
    contents: dict[str, bytes] = {}
    for i, captions in enumerate(spoken):
        contents |= {
            f"{i:03}.png": file(noise(i, 4, 4)),
            f"{i:03}.txt": "\n".join(captions).encode(),
        }
    source = tarred(folder.with_suffix(".tar"), contents)
    words = ("--workers", 1, "--shard-images", 40)
    assert prepare(source, folder, *words, resolutions="4") == 0
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """With captions, which are not encoded."""
    return spoken_set(tmp_path_factory.mktemp("sets") / "spoken")


@pytest.fixture
def made(bare, tmp_path) -> Path:
    shutil.copytree(bare, tmp_path / "set")
    encode(tmp_path / "set", WordEncoder(), nothing)
    return tmp_path / "set"


def opened(where: object, text: str | None = "words", **settings):
    return Shards(str(where), 4, text=text, **settings).open()


def test_what_is_read_is_what_the_encoder_gave(made):
    stored = opened(made).texts
    memory = text_table(Captions.of(SPOKEN), WordEncoder())
    images = torch.arange(150).flip(0)
    for choice in (0.0, 0.6):
        choices = torch.full((150,), choice, dtype=torch.float64)
        for ours, truth in zip(
            stored.read(images, choices), memory.read(images, choices), strict=True
        ):
            assert torch.equal(ours, truth) and ours.dtype == truth.dtype
    assert [stored.captions_of(i) for i in range(150)] == SPOKEN
    assert all(map(torch.equal, stored.null, memory.null))
    # The same data, wherever it lies.
    assert stored.fingerprint == memory.fingerprint
    assert (stored.encoder, stored.digest) == ("words", "ab" * 32)
    assert (stored.width, stored.length) == (6, 5)


def test_each_different_caption_is_encoded_once_and_padding_is_not_stored(bare, tmp_path):
    folder = shutil.copytree(bare, tmp_path / "set")
    encoder = WordEncoder()
    encoding, already = encode(folder, encoder, nothing)
    different = {each for spoken in SPOKEN for each in spoken}
    assert not already and sorted(encoder.asked) == sorted(different | {""})
    tokens = sum(len(encoder.states(each)) for each in different | {""})
    assert sum(block.bytes for block in encoding.blocks) == tokens * 6 * 2
    # "number N is spoken" has four words, and three fit.
    assert encoding.cut == sum(len(each.split()) > 3 for each in different)
    again = WordEncoder()
    assert encode(folder, again, nothing) == (encoding, True) and not again.asked


def test_the_shards_and_their_description_are_not_touched(bare, made):
    before, after = digests(bare), digests(made)
    assert {name: after.get(name) for name in before} == before
    new = {Path(name).parts[:2] for name in after.keys() - before.keys()}
    assert ("text", "encodings.json") in new and len(new) <= 3


class Interrupted(Exception):
    pass


class Failing(WordEncoder):
    """Fails at the third batch."""

    def encode(self, captions):
        if len(self.asked) >= 128:
            raise Interrupted
        return super().encode(captions)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that end with each batch of 64 captions."""
    monkeypatch.setattr(encodings, "BLOCK_BYTES", 1)
    monkeypatch.setattr("diffusion_pl.data.encoding._MOST", 64)


def test_an_interrupted_encoding_goes_on_to_the_same_bytes(bare, tmp_path, small_blocks):
    whole = shutil.copytree(bare, tmp_path / "whole")
    parts = shutil.copytree(bare, tmp_path / "parts")
    encoding, _ = encode(whole, WordEncoder(), nothing)
    assert len(encoding.blocks) == 3
    with pytest.raises(Interrupted):
        encode(parts, Failing(), nothing)
    assert not (parts / "text" / "encodings.json").exists()
    with pytest.raises(UserError, match="not encoded"):
        opened(parts)
    reports = []
    rest = WordEncoder()
    encode(parts, rest, lambda *counts: reports.append(counts))
    assert len(rest.asked) == len(Captions.of(SPOKEN)) + 1 - 128
    assert reports[0][0] == 128 and sum(reports[-1][:2]) == reports[-1][2]
    assert digests(whole) == digests(parts)
    assert not list(parts.rglob(".progress"))


def test_blocks_double_up_to_the_largest(bare, tmp_path, monkeypatch):
    """So that a small set resumes, too, and a large one lies in few files."""
    monkeypatch.setattr(encodings, "FIRST_BYTES", 1000)
    monkeypatch.setattr(encodings, "BLOCK_BYTES", 3000)
    monkeypatch.setattr("diffusion_pl.data.encoding._MOST", 1)
    monkeypatch.setattr("diffusion_pl.data.encoding._LEAST", 1)
    folder = shutil.copytree(bare, tmp_path / "set")
    encoding, _ = encode(folder, WordEncoder(), nothing)
    *sizes, _ = (block.bytes for block in encoding.blocks)
    caption = 5 * 6 * 2  # bytes at most, by which a block may be larger
    assert len(sizes) == 3
    for size, least in zip(sizes, (1000, 2000, 3000), strict=True):
        assert least <= size < least + caption


def test_a_block_that_is_not_whole_is_encoded_again(bare, tmp_path, small_blocks):
    folder = shutil.copytree(bare, tmp_path / "set")
    with pytest.raises(Interrupted):
        encode(folder, Failing(), nothing)
    [block] = folder.glob("text/*/000001.f16")
    block.write_bytes(block.read_bytes()[:-2])
    rest = WordEncoder()
    encode(folder, rest, nothing)
    assert len(rest.asked) == len(Captions.of(SPOKEN)) + 1 - 64
    verify(folder)


def test_blocks_end_with_a_batch_and_captions_lie_in_several(bare, tmp_path, small_blocks):
    folder = shutil.copytree(bare, tmp_path / "set")
    encode(folder, WordEncoder(), nothing)
    table = opened(folder).texts
    memory = text_table(Captions.of(SPOKEN), WordEncoder())
    zeros = torch.zeros(150, dtype=torch.float64)
    images = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert torch.equal(table.read(images, zeros)[0], memory.read(images, zeros)[0])


def test_more_blocks_than_are_mapped_at_a_time(bare, tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr(encodings, "_MAPPED", 1)
    folder = shutil.copytree(bare, tmp_path / "set")
    encode(folder, WordEncoder(), nothing)
    table = opened(folder).texts
    memory = text_table(Captions.of(SPOKEN), WordEncoder())
    zeros = torch.zeros(150, dtype=torch.float64)
    assert torch.equal(
        table.read(torch.arange(150), zeros)[0], memory.read(torch.arange(150), zeros)[0]
    )
    assert len(table.states._maps) == 1


# In training.


def test_batches_of_shards_carry_text_at_every_resolution_and_from_readers(made):
    images = opened(made)
    wanted = loader(images, 30, 10, num_workers=2, seed=5)
    memory = text_table(Captions.of(SPOKEN), WordEncoder())
    for step, batch in enumerate(wanted):
        here = wanted[step]
        for name in ("text", "text_mask"):
            assert torch.equal(batch[name], here[name])
        indices = wanted.order(30 * step, 30 * step + 30)
        for row, image in enumerate(indices.tolist()):
            known = [WordEncoder().states(each).tobytes() for each in SPOKEN[image]] or [b""]
            assert batch["text"][row][batch["text_mask"][row]].numpy().tobytes() in known
    assert memory.fingerprint == images.texts.fingerprint


def test_texts_are_off_by_default_and_auto_takes_the_only_one(made):
    assert opened(made, None).texts is None
    assert "text" not in loader(opened(made, None), 10)[0]
    assert opened(made, "auto").texts.encoder == "words"
    encode(made, WordEncoder(name="other", digest="cd" * 32), nothing)
    with pytest.raises(UserError, match=r"encoded by words, other; choose by data.dataset.text=wo"):
        opened(made, "auto")
    assert opened(made, "other").texts.digest == "cd" * 32
    assert opened(made, "words").texts.digest == "ab" * 32
    with pytest.raises(UserError, match="not encoded by word"):  # a name is taken whole
        opened(made, "word")
    verify(made)


def test_another_encoding_is_other_data(made):
    encode(made, WordEncoder(name="other", digest="cd" * 32), nothing)
    one, two = (sameness.data_of({4: opened(made, name)}) for name in ("words", "other"))
    told = sameness.data_changed(one, two)
    assert "abababababab" in told and "cdcdcdcdcdcd" in told


def test_a_copy_in_another_process_reads_the_same(made):
    images = opened(made)
    zeros = torch.zeros(20, dtype=torch.float64)
    truth = images.texts.read(torch.arange(20), zeros)[0]
    copy = pickle.loads(pickle.dumps(images))
    assert torch.equal(copy.texts.read(torch.arange(20), zeros)[0], truth)


def test_an_image_that_stands_in_for_a_broken_one_brings_its_own_caption(made):
    from sharded import damage

    damage(made, 0, 4)
    images = opened(made, skip_broken=1)
    with pytest.warns(UserWarning, match="replaced"):
        batch = loader(images, 150)[0]
    place = loader(images, 150).order(0, 150).tolist().index(0)
    states = batch["text"][place][batch["text_mask"][place]]
    # Image 1, unlabelled as image 0 is, is the next.
    assert torch.equal(states, torch.from_numpy(WordEncoder().states(SPOKEN[1][0])))


# What is not there.


def test_what_is_missing_is_said_with_the_command_that_makes_it(bare, tmp_path):
    command = f"python -m diffusion_pl prepare {bare} --encode"
    for text, encoder in (("minilm", "minilm"), ("auto", "minilm"), ("hf:x/y", "hf:x/y")):
        data = Shards(str(bare), 4, text=text)
        for attempt in (data.prepare, data.open):
            with pytest.raises(UserError, match="not encoded") as error:
                attempt()
            assert str(error.value).endswith(f"{command} {encoder}")
    mute = spoken_set(tmp_path / "mute", [()] * 8)
    for attempt in (lambda: opened(mute), lambda: encode(mute, WordEncoder(), nothing)):
        with pytest.raises(UserError, match="prepared without captions; prepare it again"):
            attempt()


def test_another_encoder_of_the_same_name_is_refused_with_both_digests(made):
    for other in (WordEncoder(digest="cd" * 32), WordEncoder(length=4)):
        with pytest.raises(
            UserError, match=r"words of sha256 abababababab in 5 tokens, and"
        ) as told:
            encode(made, other, nothing)
        assert f"sha256 {other.digest[:12]} and {other.length} tokens" in str(told.value)


def test_states_of_other_captions_are_refused(made, tmp_path):
    other = spoken_set(tmp_path / "other", [("something else",)] * 150)
    shutil.copytree(made / "text", tmp_path / "kept")
    for each in (tmp_path / "kept").iterdir():
        if each.name not in os.listdir(other / "text"):
            shutil.move(str(each), other / "text" / each.name)
    with pytest.raises(UserError, match="other captions than these were encoded"):
        opened(other)
    with pytest.raises(UserError, match="other captions were encoded"):
        encode(other, WordEncoder(), nothing)
    with pytest.raises(UserError, match="words encoded other captions"):
        verify(other)


# What is damaged, or meant badly.


def test_a_damaged_state_is_an_error_and_never_read(made):
    [block] = made.glob("text/*/000000.f16")
    data = bytearray(block.read_bytes())
    data[-1] ^= 1
    block.write_bytes(data)
    table = opened(made).texts
    table.read(torch.tensor([0]), torch.zeros(1, dtype=torch.float64))
    with pytest.raises(UserError, match=r"000000.f16: damaged at byte"):
        _ = table.null  # which lies last
    with pytest.raises(UserError, match=r"000000.f16: is damaged"):
        verify(made)
    block.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        opened(made).texts.read(torch.tensor([0]), torch.zeros(1, dtype=torch.float64))
    block.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be read|damaged"):
        opened(made).texts.read(torch.tensor([0]), torch.zeros(1, dtype=torch.float64))


def change(folder: Path, **changes: object) -> None:
    path = folder / "text" / "encodings.json"
    said = json.loads(path.read_text())
    said["encodings"][0] |= changes
    path.write_text(json.dumps(said))


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 0},
        {"width": 2.0},
        {"length": True},
        {"cut": -1},
        {"digest": "x"},
        {"captions": 3},
        {"encoder": "../../x"},
        {"encoder": "a\nb"},
        {"encoder": 1},
        {"index": {"file": "/etc/passwd", "bytes": 1, "sha256": "0" * 64}},
        {"blocks": [{"file": "text/../../x", "bytes": 1, "sha256": "0" * 64}]},
        {"blocks": [{"file": "x"}]},
        {"blocks": 3},
        {"more": 1},
    ],
)
def test_a_description_that_is_not_as_it_is_written_is_refused(made, changes):
    change(made, **changes)
    with pytest.raises(UserError, match=r"encodings.json: not as `prepare --encode` writes it"):
        opened(made)


def test_a_name_with_signs_that_no_one_sees_or_twice_is_refused(made):
    path = made / "text" / "encodings.json"
    good = path.read_text()
    # With the folder that such a name gives, else that is refused.
    said = json.loads(good.replace("text/words-", "text/words_-"))
    said["encodings"][0]["encoder"] = "words\x1b"
    twice = json.loads(good)
    twice["encodings"] *= 2
    for wrong, why in ((said, "must be a word"), (twice, "an encoder twice")):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=why):
            opened(made)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b'{"format": 2}', b'{"format": 1}'])
def test_another_file_in_the_place_of_the_description_is_refused(made, content):
    (made / "text" / "encodings.json").write_bytes(content)
    with pytest.raises(UserError, match=r"encodings.json: not as"):
        opened(made)


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [
        ("block", -1, 9),
        ("tokens", -1, 6),
        ("tokens", 0, 6),  # inside of its block
        ("offset", -1, 2**63),
        ("offset", -1, 2**64 - 4),  # its end is 20 in 64 bits
        ("offset", -1, 10**6),
        ("offset", -1, 12 * 10**5),  # where a token could begin
        ("offset", -1, 2),
    ],
)
def test_an_index_that_leads_outside_of_its_blocks_is_refused(made, column, row, value):
    [path] = made.glob("text/*/index.npy")
    rows = np.load(path)
    rows[column][row] = value
    np.save(path, rows)
    from diffusion_pl.io.files import sha256_of

    place = path.relative_to(made).as_posix()
    change(made, index={"file": place, "bytes": path.stat().st_size, "sha256": sha256_of(path)})
    with pytest.raises(UserError, match=r"index.npy: not of the captions and blocks"):
        opened(made)


# Remote.


def test_texts_over_http_are_those_of_the_folder(made, tmp_path):
    cache = tmp_path / "cache"
    zeros = torch.zeros(150, dtype=torch.float64)
    truth = opened(made).texts.read(torch.arange(150), zeros)[0]
    with served(made) as server:
        for _ in range(2):
            images = opened(server.url, cache_folder=str(cache))
            assert torch.equal(images.texts.read(torch.arange(150), zeros)[0], truth)
        assert server.asked.count("000000.f16") == 1
        assert server.asked.count("captions.txt") == 1
        # One that is damaged in the cache is fetched again.
        for kept in (next(cache.glob("*.f16")), next(cache.glob("sets/*/text/captions.txt"))):
            data = bytearray(kept.read_bytes())
            data[0] ^= 1
            kept.write_bytes(data)
        images = opened(server.url, cache_folder=str(cache))
        assert torch.equal(images.texts.read(torch.arange(150), zeros)[0], truth)
        assert server.asked.count("000000.f16") == server.asked.count("captions.txt") == 2


def test_blocks_of_two_encoders_lie_in_a_cache_side_by_side(made, tmp_path):
    encode(made, WordEncoder(name="other", digest="cd" * 32, width=4), nothing)
    zeros = torch.zeros(9, dtype=torch.float64)
    with served(made) as server:
        for name in ("words", "other", "words"):
            texts = opened(server.url, name, cache_folder=str(tmp_path / "cache")).texts
            truth = opened(made, name).texts.read(torch.arange(9), zeros)[0]
            assert torch.equal(texts.read(torch.arange(9), zeros)[0], truth)
        assert server.asked.count("000000.f16") == 2


def test_a_remote_set_that_is_not_encoded_or_does_not_fit(bare, made, tmp_path):
    with served(bare) as server, pytest.raises(UserError, match="not encoded by words"):
        opened(server.url, cache_folder=str(tmp_path / "cache"))
    with served(made) as server:
        shards = sum(path.stat().st_size for path in (made / "shards").iterdir())
        small = {"cache_folder": str(tmp_path / "cache"), "cache_bytes": shards + 100}
        assert opened(server.url, None, **small).texts is None
        with pytest.raises(UserError, match="shuffled together and the texts take"):
            opened(server.url, **small)


# The command.


@pytest.fixture
def minilm():
    from diffusion_pl import text

    try:
        return text.encoder("minilm")
    except UserError as error:
        pytest.skip(str(error))


def test_the_command_encodes_with_the_images_or_later(minilm, tmp_path, capsys):
    spoken = [("a red star",), ("a blue ring", "a ring"), ()]
    contents = {f"{i}.png": file(noise(i)) for i in range(3)}
    contents |= {f"{i}.txt": "\n".join(each).encode() for i, each in enumerate(spoken)}
    source = fill(tmp_path / "source", contents)
    one, two = tmp_path / "one", tmp_path / "two"
    assert prepare(source, one, "--encode", "minilm") == 0
    said = capsys.readouterr()
    assert "captions encoded by minilm, 384 numbers a token" in said.err
    assert "data.dataset.text=minilm" in said.err
    values = json.loads(said.out)
    assert values["encoder"] == "minilm" and values["encoder_sha256"] == minilm.digest
    assert values["captions"] == 3 and values["images"] == 3
    assert prepare(source, two) == 0
    assert cli.main(["prepare", str(two), "--encode", "minilm"]) == 0
    assert digests(one) == digests(two)
    assert cli.main(["prepare", str(two), "--encode", "minilm"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert cli.main(["prepare", str(two), "--encode", "minilm", "--text-length", "8"]) == 2
    assert "32 tokens, and this one has" in capsys.readouterr().err
    table = Shards(str(one), 8, text="auto").open().texts
    encoded = minilm.encode(["a blue ring", ""])
    text, mask = table.read(torch.tensor([1]), torch.zeros(1, dtype=torch.float64))
    assert torch.equal(text[0], encoded.tokens[0]) and torch.equal(mask[0], encoded.mask[0])
    assert torch.equal(table.null[0], encoded.tokens[1])


def test_the_command_says_what_is_missing(bare, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    mute = fill(tmp_path / "mute", {"0.png": file(noise(0))})
    assert prepare(mute, tmp_path / "x", "--encode", "minilm") == 2
    assert "has no captions; leave out what asks" in capsys.readouterr().err
    assert prepare(mute, tmp_path / "x") == 0
    capsys.readouterr()
    for words, problem in (
        ([str(bare)], "name the source, the folder of the prepared data set and --resolutions"),
        ([str(bare), str(empty)], "name the source, the folder"),
        ([str(empty), "--encode", "minilm"], "not a prepared data set; name one"),
        ([str(tmp_path / "x"), "--encode", "minilm"], "prepared without captions"),
        ([str(bare), "--encode", "nothing"], "unknown text encoder"),
        ([str(bare), "--text-length", "9"], "--text-length goes with --encode"),
    ):
        assert cli.main(["prepare", *words]) == 2
        assert problem in capsys.readouterr().err
