"""Images as conditions from the command line and from Python, and what is refused there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import homes
import numpy as np
import pytest
import torch
from PIL import Image

import diffusion_pl as dp
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.degradations import Downsampled
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.training import checkpoint as checkpoints

TINY = """defaults: base
data:
  dataset: {_target_: diffusion_pl.data.synthetic.Synthetic, resolution: 16, count: 40}
  batch_size: 8
  image: {_target_: diffusion_pl.diffusion.degradations.Downsampled, times: 4}
network: {_target_: diffusion_pl.networks.song_unet.SongUNet, resolution: 16, model_channels: 8,
  channel_mult: [1, 2], blocks: 1, attention: [], dropout: 0.0, image_channels: 3}
objective: {_target_: diffusion_pl.objectives.edm.EDM}
optimizer: {lr: 2.0e-2}  # so that images show in the samples after few steps
lr_schedule: {warmup: 8}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 8}
sampler: {steps: 3}
features: {name: shapes}
evaluation: {every: 160, count: 16, batch_size: 8, grid: 4}
trainer: {total_images: 160, checkpoint_every: 80, log_every: 80, accelerator: cpu, precision: fp32,
  dropout: {image: 0.3}}
"""
BOXES = "data.image={_target_: diffusion_pl.diffusion.degradations.Boxes}"
PYRAMID = (
    "sampler={_target_: diffusion_pl.samplers.pyramid.PyramidSampler, levels: [8, 16], "
    "restart: 0.3, base: {_target_: diffusion_pl.samplers.sampler.Sampler, steps: 3, integrate: "
    "{_target_: diffusion_pl.samplers.heun.heun, _partial_: true}, schedule: {_target_: "
    "diffusion_pl.diffusion.schedules.Rho}}}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run that goes by images, and one that does not."""
    folder = tmp_path_factory.mktemp("home")
    plain = ("network.image_channels=0", "data.image=null", "trainer.dropout.image=0")
    homes.trained(folder, TINY, (*plain, "--run", "runs/plain"))
    images = Synthetic(3, 16, seed=9).open().read(torch.arange(3))
    for name, pixels in zip("abc", images.permute(0, 2, 3, 1).numpy(), strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")
        small = pixels.reshape(4, 4, 4, 4, 3).astype(float).mean(axis=(1, 3))
        Image.fromarray(np.rint(small).astype(np.uint8)).save(folder / f"{name}4.png")
        Image.fromarray(pixels[:8, :8]).save(folder / f"{name}8.png")
    Image.fromarray(images[0].permute(1, 2, 0).numpy()[:, :4]).save(folder / "narrow.png")
    (folder / "broken.png").write_bytes(b"none")
    return folder


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    return homes.answering(capsys)


def drawn(result):
    with np.load(Path(result["folder"]) / "images.npz") as file:
        return file["images"]


def test_files_are_gone_by_in_turn_and_recorded(run):
    files = ("--image", "a.png", "--image", "b.png")
    code, many, err = run("sample", "runs/tiny", "--count", 3, *files, "--out", "many")
    assert code == 0 and many["source"].startswith("2 "), err
    images = drawn(many)
    code, one, err = run("sample", "runs/tiny", "--count", 3, "--image", "a.png", "--out", "one")
    assert code == 0 and one["source"].startswith("1 "), err
    assert np.array_equal(drawn(one)[[0, 2]], images[[0, 2]])
    assert not np.array_equal(drawn(one)[1], images[1])
    # A file that is measured already gives the same as the whole of it.
    small = ("--image", "a4.png", "--image", "b4.png")
    _, measured, _ = run("sample", "runs/tiny", "--count", 3, *small, "--out", "small")
    assert np.array_equal(drawn(measured), images)
    # From Python the same.
    opened = dp.Run("runs/tiny")
    found = opened.sample(3, image=["a.png", Path("b4.png")]).permute(0, 2, 3, 1)
    assert np.array_equal(found.numpy(), images)
    alone = opened.sample(1, image="a.png")[0].permute(1, 2, 0)
    assert np.array_equal(alone.numpy(), images[0])


def test_other_images_are_not_mixed_into_a_folder(run):
    run("sample", "runs/tiny", "--count", 1, "--image", "a.png", "--out", "mixed")
    code, _, err = run("sample", "runs/tiny", "--count", 2, "--image", "b.png", "--out", "mixed")
    assert code == 2 and "source 1 " in err


def test_without_a_file_images_of_the_data_are_drawn_and_shown_beside(run):
    code, result, err = run("sample", "runs/tiny", "--count", 5, "--out", "data")
    assert code == 0 and result["source"].startswith("synthetic-16 "), err
    grid = np.array(Image.open("data/grid.png"))
    clean = Synthetic(40, 16).open().read(torch.arange(40)) / 127.5 - 1
    sources = ((Downsampled(4)(clean, torch.zeros(40, 0))[0] + 1) * 127.5).round()
    known = {each.permute(1, 2, 0).byte().numpy().tobytes() for each in sources}
    zoom = (grid.shape[1] + 2) // 3 // 32
    for number, own in enumerate(drawn(result)):
        top, left = number // 3 * (16 * zoom + 2), number % 3 * (32 * zoom + 2)
        cell = grid[top : top + 16 * zoom : zoom, left : left + 32 * zoom : zoom]
        assert np.ascontiguousarray(cell[:, :16]).tobytes() in known
        assert np.array_equal(cell[:, 16:], own)


def test_the_guided_image_is_between_the_image_and_nothing(run):
    words = ("--count", 2, "--image", "a.png")
    code, three, err = run("sample", "runs/tiny", *words, "--guidance", "image=3", "--out", "g3")
    assert (code, three["guidance"], three["evaluations"]) == (0, {"image": 3.0}, 2 * 5), err
    _, plain, _ = run("sample", "runs/tiny", *words, "--guidance", 3, "--out", "plain")
    assert np.array_equal(drawn(three), drawn(plain))
    # The weight 0 is the image of no image, whatever it is given.
    _, zero, _ = run("sample", "runs/tiny", *words, "--guidance", "image=0", "--out", "g0")
    other = ("--count", 2, "--image", "b.png", "--guidance", "image=0", "--out", "g0b")
    _, same, _ = run("sample", "runs/tiny", *other)
    assert np.array_equal(drawn(zero), drawn(same))
    _, one, _ = run("sample", "runs/tiny", *words, "--out", "g1")
    assert not np.array_equal(drawn(one), drawn(zero))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "runs/plain", "--image", "a.png"), "--image: the model was trained without im"),
        (("sample", "runs/tiny", "--image", "a8.png"),
         "a8.png: is 8 x 8 pixels, and the model takes 16 x 16 or 4 x 4"),
        (("sample", "runs/tiny", "--image", "narrow.png"), "narrow.png: is 4 x 16 pixels"),
        (("sample", "runs/tiny", "--image", "broken.png"), "broken.png: not a PNG, JPEG or WebP"),
        (("sample", "runs/tiny", "--image", "nowhere.png"), "nowhere.png: cannot be read"),
        (("sample", "runs/tiny", "--set", BOXES, "--image", "a4.png"),
         "a4.png: is 4 x 4 pixels, and the model takes 16 x 16\n"),
        (("invert", "runs/tiny", "a.png"), "--image: name the image to go by"),
        (("check", "tiny", "data.image=null"), "network.image_channels is 3, and data.image does"),
        (("check", "tiny", "network.image_channels=0"), "is 0; set network.image_channels=3"),
        (("check", "tiny", "network.image_channels=1"), "is 1; set network.image_channels=3"),
        (("check", "tiny", "data.image.times=5"), "blocks of 5 x 5 pixels do not divide"),
        (("check", "tiny", "data.image.times=1"), "times must be at least 2"),
        (("check", "tiny", "data.resolution_weights={8: 1, 16: 1}"), "given at one resolution"),
        (("check", "tiny", PYRAMID), "samples at one size, not over a pyramid"),
        (("check", "tiny", "trainer.dropout.image=2"), "dropout.image must be in [0, 1]"),
        (("check", "tiny", "trainer.dropout.image=0", "evaluation.guidance=2"),
         "(trainer.dropout.image is 0)"),
        (("train", "tiny", "network.image_channels=0", "--run", "runs/no"), "is 0; set network"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_line(run, words, message):
    code, _, err = run(*words)
    assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "words",
    [
        ("interpolate", "runs/tiny", "a.png", "b.png", "--count", 3, "--image", "a.png"),
        ("invert", "runs/tiny", "a.png", "b.png", "--image", "a.png", "--image", "b4.png"),
        ("progressive", "runs/tiny", "--count", 2, "--image", "a.png"),
        ("losses", "runs/tiny", "--count", 8, "--levels", 3),
        ("likelihood", "runs/tiny", "--count", 2, "--steps", 4),
        ("evaluate", "runs/tiny", "--count", 10, "--metrics", "score"),
        ("sweep", "runs/tiny", "--count", 10, "--metrics", "score", "--steps", "2,3"),
        ("replay", "runs/tiny", "--step", 1),
        ("sample", "runs/tiny", "--count", 2, "--set", BOXES, "--image", "a.png", "--out", "boxes"),
    ],
)  # fmt: skip
def test_every_command_opens_a_run_with_images(run, words):
    code, _, err = run(*words)
    assert code == 0, err


def test_losses_are_those_of_the_images_own_remains(run):
    _, own, _ = run("losses", "runs/tiny", "--count", 8, "--levels", 3)
    denoiser = dp.Run("runs/tiny").denoiser
    clean = Synthetic(40, 16).open().read(torch.arange(8) * 5) / 127.5 - 1
    source, mask = Downsampled(4)(clean, torch.zeros(8, 0))
    level = own["levels"]["ema"][1]
    sigma = torch.tensor(level["sigma"], dtype=torch.float32)
    noise = ImageNoise(0, range(8), "levels")(torch.empty_like(clean))
    with torch.no_grad():
        found = denoiser(clean + sigma * noise, sigma, source=source, source_mask=mask)
    assert (found - clean).square().mean().item() == pytest.approx(level["error"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one(home):
    folders = []
    for devices in (1, 2):
        command = [sys.executable, "-m", "diffusion_pl", "train", "tiny", BOXES]
        # With Adam's own eps, gradients that are 0 but for rounding move as fast as any other.
        command += ["optimizer.eps=1e-2", f"trainer.devices={devices}", "--run", f"runs/d{devices}"]
        result = subprocess.run(
            command, cwd=home, capture_output=True, text=True, timeout=170, check=False
        )
        assert result.returncode == 0, result.stderr
        folders.append(home / "runs" / f"d{devices}")
    one, two = (checkpoints.load(checkpoints.latest(each / "checkpoints")) for each in folders)
    for key, value in one["state_dict"].items():
        # Sums in another order, magnified by Adam in its first steps.
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-3, atol=1e-4)
