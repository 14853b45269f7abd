"""Grey images and images of four channels, from files to a trained model's own images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_pl.cli import main
from diffusion_pl.data.decode import read_square
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.recipe import Recipe
from diffusion_pl.data.shards import Shards

RNG = np.random.default_rng(0)
MODES = {1: "L", 4: "RGBA"}


def pictures(folder: Path, channels: int, count: int = 8, size: tuple[int, int] = (16, 16)):
    """Images of noise in two class folders; their pixels (C, H, W) by name, in the set's order."""
    found = {}
    for number in range(count):
        name = f"{'ab'[2 * number // count]}/{number}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shape = size if channels == 1 else (*size, channels)
        pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        found[name] = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return found


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "experiments").symlink_to(Path(__file__).parents[1] / "experiments")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("encoding", ["png", "webp", "raw"])
def test_every_channel_of_a_prepared_image_is_the_files(channels, encoding):
    written = pictures(Path("pictures"), channels)
    words = ["prepare", "pictures", "data/set", "--resolutions", "16", "--labels"]
    assert main([*words, "--channels", str(channels), "--encoding", encoding]) == 0
    source = Shards("data/set", 16, channels=channels)
    source.prepare()
    images = source.open()
    wanted = np.stack(list(written.values()))
    assert np.array_equal(images.read(torch.arange(8)).numpy(), wanted)
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    folder = ImageFolder("pictures", 16, "exact", channels=channels)
    assert np.array_equal(folder.open().read(torch.arange(8)).numpy(), wanted)


@pytest.mark.parametrize(("channels", "mode"), MODES.items())
def test_from_a_folder_to_images_of_its_own_kind(channels, mode, capsys):
    pictures(Path("pictures"), channels)
    words = ["prepare", "pictures", "data/set", "--resolutions", "16", "--labels"]
    assert main([*words, "--channels", str(channels)]) == 0
    train = json.loads(capsys.readouterr().out)["train"]
    assert f"data.dataset.channels={channels}" in train and f"network.channels={channels}" in train
    said = [word for word in train.replace("'", "").split() if word.startswith("data.")]
    code = main([
        "train", "cifar10_small", "--run", "runs/x", *said, "network.resolution=16",
        f"network.channels={channels}", "network.classes=2", "network.model_channels=16",
        "network.channel_mult=[1]", "network.attention=[]", "network.blocks=1", "augment=null",
        "network.augment=0", "trainer.total_images=16", "evaluation.every=16", "evaluation.count=4",
        "evaluation.metrics=[{_target_: diffusion_pl.metrics.fid.Frechet}]",
        "features.name=shapes", "trainer.accelerator=cpu", "trainer.devices=1",
        "trainer.loggers=[]", "sampler.steps=2", "data.batch_size=8",
    ])  # fmt: skip
    assert code == 0
    assert main(["sample", "runs/x", "--count", "2", "--out", "drawn"]) == 0
    drawn = [path for path in sorted(Path("drawn").rglob("*.png")) if "grid" not in path.name]
    assert len(drawn) == 2
    for path in drawn:
        with Image.open(path) as image:
            assert (image.mode, image.size) == (mode, (16, 16))


def test_images_of_four_channels_are_measured_laid_over_white():
    from diffusion_pl.metrics.features import require_rgb

    pixels = RNG.integers(0, 256, (3, 4, 8, 8), dtype=np.uint8)
    seen = require_rgb(torch.from_numpy(pixels)).numpy()
    for image, got in zip(pixels, seen, strict=True):
        above = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)), "RGBA")
        white = Image.new("RGBA", above.size, (255, 255, 255, 255))
        laid = np.array(Image.alpha_composite(white, above).convert("RGB")).transpose(2, 0, 1)
        assert np.abs(got.astype(int) - laid).max() <= 1


def test_grey_of_a_coloured_picture_is_its_luma_and_opaque_is_255():
    path = Path("one.png")
    pixels = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    grey = read_square(data, 4, "exact", where="x", channels=1)
    # ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B.
    assert grey.shape == (1, 4, 4) and abs(int(grey[0, 0, 0]) - 124.2) <= 0.5
    four = read_square(data, 4, "exact", where="x", channels=4)
    assert four[:, 0, 0].tolist() == [200, 100, 50, 255]


def test_the_fourth_channel_does_not_touch_the_others():
    """A near infrared in the place of alpha: where it is 0 the colours stay."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., :3] = 200
    pixels[:, 16:, 3] = 255
    Image.fromarray(pixels).save("one.png")
    data = Path("one.png").read_bytes()
    found = read_square(data, 8, "crop", where="x", channels=4)
    assert (found[:3] == 200).all()
    assert found[3, 0, 0] == 0 and found[3, 0, 7] == 255


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--channels", "2"], "--channels"), (["--channels", "4", "--encoding", "jpeg"], "jpeg")],
)
def test_other_numbers_of_channels_are_one_line(words, named, capsys):
    pictures(Path("pictures"), 1, 2)
    assert main(["prepare", "pictures", "data/set", "--resolutions", "16", *words]) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1


def test_a_set_of_other_channels_is_another_request(capsys):
    pictures(Path("pictures"), 1)
    words = ["prepare", "pictures", "data/set", "--resolutions", "16", "--labels"]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--channels", "1"]) == 2
    assert "channels" in capsys.readouterr().err


def test_a_jpeg_of_one_channel_is_what_is_read_again():
    recipe = Recipe((8,), channels=1, encoding="jpeg")
    data, pixels = recipe.encoded(RNG.integers(0, 256, (1, 8, 8), dtype=np.uint8))
    assert np.array_equal(read_square(data, 8, "exact", where="x", channels=1), pixels)
