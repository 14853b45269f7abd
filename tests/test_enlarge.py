"""Pyramids as a user meets them: in YAML, in every command, and begun from a picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from homes import experiments
from PIL import Image

from diffusion_pl.cli import main
from diffusion_pl.commands.enlarge import VARIATIONS
from diffusion_pl.diffusion.consistency import nearest
from diffusion_pl.diffusion.timesteps import LinearBetas

ROOT = Path(__file__).parents[1]
TINY = """# A tiny pyramid for tests (no published number)
defaults: base
data:
  dataset: {_target_: diffusion_pl.data.synthetic.Synthetic, count: 40, resolution: 16}
  batch_size: 8
network:
  _target_: diffusion_pl.networks.ddpm_unet.DDPMUNet
  resolution: 16
  model_channels: 8
  channel_mult: [1, 2]
  blocks: 1
  attention: [8]
  groups: 4
  dropout: 0.0
  position_frequencies: 2
objective: {_target_: diffusion_pl.objectives.ddpm.DDPM, T: 20, beta_1: 1e-3, beta_T: 0.4}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20}
sampler:
  _target_: diffusion_pl.samplers.pyramid.PyramidSampler
  base:
    _target_: diffusion_pl.samplers.sampler.Sampler
    integrate: {_target_: diffusion_pl.samplers.ancestral.ancestral, _partial_: true}
    schedule:
      _target_: diffusion_pl.diffusion.timesteps.LinearBetas
      T: 20
      beta_1: 1e-3
      beta_T: 0.4
    steps: 20
    clip_denoised: true
    unit_start: true
  levels: [4, 8, 16]
  restart: [0.5, 0.25]
features: {name: shapes}
evaluation: {every: 1000, count: 8, batch_size: 8, grid: 4, metrics: []}
trainer: {total_images: 16, checkpoint_every: 16, log_every: 16, accelerator: cpu, precision: fp32,
  loggers: []}
"""
# 20 timesteps, then those from 0.5 T = 10 and 0.25 T = 5 on.
EVALUATIONS = 20 + 11 + 6


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with experiments/, a trained run and pictures."""
    folder = tmp_path_factory.mktemp("home")
    experiments(folder, TINY)
    (folder / "pictures").mkdir()
    source = np.random.default_rng(0)
    for name, shape in {
        "a.png": (8, 8, 3), "b.png": (8, 4, 3), "c.png": (6, 6, 3), "d.png": (4, 4, 3),
        "large.png": (16, 16, 3),
    }.items():  # fmt: skip
        # Black and white mostly: what is clipped must agree too.
        pixels = (source.normal(128, 200, shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    half = np.zeros((16, 16), np.uint8)
    half[:8] = 255
    Image.fromarray(half).save(folder / "mask.png")
    for name in "eagcbfhd":  # not in order
        shutil.copy(folder / "a.png", folder / "pictures" / f"{name}.png")
    (folder / "pictures" / "notes.txt").write_text("not a picture")
    (folder / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "tiny"]) == 0
    return folder


@pytest.fixture
def run(home, monkeypatch, capsys):
    """Run a command there and give its exit code, its output and stderr."""
    monkeypatch.chdir(home)

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        out = json.loads(captured.out) if captured.out.startswith("{") else captured.out
        return code, out, captured.err

    return call


def pixels(path):
    with Image.open(path) as file:
        return np.asarray(file).astype(float)


def reduced(image, shape):
    """The mean of whole blocks."""
    height, width = shape[:2]
    blocks = image.reshape(height, image.shape[0] // height, width, image.shape[1] // width, 3)
    return blocks.mean((1, 3))


def test_check_says_what_a_pyramid_does(run):
    code, out, err = run("check", "tiny")
    assert code == 0, err
    assert "in 37 steps" in out
    cost = 20 / 16 + 11 / 4 + 6
    assert f"6 steps: the work of {cost:.1f} at 16" in out
    assert "pyramid  4 from " in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler.levels=[4, 6, 8]"], "sampler: the pyramid ends at 8 pixels, the images have 16"),
        (["sampler.levels=[8, 4, 16]"], "sampler: levels must be positive and ascend"),
        (["sampler.levels=[3, 8, 16]"], "sampler.levels: "),
        (["sampler.restart=[0.5, 1.5]"], "sampler: restart is a share of the schedule"),
        (["sampler.restart=[0.5]"], "each of the 2 levels after the first"),
        (["sampler.restart=70.0", "sampler.by=sigma"], "sampler: a restart must lie above"),
        (["sampler.by=T"], "sampler.by: must be one of 'share', 'sigma'"),
        (["sampler.enlarge=lanczos"], "sampler.enlarge: must be one of 'area', 'bilinear'"),
        (["sampler.base.stesp=3"], "did you mean 'steps'?"),
        (["sampler.base.steps=0"], "sampler: a sampler needs at least 1 step"),
    ],
)
def test_bad_pyramids_are_one_line(run, overrides, message):
    code, _, err = run("check", "tiny", *overrides)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_levels_may_be_shares_and_one_restart_serves_all(run):
    code, out, err = run("check", "tiny", "sampler.levels=[0.25, 0.5, 1]", "sampler.restart=0.25")
    assert code == 0, err
    assert f"in {20 + 6 + 6} steps" in out


@pytest.mark.parametrize(
    ("words", "evaluations"),
    [
        ((), EVALUATIONS),
        # On the run's own timesteps 19, 13, 6, 0: all, those below 10, and below 5.
        (("--sampler", "heun", "--steps", 4), 7 + 5 + 3),
        (("--sampler", "euler", "--steps", 4), 4 + 3 + 2),
        # Timesteps 19, 13, 6, 0 below 10, and below 5.
        (("--steps", 4), 4 + 3 + 2),
        (("--set", "sampler.restart=1.0"), 20),
    ],
)
def test_a_run_draws_its_pyramid_over_any_base(run, words, evaluations):
    code, result, err = run("sample", "runs/tiny", "--count", 3, *words)
    assert code == 0, err
    assert result["evaluations"] == evaluations
    assert np.load(Path(result["folder"]) / "images.npz")["images"].shape == (3, 16, 16, 3)


def test_a_drawn_image_depends_on_seed_and_index_alone(run, tmp_path):
    run("sample", "runs/tiny", "--count", 4, "--batch-size", 3, "--out", tmp_path / "four")
    run("sample", "runs/tiny", "--count", 1, "--first", 2, "--out", tmp_path / "one")
    first, again = (pixels(tmp_path / name / "images" / "000002.png") for name in ("four", "one"))
    assert np.abs(first - again).max() <= 1  # rounding differs with the batch


@pytest.mark.parametrize(
    "words",
    [
        ("inpaint", "runs/tiny", "large.png", "mask.png", "--count", 1),
        ("invert", "runs/tiny", "large.png"),
        ("interpolate", "runs/tiny", "large.png", "large.png", "--count", 3),
        ("progressive", "runs/tiny", "--count", 2, "--share", 1.0),
        ("likelihood", "runs/tiny", "--count", 2, "--steps", 2),
        ("likelihood", "runs/tiny", "--count", 2, "--by", "bound"),
    ],
)
def test_what_is_of_one_size_takes_a_pyramids_base_only_if_told(run, words, tmp_path):
    out = () if words[0] == "likelihood" else ("--out", tmp_path / "out")
    code, result, err = run(*words, *out)
    assert code == 2 and not result
    assert err.startswith(f"error: {words[0]}: works at one size, and the run samples over 3")
    assert "--base-alone" in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
    code, _, err = run(*words, *out, "--base-alone")
    assert code == 0, err


def test_a_pyramid_is_evaluated_as_it_draws(run):
    assert run("evaluate", "runs/tiny", "--count", 4)[0] == 0


def test_progressive_images_of_a_pyramid_go_over_its_sizes_to_what_it_draws(run, tmp_path):
    words = ("--count", 2, "--out", tmp_path / "shown")
    code, result, err = run("progressive", "runs/tiny", *words, "--frames", 6)
    assert code == 0, err
    sizes, sigmas = result["sizes"], result["sigmas"]
    assert len(sizes) == 7 and sizes == sorted(sizes) and set(sizes) == {4, 8, 16}
    assert (sizes[-1], sigmas[-1]) == (16, 0)
    for side in (4, 8, 16):  # within a size the noise falls
        falling = [sigma for size, sigma in zip(sizes, sigmas, strict=True) if size == side]
        assert falling == sorted(falling, reverse=True)
    run("sample", "runs/tiny", "--count", 2, "--out", tmp_path / "drawn")
    for row in range(2):
        shown = pixels(tmp_path / "shown" / f"{row:06d}_006.png")
        assert np.array_equal(shown, pixels(tmp_path / "drawn" / "images" / f"{row:06d}.png"))
        first = pixels(tmp_path / "shown" / f"{row:06d}_000.png")
        blocks = first.reshape(4, 4, 4, 4, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()  # 4 pixels, repeated


def test_export_says_what_the_base_is(run, tmp_path):
    words = (
        "network.position_frequencies=0",
        "sampler.base.integrate.variance=large",
        "trainer.total_images=8",
    )
    code, _, err = run("train", "tiny", *words, "--run", "runs/plain")
    assert code == 0, err
    code, _, err = run("export", "runs/plain", tmp_path / "out", "--format", "diffusers")
    assert code == 0, err
    scheduler = json.loads((tmp_path / "out" / "scheduler_config.json").read_text())
    assert (scheduler["variance_type"], scheduler["clip_sample"]) == ("fixed_large", True)


@pytest.mark.parametrize(
    ("name", "to", "size", "levels"),
    [
        ("a.png", 16, (16, 16), [8, 16]),
        ("a.png", 24, (24, 24), [8, 16, 24]),
        ("a.png", 40, (40, 40), [8, 16, 40]),
        ("b.png", 16, (16, 8), [8, 16]),
        ("c.png", 18, (18, 18), [6, 18]),
        ("d.png", 16, (16, 16), [4, 8, 16]),
        ("d.png", 12, (12, 12), [4, 8, 12]),
        ("d.png", 20, (20, 20), [4, 8, 16, 20]),
    ],
)
@pytest.mark.parametrize("sampler", [(), ("--sampler", "deis", "--steps", 5)])
def test_the_result_made_smaller_is_the_picture(run, tmp_path, name, to, size, levels, sampler):
    code, result, err = run(
        "enlarge", "runs/tiny", name, "--to", to, "--count", 2, "--out", tmp_path, *sampler
    )
    assert code == 0, err
    picture = pixels(name)
    (row,) = result["pictures"]
    assert row["levels"] == levels and row["to"] == list(size)
    worst = 0.0
    for file in row["files"]:
        image = pixels(tmp_path / file)
        assert image.shape == (*size, 3)
        if all(level % levels[0] == 0 for level in levels):
            worst = max(worst, np.abs(reduced(image, picture.shape) - picture).max())
    # Every pixel is rounded to its level, by half of one at most, and so is their mean.
    assert worst <= 0.5 + 1e-9
    assert row["largest_difference"] == pytest.approx(worst, abs=1e-3)
    assert (tmp_path / "grid.png").exists()


def test_without_consistency_any_size_is_taken_and_the_picture_is_not_kept(run, tmp_path):
    words = ("enlarge", "runs/tiny", "c.png", "--out", tmp_path, "--restart", 0.5)
    code, result, err = run(*words, "--to", 16, "--no-consistent")
    assert code == 0, err
    (row,) = result["pictures"]
    assert row["levels"] == [6, 8, 16]
    assert row["largest_difference"] > 2
    code, _, err = run(*words, "--to", 16)
    assert code == 2
    assert "c.png: 6 x 6 pixels are no whole part of 16 x 16" in err


def test_consistency_acts_on_every_step(run, tmp_path):
    """Made to agree only at the end, the image drawn without it would be another.

    The run's own sampler clips, so that what is saved is what was drawn, to half a level.
    """
    words = ("enlarge", "runs/tiny", "a.png", "--restart", 2)
    for way in ("--consistent", "--no-consistent"):
        code, _, err = run(*words, way, "--out", tmp_path / way)
        assert code == 0, err
    every, never = (
        torch.from_numpy(pixels(tmp_path / way / "000000_000.png")).permute(2, 0, 1)[None]
        for way in ("--consistent", "--no-consistent")
    )
    picture = torch.from_numpy(pixels("a.png")).permute(2, 0, 1)[None]
    at_the_end = nearest(never / 127.5 - 1, picture / 127.5 - 1)
    assert (at_the_end - (every / 127.5 - 1)).abs().max() > 4 / 127.5


def test_the_restart_is_the_runs_own_or_half_the_factor_or_as_told(run, tmp_path):
    def restarts(*words):
        command = ("enlarge", "runs/tiny", "d.png", "--count", 2, "--out", tmp_path)
        code, result, err = run(*command, *words)
        assert code == 0, err
        return result["pictures"][0]["restart"], result["pictures"][0]["evaluations"]

    own, evaluations = restarts()
    _, out, _ = run("check", "tiny")
    assert [f"{level:.4g}" for level in own] == [
        word.split(" from ")[1].split()[0] for word in out.splitlines()[-1].split(", ")[1:]
    ]
    assert evaluations == 11 + 6
    # Of another integrator too the levels are the run's table: the nearest of it.
    table = LinearBetas(20, 1e-3, 0.4).sigmas()
    for words, asked in ((("--to", 12), 12 / 8 / 2), (("--restart", 1.25), 1.25)):
        nearest = float(table[(table - asked).abs().argmin()])
        found = restarts(*words, "--sampler", "euler", "--steps", 6)[0]
        assert found[-1] == pytest.approx(nearest)


def test_a_variation_depends_on_the_picture_the_seed_and_its_index_alone(run, tmp_path):
    def drawn(folder, *words):
        code, result, err = run("enlarge", "runs/tiny", *words, "--out", tmp_path / folder)
        assert code == 0, err
        return [
            [pixels(tmp_path / folder / file) for file in row["files"]]
            for row in result["pictures"]
        ]

    three = drawn("three", "a.png", "d.png", "--count", 3, "--batch-size", 2)
    one = drawn("one", "a.png", "d.png", "--count", 1)
    for number in range(2):
        assert np.abs(three[number][0] - one[number][0]).max() <= 1
        assert np.abs(three[number][0] - three[number][1]).max() > 2
    # The seed of what the ancestral chain adds, and of what a deterministic one begins from.
    other = drawn("seed", "a.png", "--seed", 1)
    assert np.abs(other[0][0] - one[0][0]).max() > 2
    euler = ("a.png", "--sampler", "euler", "--steps", 4)
    first, second = (drawn(f"euler{n}", *euler, "--seed", n)[0][0] for n in (0, 1))
    assert np.abs(first - second).max() > 2
    moved = drawn("moved", "d.png", "a.png")
    assert np.abs(moved[1][0] - one[0][0]).max() > 2  # another index
    code, _, err = run("enlarge", "runs/tiny", "a.png", "--count", VARIATIONS + 1)
    assert (code, "--count must be 1 to 1,000" in err) == (2, True)


def test_a_folder_is_its_pictures_by_name_and_jpegs_are_read(run, tmp_path, home):
    Image.open(home / "a.png").save(tmp_path / "a.jpg")
    code, result, err = run(
        "enlarge", "runs/tiny", "pictures", tmp_path / "a.jpg", "--to", 24, "--out", tmp_path / "o"
    )
    assert code == 0, err
    names = [Path(row["picture"]).name for row in result["pictures"]]
    assert names == [*(f"{name}.png" for name in "abcdefgh"), "a.jpg"]
    assert result["grid"] is not None


def test_results_of_several_shapes_have_no_grid(run, tmp_path):
    code, result, err = run("enlarge", "runs/tiny", "a.png", "b.png", "--to", 16, "--out", tmp_path)
    assert code == 0, err
    assert result["grid"] is None and not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("large.png",), "large.png: 16 x 16 pixels are not smaller than --to 16"),
        (("a.png", "--to", 4), "a.png: 8 x 8 pixels are not smaller than --to 4"),
        (("a.png", "--to", 8), "not smaller than --to 8"),
        (("a.png", "--to", 20), "8 x 8 pixels are no whole part of 20 x 20"),
        (("c.png", "--to", 15, "--no-consistent"), "c.png: "),
        (("a.png", "--restart", 1000), "a.png: a restart must lie above the lowest"),
        (("a.png", "--restart", 0), "a.png: a restart must lie above the lowest"),
        (("a.png", "--count", 0), "--count must be 1 to 1,000 (got 0)"),
        (("missing.png",), "missing.png: cannot be read (No such file or directory)"),
        (("pictures/notes.txt",), "notes.txt: not a PNG, JPEG or WebP image"),
        (("empty",), "empty: has no images (.jfif, .jpe, .jpeg, .jpg, "),
        (("a.png", "--label", 1), "label 1: the model has no classes; leave it out"),
    ],
)
def test_bad_input_is_one_line(run, words, message):
    code, _, err = run("enlarge", "runs/tiny", *words)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_run_without_a_pyramid_enlarges_in_one_step(run, tmp_path):
    base = json.dumps({
        "_target_": "diffusion_pl.samplers.sampler.Sampler",
        "integrate": {"_target_": "diffusion_pl.samplers.euler.euler", "_partial_": True},
        "schedule": {
            "_target_": "diffusion_pl.diffusion.timesteps.LinearBetas",
            "T": 20, "beta_1": 1e-3, "beta_T": 0.4,
        },
        "steps": 20,
    })  # fmt: skip
    code, result, err = run(
        "enlarge", "runs/tiny", "d.png", "--out", tmp_path, "--set", f"sampler={base}"
    )
    assert code == 0, err
    (row,) = result["pictures"]
    assert row["levels"] == [4, 16]
    assert row["restart"][0] == pytest.approx(2.0, abs=0.4)  # the timestep nearest to half of 4
    assert torch.isfinite(torch.tensor(row["largest_difference"]))
