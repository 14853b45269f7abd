"""CLIP score against torchmetrics and its definition, on a tiny CLIP."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_metrics_fid import Known
from tiny_models import transformers
from torch import Tensor, nn
from torchmetrics.multimodal import CLIPScore

from diffusion_pl.errors import UserError
from diffusion_pl.metrics.clip_score import Clip, ClipScore
from diffusion_pl.metrics.features import Features

CAPTIONS = ("a red heart", "one tiny teal triangle", "", "a dark green star on a blue ground", "x")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub's cache of one's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("clip")
    tiny_models.clip(made, positions=40)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def opposite(folder, tmp_path_factory) -> Path:
    """The same CLIP, whose text embeddings point the other way."""
    made = likeness(folder, tmp_path_factory.mktemp("opposite"))
    weights = load_file(made / "model.safetensors")
    weights["text_projection.weight"] *= -1
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    return made


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    small = torch.randint(0, 256, (len(CAPTIONS), 3, 4, 4), generator=generator)
    return small.repeat_interleave(6, dim=2).repeat_interleave(6, dim=3).to(torch.uint8)


class Tensors(nn.Module):
    """CLIP as torchmetrics 1.9 calls it, which knows transformers before version 5."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = transformers.CLIPModel.from_pretrained(folder).eval()
        self.config = self.model.config

    def get_image_features(self, *given: Tensor) -> Tensor:
        return self.model.get_image_features(*given).pooler_output

    def get_text_features(self, *given: Tensor) -> Tensor:
        return self.model.get_text_features(*given).pooler_output


def theirs(folder: Path) -> CLIPScore:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pixels = transformers.CLIPImageProcessor.from_pretrained(folder)

    def processor(text=None, images=None, **options):
        if images is None:
            return tokenizer(text, **options)
        return pixels(images, return_tensors="pt")

    return CLIPScore(lambda: (Tensors(folder), processor))


def batch(images: Tensor, captions: tuple[str, ...]) -> Features:
    return Features(torch.zeros(len(images), 2), images=images, captions=captions)


def likeness(folder: Path, made: Path) -> Path:
    """A copy of a folder of a CLIP."""
    for file in folder.iterdir():
        shutil.copy(file, made)
    return made


@torch.no_grad()
def test_each_score_is_that_of_torchmetrics(folder, opposite, images) -> None:
    seen = []
    for place in (folder, opposite):
        known = theirs(place)
        found = Clip(f"hf:{place}")(batch(images, CAPTIONS))
        assert found.shape == (5, 1)
        for image, caption, score in zip(images, CAPTIONS, found[:, 0], strict=True):
            known.reset()
            known.update(image, caption)
            assert score.item() == pytest.approx(known.compute().item(), abs=1e-4)
            seen.append(score.item())
    assert sorted(seen)[4] == 0 and max(seen) > 5, "no clamp is seen, or nothing else"
    assert len({round(score, 2) for score in seen}) > 5


def test_the_metric_is_the_mean_of_scores(folder, opposite, images) -> None:
    clip = Clip(f"hf:{folder}")
    if not clip(batch(images, CAPTIONS)).any():
        folder, clip = opposite, Clip(f"hf:{opposite}")
    single = [
        clip(batch(images[first : first + 1], CAPTIONS[first : first + 1])).item()
        for first in range(5)
    ]
    assert min(single) > 1
    metric = ClipScore(f"hf:{folder}").build(Known(2, "shapes"), None, 5)
    metric.update(batch(images[:2], CAPTIONS[:2]))
    metric.update(batch(images[2:], CAPTIONS[2:]))
    assert metric.compute() == {"clip_score": pytest.approx(sum(single) / 5, abs=1e-4)}
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert metric.notes == {"clip": f"hf:{folder}", "clip_digest": digest[:12]}
    assert ClipScore.wants_captions


def test_grey_and_transparent_images_and_long_captions_are_taken(folder, images) -> None:
    clip = Clip(f"hf:{folder}")
    grey = images[:1, :1]
    told = clip(batch(grey, ("a red heart",)))
    assert torch.equal(told, clip(batch(grey.repeat(1, 3, 1, 1), ("a red heart",))))
    words = clip.tokenizer(["a red heart " * 30], truncation=True, max_length=40)["input_ids"][0]
    assert (len(words), words[-1]) == (40, clip.tokenizer.eos_token_id)
    long = clip(batch(images[:1], ("a red heart " * 30,)))
    assert torch.equal(long, clip(batch(images[:1], ("a red heart " * 40,))))


@torch.no_grad()
def test_scores_are_float32_whatever_autocast_and_the_weights_file_say(
    opposite, images, tmp_path
) -> None:
    weights = load_file(opposite / "model.safetensors")
    half = {key: value.bfloat16() if value.is_floating_point() else value
            for key, value in weights.items()}  # fmt: skip
    scores = []
    for name, rounded in (
        ("half", half),
        ("whole", {k: v.to(weights[k].dtype) for k, v in half.items()}),
    ):
        (tmp_path / name).mkdir()
        place = likeness(opposite, tmp_path / name)
        config = json.loads((place / "config.json").read_text())
        dtype = "bfloat16" if name == "half" else "float32"
        (place / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        save_file(rounded, place / "model.safetensors", {"format": "pt"})
        clip = Clip(f"hf:{place}")
        scores.append(clip(batch(images, CAPTIONS)))
    with torch.autocast("cpu", torch.bfloat16):
        scores.append(clip(batch(images, CAPTIONS)))
    assert scores[0].any() and torch.equal(scores[0], scores[1]) and torch.equal(*scores[1:])


@torch.no_grad()
def test_a_tokenizer_that_pads_and_cuts_on_the_left_does_so_on_the_right(
    folder, opposite, images, tmp_path
) -> None:
    captions = (*CAPTIONS[:4], "a red heart " * 30)
    for number, place in enumerate((folder, opposite)):
        (tmp_path / str(number)).mkdir()
        left = likeness(place, tmp_path / str(number))
        file = left / "tokenizer_config.json"
        sides = {"padding_side": "left", "truncation_side": "left"}
        file.write_text(json.dumps(json.loads(file.read_text()) | sides))
        known = Clip(f"hf:{place}")(batch(images, captions))
        torch.testing.assert_close(Clip(f"hf:{left}")(batch(images, captions)), known)


def test_what_is_absent_or_no_clip_is_refused_before_images(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    message = r"^hf:a/b: is no folder, and not in the hub's cache; run hf download a/b$"
    with pytest.raises(UserError, match=message):
        ClipScore("hf:a/b").check_count(5)
    with pytest.raises(UserError, match="there is no such folder"):
        ClipScore(f"hf:{tmp_path}/no").check_count(5)
    ClipScore(f"hf:{folder}").check_count(1)
    tiny_models.t5(tmp_path / "t5")
    with pytest.raises(UserError, match=r"is no CLIP \(its model_type is 't5'\)$"):
        ClipScore(f"hf:{tmp_path / 't5'}").build(Known(2, "shapes"), None, 5)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"^transformers is not installed; pip install"):
        ClipScore(f"hf:{folder}").check_count(1)
    assert ClipScore().numbers(SimpleNamespace(name="x")) == ("clip_score",)
