"""`inpaint` as a user types it: what is kept, what is filled, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from homes import answering, experiments
from PIL import Image
from test_commands_flow import NOTHING
from test_commands_models import TINY

import diffusion_pl as dp
from diffusion_pl.cli import main
from diffusion_pl.commands import inpaint, latents, runs
from diffusion_pl.commands.options import ConditionOptions, RunOptions, SamplerOptions

HOLE = (slice(2, 6), slice(3, 7))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pictures; runs/tiny with 8 classes, runs/nothing, whose pixels are independent, and
    runs/something, which has begun to learn, so that its Jacobian is still about a positive one."""
    folder = tmp_path_factory.mktemp("home")
    experiments(folder, TINY)
    (folder / "experiments" / "nothing.yaml").write_text(NOTHING)
    source = np.random.default_rng(0)
    # Black and white mostly: what is at the ends of the range must be kept too.
    picture = source.normal(128, 200, (8, 8, 3)).clip(0, 255).astype(np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[HOLE] = 255
    save(folder / "a.png", picture)
    save(folder / "a.jpg", picture, quality=95)
    save(folder / "a.webp", picture, lossless=True)
    save(folder / "grey.png", picture[:, :, 0])
    save(folder / "large.png", np.zeros((16, 12, 3), np.uint8))
    save(folder / "mask.png", mask)
    save(folder / "rgb.png", np.where(mask[:, :, None] > 0, [200, 180, 90], [200, 0, 0]))
    save(folder / "soft.png", np.where(mask > 0, 128, 127))
    # Erased in an editor: transparent where it is to be filled, black elsewhere.
    save(folder / "erased.png", np.stack([0 * mask, 0 * mask, 0 * mask, 255 - mask], axis=2))
    save(folder / "narrow.png", mask[:, :6])
    save(folder / "black.png", 0 * mask)
    save(folder / "white.png", 0 * mask + 255)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("tiny", "nothing"):
            assert main(["train", name]) == 0
        learns = ["optimizer.lr=1e-3", "trainer.total_images=64", "--run", "runs/something"]
        assert main(["train", "nothing", *learns]) == 0
    return folder


def save(path, array, **more):
    Image.fromarray(np.asarray(array).astype(np.uint8)).save(path, **more)


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    return answering(capsys)


def pixels(path):
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB")).astype(int)


def outside():
    kept = np.ones((8, 8), bool)
    kept[HOLE] = False
    return kept


def results(result):
    return [pixels(Path(result["folder"]) / name) for name in result["files"]]


@pytest.mark.parametrize("method", ["replacement", "gradient"])
@pytest.mark.parametrize(
    "sampler",
    [(), ("--sampler", "heun", "--steps", 5), ("--sampler", "dpmpp_2m_sde", "--steps", 5)],
)
def test_what_is_not_masked_is_the_input_to_the_bit(run, tmp_path, method, sampler):
    words = ("--label", 3, "--method", method, "--count", 3, "--out", tmp_path, *sampler)
    code, result, err = run("inpaint", "runs/tiny", "a.png", "mask.png", *words)
    assert code == 0, err
    picture, found = pixels("a.png"), results(result)
    assert len(found) == 3 and result["filled"] == 0.25
    for image in found:
        assert np.array_equal(image[outside()], picture[outside()])
        assert (image[HOLE] != picture[HOLE]).mean() > 0.25
    assert (found[0][HOLE] != found[1][HOLE]).mean() > 0.25


@pytest.mark.parametrize("image", ["a.jpg", "a.webp", "grey.png"])
@pytest.mark.parametrize("mask", ["rgb.png", "soft.png", "erased.png"])
def test_any_format_is_read_and_lighter_than_mid_grey_is_filled(run, tmp_path, image, mask):
    words = ("--label", 3, "--method", "replacement", "--count", 1, "--out", tmp_path)
    code, result, err = run("inpaint", "runs/tiny", image, mask, *words, "--steps", 3)
    assert code == 0, err
    (found,) = results(result)
    assert result["filled"] == 0.25
    assert np.array_equal(found[outside()], pixels(image)[outside()])
    assert (found[HOLE] != pixels(image)[HOLE]).any()


@pytest.mark.parametrize("method", ["replacement", "gradient"])
def test_the_sampler_ends_in_the_known_pixels_by_itself(home, monkeypatch, method):
    """What is written over them at the end is theirs to rounding: there is no seam."""
    monkeypatch.chdir(home)
    opened = runs.open_run(
        Path("runs/tiny"), SamplerOptions(), RunOptions(), ConditionOptions(label=3)
    )
    image = latents.read_images([Path("a.png")], opened.generator)
    filled = inpaint.read_mask(Path("mask.png"), Path("a.png"), (8, 8))
    sampler = latents.base_sampler(opened.generator)
    found, _ = inpaint.inpainted(opened.generator, sampler, image, filled, [0, 1], method)
    kept = torch.from_numpy(outside())
    wanted = image.expand_as(found)[..., kept]
    torch.testing.assert_close(found[..., kept], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["replacement", "gradient"])
def test_independent_pixels_are_filled_as_they_are_sampled(run, tmp_path, method):
    """A network that answers nothing says that pixels are independent: the rest tells nothing."""
    code, drawn, err = run("sample", "runs/nothing", "--count", 2, "--out", tmp_path / "drawn")
    assert code == 0, err
    words = ("--method", method, "--count", 2, "--out", tmp_path / "filled")
    code, result, err = run("inpaint", "runs/nothing", "a.png", "mask.png", *words)
    assert code == 0, err
    for name, image in zip(result["files"], results(result), strict=True):
        sampled = pixels(Path(drawn["folder"]) / "images" / name)
        assert np.abs(image[HOLE] - sampled[HOLE]).max() <= 1  # rounding


def test_the_gradient_tells_the_filled_part_of_the_rest(run, tmp_path):
    """By replacement the first denoised image is that of noise alone, whatever the picture is."""
    changed = pixels("a.png")
    changed[0] = 255 - changed[0]
    save(tmp_path / "b.png", changed)
    moved = {}
    for method in ("replacement", "gradient"):
        found = []
        for image in ("a.png", tmp_path / "b.png"):
            words = ("--method", method, "--count", 1, "--out", tmp_path / method, "--steps", 1)
            _, result, _ = run("inpaint", "runs/something", image, "mask.png", *words)
            found += results(result)
        moved[method] = np.abs(found[0] - found[1])[HOLE].max()
    assert moved["replacement"] == 0 < moved["gradient"]


def test_a_result_depends_on_seed_and_index_alone(run, tmp_path):
    drawn = {}
    for name, words in {
        "four": ("--count", 4), "by three": ("--count", 4, "--batch-size", 3),
        "one": ("--count", 1), "another": ("--count", 1, "--seed", 1),
    }.items():  # fmt: skip
        words = ("--label", 3, "--out", tmp_path / name, *words)
        code, result, err = run("inpaint", "runs/tiny", "a.png", "mask.png", *words)
        assert code == 0, err
        drawn[name] = results(result)
    for first, again in zip(drawn["four"], drawn["by three"], strict=True):
        assert np.abs(first - again).max() <= 1  # rounding differs with the batch
    assert np.abs(drawn["four"][0] - drawn["one"][0]).max() <= 1
    assert np.abs(drawn["four"][0] - drawn["another"][0]).max() > 5


def test_steps_are_taken_again(run, tmp_path):
    words = ("inpaint", "runs/tiny", "a.png", "mask.png", "--label", 3, "--method", "replacement")
    once, thrice = (
        run(*words, "--steps", 5, "--count", 2, "--resample", times, "--out", tmp_path / str(times))
        for times in (1, 3)
    )
    assert (once[1]["evaluations"], thrice[1]["evaluations"]) == (5, 15)
    assert (once[1]["resample"], thrice[1]["resample"]) == (1, 3)
    first, other = results(once[1]), results(thrice[1])
    assert (first[0][HOLE] != other[0][HOLE]).any()
    assert np.array_equal(first[0][outside()], other[0][outside()])


def test_the_grid_shows_the_image_the_mask_and_the_results(run, tmp_path):
    words = ("--label", 3, "--count", 2, "--out", tmp_path, "--steps", 3)
    _, result, _ = run("inpaint", "runs/tiny", "a.png", "mask.png", *words)
    sheet = pixels(result["grid"])
    mask = np.repeat(np.where(outside(), 0, 255)[:, :, None], 3, axis=2)
    wanted = [pixels("a.png"), mask, *results(result)]
    side = 64  # 8 pixels, magnified
    assert sheet.shape == (side, 4 * side + 3 * 2, 3)
    for place, image in enumerate(wanted):
        tile = sheet[4::8, place * (side + 2) :][:, 4:side:8]
        assert np.array_equal(tile, image)


def test_from_python_it_is_the_same(run, tmp_path):
    opened = dp.Run("runs/tiny")
    image = torch.from_numpy(pixels("a.png")).permute(2, 0, 1).byte()
    mask = torch.from_numpy(~outside())
    for words, options in (
        (("--method", "replacement", "--resample", 2), {"method": "replacement", "resample": 2}),
        (("--seed", 3), {"seed": 3}),
    ):
        words = ("--label", 3, "--count", 2, "--out", tmp_path / "out", "--steps", 3, *words)
        _, result, err = run("inpaint", "runs/tiny", "a.png", "mask.png", *words)
        found = opened.inpaint(image, mask, 2, label=3, steps=3, **options)
        assert np.array_equal(found.permute(0, 2, 3, 1), np.stack(results(result))), err
    alone = opened.inpaint(image, mask, 1, label=3, steps=3, seed=3, batch_size=1)
    assert (alone[0].int() - found[0].int()).abs().max() <= 1  # rounding differs with the batch
    for given, message in (
        ((image.float(), mask), r"image: must be uint8 \(3, 8, 8\) \(got torch.float32"),
        ((image[:, :4], mask), r"image: must be uint8 \(3, 8, 8\) \(got torch.uint8 \(3, 4, 8\)"),
        ((image, mask[:, :6]), r"mask: must be bool \(8, 8\) \(got torch.bool \(8, 6\)"),
        ((image, mask.byte()), r"mask: must be bool \(8, 8\) \(got torch.uint8"),
        ((image, mask & False), "mask: fills nothing"),
        ((image, mask | True), "mask: is white everywhere"),
        ((image, mask, 0), "--count and --resample must be at least 1"),
    ):
        with pytest.raises(dp.UserError, match=message):
            opened.inpaint(*given, label=3)
    with pytest.raises(dp.UserError, match="--label: name the images' class"):
        opened.inpaint(image, mask)
    with pytest.raises(dp.UserError, match="method: must be replacement or gradient"):
        opened.inpaint(image, mask, label=3, method="dps")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.png narrow.png --label 3",
         "narrow.png: 6 x 8 pixels, and a.png has 8 x 8; a mask has the size of its image"),
        ("a.png large.png --label 3", "large.png: 12 x 16 pixels, and a.png has 8 x 8"),
        ("large.png mask.png --label 3", "large.png: 12 x 16 pixels where"),
        ("a.png black.png --label 3", "black.png: fills nothing; paint white"),
        ("a.png white.png --label 3", "white.png: is white everywhere"),
        ("a.png nowhere.png --label 3", "nowhere.png: cannot be read"),
        ("nowhere.png mask.png --label 3", "nowhere.png: cannot be read"),
        ("a.png mask.png", "--label: name the images' class, 0 to 7"),
        ("a.png mask.png --label 3 --count 0", "--count and --resample must be at least 1"),
        ("a.png mask.png --label 3 --resample 0", "--count and --resample must be at least 1"),
        ("a.png mask.png --label 3 --method dps", 'Choose from: "replacement", "gradient"'),
        ("a.png mask.png --label 3 --base-alone", "--base-alone: the run samples at one size"),
        ("a.png", "MASK requires"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(run, tmp_path, words, message):
    code, result, err = run("inpaint", "runs/tiny", *words.split(), "--out", tmp_path / "out")
    assert (code, result) == (2, None)
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
