"""`invert` and `interpolate` of a network that answers nothing, whose flow has a closed form.

EDM with F = 0 is D = x sd^2 / (sigma^2 + sd^2), so that the flow keeps x / sqrt(sigma^2 + sd^2).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from homes import SMALLEST, answering, trained
from PIL import Image

SD = 0.5
# One step at such a rate leaves the network's last layer at its 1e-5.
NOTHING = f"""{SMALLEST}
data: {{_target_: diffusion_pl.data.synthetic.Synthetic, count: 8, resolution: 8, batch_size: 8}}
optimizer: {{lr: 1e-12}}
ema: {{_target_: diffusion_pl.training.ema.EMA, half_life: 8}}
features: {{name: shapes}}
evaluation: {{every: 1000, count: 8, metrics: []}}
trainer: {{total_images: 8, checkpoint_every: 8, log_every: 8, accelerator: cpu, precision: fp32,
  loggers: []}}
"""
GREYS = (100, 160)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = trained(tmp_path_factory.mktemp("nothing"), NOTHING)
    for grey in GREYS:
        Image.fromarray(np.full((8, 8, 3), grey, dtype=np.uint8)).save(folder / f"{grey}.png")
    return folder


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    call = answering(capsys)
    pair = [f"{grey}.png" for grey in GREYS]

    def on_the_pair(command, *words):
        code, result, err = call(command, "runs/tiny", *pair, *words)
        assert code == (0 if result else 2), err
        return result or err

    return on_the_pair


def scaled(grey):
    return grey / 127.5 - 1


def test_latents_are_those_of_the_closed_form(run):
    result = run("invert", "--steps", 150)
    assert result["steps"] == 150
    assert max(result["rms_error_of_255"]) < 0.1
    latents = np.load(Path(result["folder"]) / "latents.npz")
    assert latents["sigma"] == 80
    expected = [scaled(grey) * math.sqrt(80**2 + SD**2) / SD / 80 for grey in GREYS]
    np.testing.assert_allclose(latents["latents"].mean(axis=(1, 2, 3)), expected, rtol=2e-3)
    np.testing.assert_allclose(latents["latents"].std(axis=(1, 2, 3)), 0, atol=1e-3)


def test_the_error_is_that_of_the_image_that_comes_back(run):
    """So few steps miss it by some levels, all pixels alike."""
    result = run("invert", "--steps", 4)
    with Image.open(result["grid"]) as sheet:
        pixels = np.asarray(sheet.convert("L"), dtype=float)
    height, width = pixels.shape
    for column, error in enumerate(result["rms_error_of_255"]):
        across = width * (1 + 2 * column) // 4
        before, after = pixels[height // 4, across], pixels[3 * height // 4, across]
        assert before == GREYS[column] and error > 2
        assert abs(after - before) == pytest.approx(error, abs=0.51)


def rows(result):
    images = []
    for file in sorted(Path(result["folder"]).glob("0*.png")):
        with Image.open(file) as image:
            images.append(np.asarray(image) / 127.5 - 1)
    return images


def test_ends_are_the_images_and_noise_of_the_level(run):
    sigma = 0.25
    images = rows(run("interpolate", "--sigma", sigma, "--count", 3, "--steps", 60))
    shrunk = SD / math.hypot(sigma, SD)
    for image, grey in zip((images[0], images[2]), GREYS, strict=True):
        # 192 values: three standard deviations of their mean, and of their own.
        assert image.mean() == pytest.approx(scaled(grey) * shrunk, abs=3 * sigma / 192**0.5)
        assert image.std() == pytest.approx(sigma * shrunk, rel=3 / 384**0.5)
    # Halfway on a line noise of two is weaker; on the great circle it is not.
    assert images[1].std() == pytest.approx(sigma * shrunk / 2**0.5, rel=0.2)
    words = ("--sigma", sigma, "--count", 3, "--steps", 60, "--spherical")
    round_ = rows(run("interpolate", *words))[1]
    assert np.square(round_).mean() == pytest.approx(np.square(images[0]).mean(), rel=0.2)


def test_the_seed_decides_the_noise_of_the_ends(run):
    one, again, other = (
        rows(run("interpolate", "--sigma", 0.25, "--count", 2, "--seed", seed))[0]
        for seed in (0, 0, 1)
    )
    assert (one == again).all() and (one != other).any()


def test_the_level_is_that_of_ddpm_s_middle_or_the_highest(run):
    assert run("interpolate", "--count", 2)["sigma"] == 3.42
    low = ("--set", "sampler.schedule.sigma_max=1.0")
    assert run("interpolate", "--count", 2, *low)["sigma"] == 1
    assert run("interpolate", "--count", 2, "--by", "flow")["sigma"] == pytest.approx(80)
    assert "both ends are included, so at least 2 (got 1)" in run("interpolate", "--count", 1)
