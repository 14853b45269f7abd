"""Words from the data or the user to images: training, resuming, prompts and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import homes
import numpy as np
import prepared
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from test_training import BATCH, experiment, go, same  # noqa: F401
from worded import WordEncoder

import diffusion_pl as dp
from diffusion_pl import text
from diffusion_pl.commands import asked
from diffusion_pl.commands.options import ConditionOptions as Asked
from diffusion_pl.data.encoding import text_table
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation
from diffusion_pl.evaluation.prompts import TextEncoder, located, read_prompts
from diffusion_pl.images import grid
from diffusion_pl.networks.uvit import UViT
from diffusion_pl.signals import StopRequest
from diffusion_pl.texts import Captions
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.beginning import Start
from diffusion_pl.training.history import History
from diffusion_pl.training.run import fit

WORDS = ("a red star", "a star", "one blue moon")


@dataclass(frozen=True)
class Worded:
    """Synthetic images with captions of the test's own."""

    width: int = 6
    length: int = 5
    last: str = "two"
    resolution: int = 16
    channels: int = 3

    def prepare(self):
        pass

    def open(self, resolution=None):
        images = Synthetic(40, self.resolution).open(resolution)
        words = Captions.of([(each, f"{each} again") for each in (*WORDS, self.last)] * 10)
        digest = f"{self.width * 10 + self.length:064d}"
        encoder = WordEncoder(width=self.width, length=self.length, digest=digest)
        return dataclasses.replace(images, texts=text_table(words, encoder))


def network(**options):
    torch.manual_seed(0)
    usual = {"text_width": 6, "text_length": 5, "classes": 8}
    return UViT(
        16, model_channels=8, channel_mult=(1, 2), blocks=(1,), transformers=1, heads=2,
        embedding_channels=16, dropout=0.2, **(usual | options),
    )  # fmt: skip


def worded(images=48, data=None, net=None, **parts):
    made = DataConfig(data or Worded(), batch_size=BATCH, hflip=True)
    settings = {"dropout": {"label": 0.3, "text": 0.3}}
    return experiment(images, data=made, network=net or network(), settings=settings, **parts)


# --- training -------------------------------------------------------------------------------------


def test_a_run_with_text_goes_on_to_the_same_bits(go):  # noqa: F811
    _, whole = go(worded(), "whole")
    go(worded(32), "part")
    _, resumed = go(worded(48), "part")
    same(whole, resumed)
    # It is not the run without text.
    plain = experiment(48, data=DataConfig(Worded(), batch_size=BATCH, hflip=True),
                       network=network(text_width=0, text_length=0),
                       settings={"dropout": {"label": 0.3}})  # fmt: skip
    _, other = go(plain, "plain")
    key = "denoiser.network.head.conv.weight"
    assert not torch.equal(whole["state_dict"][key], other["state_dict"][key])


def test_the_null_is_the_datas_encoding_of_nothing_in_weights_and_average(go):  # noqa: F811
    _, saved = go(worded(16))
    tokens, mask = Worded().open().texts.null
    for which in ("denoiser", "ema"):
        assert torch.equal(saved["state_dict"][f"{which}.network.null_text"], tokens.float())
        assert torch.equal(saved["state_dict"][f"{which}.network.null_text_mask"], mask)
    assert checkpoints.text_encoder(saved, Path("a.ckpt")) == TextEncoder(
        "words", f"{65:064d}", 6, 5
    )


def test_the_average_has_the_null_before_its_first_step(go):  # noqa: F811
    seen = []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(pl_module.ema.network.null_text.clone())

    go(dataclasses.replace(worded(8), callbacks=(Watch(),)))
    assert torch.equal(seen[0], Worded().open().texts.null[0].float())


def test_weights_of_another_encoder_are_not_started_from(go):  # noqa: F811
    tokens, mask = Worded().open().texts.null
    known = network()
    known.set_null_text(tokens + 1e-3, mask)  # as another machine rounds
    go(worded(8, net=known), "same")
    # The second encoder has no token for the empty caption, the third one more than ours.
    more = torch.arange(len(mask)) <= mask.sum()
    others = (tokens.flip(1), mask), (tokens * 0, mask & False), (tokens, more)
    for number, null in enumerate(others):
        known = network()
        known.set_null_text(*null)
        with pytest.raises(UserError, match="trained with captions of another encoder"):
            go(worded(8, net=known), f"other{number}")


def test_a_run_does_not_go_on_with_another_null(go, tmp_path):  # noqa: F811
    folder, saved = go(worded(16))
    path = checkpoints.latest(folder / "checkpoints")
    saved["state_dict"]["denoiser.network.null_text"][0, 0] += 1
    checkpoints.save(saved, path)
    with pytest.raises(UserError, match="encodes the empty caption otherwise than the run"):
        fit(worded(32), folder, tmp_path / "references", StopRequest(), Start(path))


def test_a_run_does_not_go_on_with_other_captions(go, tmp_path):  # noqa: F811
    folder, _ = go(worded(16))
    with pytest.raises(UserError, match="the training data has changed since"):
        go(worded(32, Worded(last="three")))
    path = checkpoints.latest(folder / "checkpoints")
    start = Start(path, data_changed=True)
    fit(worded(32, Worded(last="three")), folder, tmp_path / "references", StopRequest(), start)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (Synthetic(40, 16), {}, "has no encoded captions, and the network takes text"),
        (Worded(width=7), {}, "network.text_width is 6, the captions of .* have 7; set"),
        (Worded(length=4), {}, "network.text_length is 5, the captions of .* have 4; set"),
    ],
)
def test_captions_that_the_network_does_not_take_are_refused(go, data, options, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        go(worded(16, data, network(**options)))


# --- a file of prompts ----------------------------------------------------------------------------


def test_prompts_are_the_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    # As with captions, a line ends at a line feed or a return and nowhere else.
    content = "\ufeffa red star\r\n\n  a blue moon \nein grüner Stern\rone\u2028two\x85three"
    file.write_bytes(content.encode())
    known = ("a red star", "a blue moon", "ein grüner Stern", "one\u2028two\x85three")
    assert read_prompts(file) == known


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n  \n", "has no prompt; write one a line"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"a\n" * 2**23 + b"b", "is larger than 16 MB"),
        ("é".encode() * (2**23 + 1), "is larger than 16 MB"),  # the limit is within a letter
        (None, "cannot be read"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(file)


def test_words_are_written_below_their_images():
    images = torch.full((3, 3, 16, 16), 128, dtype=torch.uint8)
    long = "a red star " * 20
    sheet = grid(images, columns=3, gap=0, words=["", "a star", long])
    assert sheet.shape[2] == 3 * 96 and sheet.shape[1] == 96 + 4 * 12 + 2
    assert (sheet[:, :96] == 128).all()  # nothing is written into an image
    dark = (sheet[0, 96:] < 128).reshape(-1, 3, 96).sum(dim=(0, 2)).tolist()
    assert dark[0] == 0 < dark[1] < dark[2]
    lines = (sheet[0, 96:, 96:192] < 128).any(dim=1)
    assert lines[:14].any() and not lines[14:].any()  # one line is enough for the second


# --- commands -------------------------------------------------------------------------------------

TEXT = """defaults: base
data:
  dataset: {_target_: diffusion_pl.data.synthetic.Synthetic, resolution: 16, count: 40,
    captions: minilm, caption_length: 16}
  batch_size: 8
network: {_target_: diffusion_pl.networks.uvit.UViT, resolution: 16, model_channels: 8,
  channel_mult: [1, 2], blocks: [1], transformers: 1, heads: 2, embedding_channels: 16,
  dropout: 0.0, text_width: 384, text_length: 16, classes: 0}
objective: {_target_: diffusion_pl.objectives.edm.EDM}
optimizer: {lr: 2.0e-2}  # so that words show in the images after few steps
lr_schedule: {warmup: 8}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 8}
sampler: {steps: 3}
features: {name: shapes}
evaluation: {every: 160, count: 16, batch_size: 8, grid: 4}
trainer: {total_images: 160, checkpoint_every: 80, log_every: 80, accelerator: cpu, precision: fp32,
  dropout: {text: 0.3}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run with text, and one without."""
    try:
        text.encoder("minilm")
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("home")
    plain = ("network.text_width=0", "network.text_length=0", "trainer.dropout.text=0")
    homes.trained(folder, TEXT, (*plain, "--run", "runs/plain"))
    prompts = "a red star\n\na blue moon\n"
    (folder / "prompts.txt").write_text(prompts)
    noise = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0))
    for name, pixels in zip("ab", noise.byte().numpy(), strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")
        Image.fromarray(pixels[:8, :8]).save(folder / f"{name}8.png")
    return folder


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    return homes.answering(capsys)


def drawn(result):
    with np.load(Path(result["folder"]) / "images.npz") as file:
        return file["images"], file["captions"].tolist()


def test_prompts_are_sampled_in_turn_and_recorded(run):
    words = ("--prompt", "a red star", "--prompt", "a blue moon")
    code, many, err = run("sample", "runs/tiny", "--count", 3, *words, "--out", "many")
    assert code == 0, err
    images, captions = drawn(many)
    assert captions == ["a red star", "a blue moon", "a red star"]
    assert json.loads(Path("many/sample.json").read_text())["captions"] == captions
    one = ("--prompt", "a red star", "--out", "one")
    code, result, err = run("sample", "runs/tiny", "--count", 3, *one)
    assert (code, result["prompt"]) == (0, "a red star"), err
    red, _ = drawn(result)
    assert np.array_equal(red[[0, 2]], images[[0, 2]]) and not np.array_equal(red[1], images[1])
    file = ("--prompts", "prompts.txt", "--out", "file")
    _, result, _ = run("sample", "runs/tiny", "--count", 3, *file)
    assert np.array_equal(drawn(result)[0], images)
    set_ = ("--set", "evaluation.prompts=prompts.txt", "--out", "set")
    _, result, _ = run("sample", "runs/tiny", "--count", 3, *set_)
    assert np.array_equal(drawn(result)[0], images)
    # In tars each lies beside its image, and `prepare` reads them.
    code, result, err = run("sample", "runs/tiny", "--count", 3, *words, "--out", "tars",
                            "--format", "tar")  # fmt: skip
    assert code == 0, err
    with tarfile.open("tars/images/000000.tar") as tar:
        texts = [tar.extractfile(f"{i:06d}.txt").read().decode() for i in range(3)]
    assert texts == captions
    code, _, err = run("prepare", "tars/images", "tars/set", "--resolutions", 16, "--captions",
                       "--workers", 1)  # fmt: skip
    assert code == 0, err
    said = json.loads(Path("tars/set/dataset.json").read_text())["captions"]
    assert (said["total"], said["unique"], said["bare"]) == (3, 2, 0)
    # From Python the same.
    opened = dp.Run("runs/tiny")
    same_ = opened.sample(3, prompt=["a red star", "a blue moon"]).permute(0, 2, 3, 1)
    assert np.array_equal(same_.numpy(), images)
    assert np.array_equal(opened.sample(1, prompt="a red star")[0].permute(1, 2, 0), images[0])


def test_other_prompts_are_not_mixed_into_a_folder(run):
    run("sample", "runs/tiny", "--count", 1, "--prompt", "a red star", "--out", "mixed")
    code, _, err = run("sample", "runs/tiny", "--count", 2, "--prompt", "two", "--out", "mixed")
    assert code == 2 and "prompt a red star -> two" in err


def test_without_a_prompt_captions_of_the_data_are_drawn(run):
    code, result, err = run("sample", "runs/tiny", "--count", 5, "--out", "data")
    assert code == 0, err
    table = Synthetic(40, 16, captions="minilm", caption_length=16).open().texts
    known = {each for i in range(40) for each in table.captions_of(i)}
    assert set(drawn(result)[1]) <= known
    assert result["captions"].startswith("synthetic-16 ")


def test_the_guided_image_is_between_text_and_nothing(run):
    """The weight 0 of the text is the image of the empty caption, which is the null."""
    words = ("--count", 2, "--prompt", "a red star")
    _, none, _ = run("sample", "runs/tiny", *words, "--guidance", "text=0", "--out", "none")
    empty = dp.Run("runs/tiny").sample(2, prompt="").permute(0, 2, 3, 1).numpy()
    assert abs(drawn(none)[0].astype(int) - empty).max() <= 1
    code, result, _ = run("sample", "runs/tiny", *words, "--guidance", "text=3", "--out", "three")
    assert (code, result["guidance"], result["evaluations"]) == (0, {"text": 3.0}, 2 * 5)
    _, plain, _ = run("sample", "runs/tiny", *words, "--guidance", 3, "--out", "plain")
    assert np.array_equal(drawn(result)[0], drawn(plain)[0])


def test_a_prompt_beyond_the_length_is_cut_where_it_is_told(run):
    long = " ".join(["a very large red star on a green ground"] * 3)
    code, result, err = run("sample", "runs/tiny", "--count", 1, "--prompt", long, "--out", "long")
    assert code == 0
    place = re.search(r"cut after '\.\.\.(.*)', at (\d+) of 119 characters: prompt 1", err)
    assert place is not None and not err.startswith("prompt")
    end, size = place.groups()
    assert f"more than 16 tokens ('{long[:40]}...')" in err
    kept = long[: int(size)]
    assert kept.endswith(end) and len(end) == 40 and len(kept) < len(long)
    assert result["cut"] == [{"prompt": 1, "kept": kept}]
    _, short, _ = run("sample", "runs/tiny", "--count", 1, "--prompt", kept, "--out", "short")
    assert "cut" not in short
    assert np.array_equal(drawn(result)[0], drawn(short)[0])


def test_prompts_are_encoded_as_they_are_needed(run, tmp_path):
    """A few images of a long file wait for no more than their part of it."""
    words = [f"a red star {i}" for i in range(130)]
    words[70] = " ".join(["a very large red star on a green ground"] * 3)
    (tmp_path / "prompts.txt").write_text("\n".join(words))
    asked = ("sample", "runs/tiny", "--prompts", tmp_path / "prompts.txt", "--count", 1)
    code, result, err = run(*asked, "--out", "first")
    assert code == 0 and "cut" not in result and "cut after" not in err
    code, result, err = run(*asked, "--first", 70, "--out", "later")
    assert [each["prompt"] for each in result["cut"]] == [71] and err.count("cut after") == 1


def other_encoder(changes):
    """A copy of the run whose checkpoint says another encoder."""
    shutil.rmtree("runs/other", ignore_errors=True)
    shutil.copytree("runs/tiny", "runs/other")
    path = checkpoints.latest(Path("runs/other/checkpoints"))
    saved = checkpoints.load(path)
    if changes is None:
        del saved[checkpoints.TEXT_ENCODER]
    else:
        saved[checkpoints.TEXT_ENCODER] |= changes
    checkpoints.save(saved, path)
    return "runs/other"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digest": "0123456789abcdef" * 4},
         "encoded by minilm (sha256 0123456789ab), and minilm here is another (sha256 53aa5117"),
        ({"name": "hf:someone/theirs"},
         "if you trust it, name it: --encoder hf:someone/theirs"),
        ({"name": "maxilm"}, "unknown text encoder 'maxilm'"),
        ({"width": "many"}, "does not say by which encoder its captions were encoded"),
        (None, "does not say by which encoder its captions were encoded"),
    ],
)  # fmt: skip
def test_an_encoder_other_than_the_datas_is_refused(run, changes, message):
    words = ("--count", 1, "--prompt", "a red star", "--out", "refused")
    code, _, err = run("sample", other_encoder(changes), *words)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not Path("refused").exists()


def test_of_a_checkpoint_that_names_no_encoder_the_user_does(run):
    """As one that was imported."""
    words = ("--count", 1, "--prompt", "a red star", "--encoder", "minilm")
    code, result, err = run("sample", other_encoder(None), *words, "--out", "named")
    assert code == 0, err
    _, own, _ = run("sample", "runs/tiny", *words[:4], "--out", "own2")
    assert np.array_equal(drawn(result)[0], drawn(own)[0])
    wider = Asked(prompt=("a star",), encoder="minilm")
    with pytest.raises(UserError, match="gives 384 numbers a token, and the model takes 7"):
        asked.sources(
            wider, {"label": 0, "text": 7}, Evaluation(every=1), class_names=(), encoder=None,
            length=16, open_data=None, dropout={},
        )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "OTHER", "--count", 1, "--out", "foreign"),
        ("losses", "OTHER", "--count", 2, "--levels", 2),
        ("likelihood", "OTHER", "--count", 1, "--steps", 2),
        ("train", "tiny", "--from", "OTHER", "--run", "runs/foreign"),
    ],
)
def test_captions_that_another_encoder_encoded_are_refused(run, words):
    """Of the same width, so that nothing else would tell; nor does the null, which it gave."""
    moved = other_encoder({"digest": "0123456789abcdef" * 4})
    code, _, err = run(*(moved if each == "OTHER" else each for each in words))
    assert code == 2 and err.splitlines()[-1].endswith(
        "encoded by minilm (sha256 0123456789ab), those of synthetic-16 by minilm (sha256 "
        "53aa51172d14); encode them by the first"
    ), err


def test_a_guide_that_knows_captions_of_another_encoder_is_refused(run):
    words = ("sample", "runs/tiny", "--count", 1, "--prompt", "a star", "--guidance", 2)
    other = other_encoder({})
    code, _, err = run(*words, "--guide", other, "--out", "guided")
    assert code == 0, err
    path = checkpoints.latest(Path(other) / "checkpoints")
    saved = checkpoints.load(path)
    saved["state_dict"]["ema.network.null_text"] += 0.2
    checkpoints.save(saved, path)
    code, _, err = run(*words, "--guide", other, "--out", "misguided")
    assert code == 2 and "is no guide for this model: its captions were encoded by another" in err


def test_an_encoder_that_the_user_names_is_taken_where_it_is_the_same(run):
    moved = other_encoder({"name": "hf:someone/theirs"})
    words = ("--count", 1, "--prompt", "a red star")
    code, result, err = run("sample", moved, *words, "--encoder", "minilm", "--out", "moved")
    assert code == 0, err
    _, own, _ = run("sample", "runs/tiny", *words, "--out", "own")
    assert np.array_equal(drawn(result)[0], drawn(own)[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "runs/plain", "--prompt", "a red star"), "the model was trained without text"),
        (("sample", "runs/tiny", "--prompt", "a", "--prompts", "prompts.txt"), "by one of them"),
        (("sample", "runs/tiny", "--prompts", "nowhere.txt"), "nowhere.txt: cannot be read"),
        (("train", "tiny", "network.text_width=0", "network.text_length=0",
          "trainer.dropout.text=0", "--from", "runs/tiny", "--run", "runs/x"),
         "has text_length 16 and text_width 384, this one 0 and 0; set"),
        (("train", "tiny", "--from", "runs/plain", "--run", "runs/x"),
         "has text_length 0 and text_width 0, this one 16 and 384; set network.text_length=0"),
        (("train", "tiny", "network.text_length=12", "data.dataset.caption_length=12", "--from",
          "runs/tiny", "--run", "runs/x"), "set network.text_length=16 network.text_width=384"),
        (("sample", "runs/tiny", "--guidance", "text=nan"), "must be a finite number (got nan)"),
        (("sample", "runs/tiny", "--guidance", "inf"), "must be a finite number (got inf)"),
        (("sample", "runs/tiny", "--guidance", "text=2,text=3"), "a number, or KIND=NUMBER"),
        (("sample", "runs/tiny", "--guidance", "label=2"), "guidance.label: is no condition"),
        (("sample", "runs/plain", "--guidance", 2),
         "guidance needs a model with classes, text or images"),
        (("sample", "runs/tiny", "--set", "data.dataset.captions=null"),
         "has no encoded captions to draw; give --prompt"),
        (("interpolate", "runs/tiny", "a.png", "b.png"), "--prompt: describe the images"),
        (("invert", "runs/tiny", "a.png"), "--prompt: describe the images"),
        (("enlarge", "runs/tiny", "a8.png"), "--prompt: describe the images"),
        (("losses", "runs/tiny", "--set", "data.dataset.captions=null"), "has no encoded captions"),
        (("likelihood", "runs/tiny", "--count", 2, "--set", "data.dataset.captions=null"),
         "has no encoded captions"),
        (("check", "tiny", "evaluation.prompts=nowhere.txt"), "nowhere.txt: cannot be read"),
        (("check", "tiny", "trainer.dropout={label: 0.1}"),
         "trainer.dropout.label: the network takes no label (network.classes is 0), so there is "
         "nothing to hide; set trainer.dropout.label=0"),
    ],
)  # fmt: skip
def test_what_has_no_words_or_cannot_have_them_is_refused(run, words, message):
    code, _, err = run(*words)
    assert code == 2 and message in err, err


@pytest.mark.parametrize(
    "words",
    [
        ("interpolate", "runs/tiny", "a.png", "b.png", "--count", 3, "--prompt", "a red star"),
        ("invert", "runs/tiny", "a.png", "b.png", "--prompt", "a star", "--prompt", "two"),
        ("enlarge", "runs/tiny", "a8.png", "--prompt", "a red star"),
        ("progressive", "runs/tiny", "--count", 2, "--prompt", "a red star"),
        ("progressive", "runs/tiny", "--count", 2, "--share", "0.5", "--sampler", "ancestral"),
        ("losses", "runs/tiny", "--count", 8, "--levels", 3),
        ("likelihood", "runs/tiny", "--count", 2, "--steps", 4),
        ("evaluate", "runs/tiny", "--count", 10, "--metrics", "score"),
        ("sweep", "runs/tiny", "--count", 10, "--metrics", "score", "--guidance", "text=1,text=2"),
        ("replay", "runs/tiny", "--step", 1),
    ],
)
def test_every_command_opens_a_run_with_text(run, words):
    code, _, err = run(*words)
    assert code == 0, err


def test_losses_are_those_of_the_images_own_captions(run):
    _, own, _ = run("losses", "runs/tiny", "--count", 8, "--levels", 3)
    model = dp.Run("runs/tiny").model
    images = Synthetic(40, 16, captions="minilm", caption_length=16).open()
    indices = torch.arange(8) * 5
    tokens, mask = images.texts.read(indices, torch.zeros(8, dtype=torch.float64))
    clean = images.read(indices).float() / 127.5 - 1
    level = own["levels"]["ema"][1]
    sigma = torch.tensor(level["sigma"], dtype=torch.float32)
    noise = ImageNoise(0, range(8), "levels")(torch.empty_like(clean))
    with torch.no_grad():
        found = model.denoiser(clean + sigma * noise, sigma, text=tokens.float(), text_mask=mask)
    assert (found - clean).square().mean().item() == pytest.approx(level["error"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_that_stop_and_go_on_reach_the_weights_of_one(home):
    """From shards whose images have several captions or none, with captions dropped."""
    words = [(), ("a red star",), ("a star", "a blue moon"), ("one", "two stars", "three")]
    contents = {f"{i:02}.png": prepared.file(prepared.noise(i, 16, 16)) for i in range(24)}
    contents |= {f"{i:02}.txt": "\n".join(words[i % 4]).encode() for i in range(24)}
    source = prepared.fill(home / "source", contents)
    encode = ("--encode", "minilm", "--text-length", 16)
    assert prepared.prepare(source, home / "spoken", *encode, resolutions="16") == 0
    spoken = "{_target_: diffusion_pl.data.shards.Shards, path: spoken, resolution: 16, text: auto}"
    for devices, *budgets in ((1, 160), (2, 80, 160)):
        for images in budgets:
            command = [sys.executable, "-m", "diffusion_pl", "train", "tiny", "data.num_workers=1"]
            command += [f"data.dataset={spoken}", f"trainer.total_images={images}"]
            command += [f"trainer.devices={devices}", "--run", f"runs/d{devices}"]
            result = subprocess.run(
                command, cwd=home, capture_output=True, text=True, timeout=170, check=False
            )
            assert result.returncode == 0, result.stderr
    assert "going on from 80 of 160 images" in result.stderr
    folders = [home / "runs" / f"d{devices}" for devices in (1, 2)]
    one, two = (checkpoints.load(checkpoints.latest(each / "checkpoints")) for each in folders)
    for key, value in one["state_dict"].items():
        # Sums in another order, magnified by Adam in its first steps.
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-3, atol=1e-4)
    measured = [
        {row["name"]: row["value"] for row in History(each / "metrics.jsonl").rows()
         if row["images"] == 160 and "name" in row}
        for each in folders
    ]  # fmt: skip
    assert measured[0] and measured[1] == pytest.approx(measured[0], rel=0.02)


def test_the_prompts_of_an_experiment_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "experiments/synthetic_text.txt"
    assert len(read_prompts(located(name))) == 500
    Path("experiments").mkdir()
    Path(name).write_text("a red star\n")
    assert read_prompts(located(name)) == ("a red star",)
    with pytest.raises(UserError, match=r"other/synthetic_text.txt: cannot be read"):
        read_prompts(located("other/synthetic_text.txt"))
