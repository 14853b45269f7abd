"""Options of drawing, as a user types them, held against what the run is and how it was trained."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import homes
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from test_commands_models import TINY

from diffusion_pl import cli
from diffusion_pl.cli import main
from diffusion_pl.commands import (
    film,
    runs,
    sample,
    sample_packing,
    sample_ranks,
    sampling,
    sweep,
)
from diffusion_pl.commands.import_ import experiment_of
from diffusion_pl.commands.options import RunOptions, SamplerOptions
from diffusion_pl.commands.sample_folder import SampleFolder
from diffusion_pl.commands.sample_ranks import Rank
from diffusion_pl.diffusion.classifier_free import check_guidance
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator
from diffusion_pl.evaluation.sources import Labels
from diffusion_pl.images import to_bytes
from diffusion_pl.interop import edm
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.objectives.edm_iddpm import nearest
from diffusion_pl.objectives.rectified_flow import RectifiedFlow
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.dpm_solver import dpmpp_2m
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Sampler
from diffusion_pl.training.meeting import place_of

OWN = """
def halved(denoise, x, sigmas, randn_like, *, times=1):
    return 0.5 * denoise(x, sigmas[0]).to(x.dtype)

def other(model, x):
    return x

number = 3
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run whose labels were dropped, and one of the same whose were not."""
    folder = tmp_path_factory.mktemp("home")
    plain = ("trainer.dropout.label=0", "trainer.total_images=8", "--run", "runs/plain")
    homes.trained(folder, TINY, plain)
    (folder / "my_samplers.py").write_text(OWN)
    return folder


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    return homes.answering(capsys)


def drawn(result):
    with np.load(Path(result["folder"]) / "images.npz") as file:
        return file["images"]


def refused(run, *words):
    """The one line of a command that must refuse what it is given."""
    code, result, err = run(*words)
    assert (code, result) == (2, None), err
    assert err.count("\n") == 1 and err.startswith("error: ")
    return err


# --- another integrator ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "integrate"), [("euler", euler), ("dpmpp_2m", dpmpp_2m), ("ancestral", ancestral)]
)
def test_another_sampler_replaces_the_integrator_alone(run, name, integrate):
    """The run's levels, clipping and start are those of its YAML, spelt out here again."""
    code, result, err = run("sample", "runs/tiny", "--count", 3, "--sampler", name)
    assert code == 0, err
    model = runs.open_model(Path("runs/tiny"))
    schedule = LinearBetas(20, 1e-3, 0.4)
    sampler = Sampler(integrate, schedule, 20, clip_denoised=True, unit_start=True)
    images, _ = ImageGenerator(model.denoiser, sampler, (3, 8, 8), sources=[Labels(8)]).images(
        range(3)
    )
    assert np.array_equal(drawn(result), images.permute(0, 2, 3, 1).numpy())


def test_what_another_sampler_changes_is_printed(run):
    _, result, err = run("sample", "runs/tiny", "--count", 1, "--sampler", "euler")
    assert (
        "sampler: ancestral(variance=large) -> euler; the run's own: noise 10.49 to 0.03164 of "
        in err
    )
    assert "20 steps, clip_denoised, unit_start" in err
    assert result["sampler"].startswith("Sampler(integrate=euler, schedule=Timesteps(")
    assert len(result["sampler"]) < 200
    words = ("sample", "runs/tiny", "--count", 1, "--sampler", "heun", "--steps", 5)
    _, result, err = run(*words)
    assert "ancestral(variance=large) -> heun, steps 20 -> 5" in err and "5 steps" not in err
    assert result["evaluations"] == 9
    _, _, err = run("sample", "runs/tiny", "--count", 1)
    assert "->" not in err


SPACING = "sampler.spacing={_target_: diffusion_pl.diffusion.spacings.DDIMUniform, T: 20}"


@pytest.mark.parametrize(
    "setting",
    [
        "sampler.clip_denoised=false",
        "sampler.unit_start=false",
        "sampler.schedule.beta_T=0.3",
        SPACING,
    ],
)
def test_what_is_set_of_the_sampler_counts_beside_another_one(run, setting):
    words = ("sample", "runs/tiny", "--count", 4, "--sampler", "euler", "--steps", 5)
    plain = drawn(run(*words)[1])
    code, result, err = run(*words, "--set", setting)
    assert code == 0, err
    assert not np.array_equal(drawn(result), plain)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sampler", "euler", "--set", "sampler.integrate.variance=small"), "sets the same"),
        (("--steps", "5", "--set", "sampler.steps=7"), "--steps 5 sets the same"),
        (("--guidance", "2", "--set", "evaluation.guidance=3"), "--guidance 2.0 sets the same"),
        (("--sampler", "eulr"), "there is no sampler 'eulr'; there are heun, churn"),
        (
            ("--sampler", "my_samplers.other"),
            "cannot be called with (denoise, x, sigmas,",
        ),
        (("--sampler", "my_samplers.halve"), "has no 'halve'; did you mean 'halved'?"),
        (("--sampler", "my_samplers.number"), "is not a class or function"),
        (("--sampler", "no_such.module"), "there is no module 'no_such'"),
        (("--steps", "21"), "no 21 different noise levels"),
        (("--steps", "0"), "at least 1 step (got 0)"),
        (("--sampler", "euler", "--steps", "33"), "no 33 different noise levels"),
    ],
)
def test_what_no_sampler_can_be_is_one_line(run, words, message):
    assert message in refused(run, "sample", "runs/tiny", "--count", 1, *words)


def test_a_sampler_of_the_users_own_goes_by_its_dotted_path(run):
    code, result, err = run("sample", "runs/tiny", "--count", 2, "--sampler", "my_samplers.halved")
    assert code == 0, err
    assert "-> halved;" in err and result["evaluations"] == 1
    spelt = run(
        "sample", "runs/tiny", "--count", 2, "--sampler", "diffusion_pl.samplers.euler.euler"
    )
    short = run("sample", "runs/tiny", "--count", 2, "--sampler", "euler")
    assert np.array_equal(drawn(spelt[1]), drawn(short[1]))


def test_the_levels_that_a_network_knows_go_over_to_another_integrator():
    own = partial(heun, S_churn=40.0, nearest=nearest)
    churn = sampling.fitted(sampling.integrator_of("churn"), own, EDM())
    assert churn.keywords["nearest"] is nearest and churn.keywords["S_churn"] == 40.0
    assert sampling.fitted(euler, own, EDM()) is euler
    assert sampling.fitted(heun, partial(heun, S_churn=1.0), EDM()) is heun


def test_a_sweep_compares_on_the_runs_own_levels(run):
    words = ("sweep", "runs/tiny", "--count", 20, "--metrics", "frechet", "--features", "pixels")
    code, result, err = run(*words, "--samplers", "euler", "--steps", "4")
    assert code == 0, err
    assert "ancestral(variance=large) -> euler, steps 20 -> 4" in err
    # A setting that is not an axis makes another point, not the row that is there.
    code, again, _ = run(
        *words, "--samplers", "euler", "--steps", "4", "--set", "sampler.clip_denoised=false"
    )
    rows = [json.loads(line) for line in Path(result["rows"]).read_text().splitlines()]
    assert code == 0 and len(rows) == 2
    for row, clip in zip(rows, (", clip_denoised=True", ""), strict=True):
        assert row["evaluations"] == 4
        assert "integrate=euler, schedule=Timesteps(" in row["sampler"]
        assert f"steps=4{clip}, unit_start=True)" in row["sampler"]
    assert again["points"][0]["value"] == rows[1]["value"] != rows[0]["value"]
    # Nor is it the same number of more images.
    more = ("sweep", "runs/tiny", "--count", 24, *words[4:])
    code, again, _ = run(*more, "--samplers", "euler", "--steps", "4")
    assert code == 0 and len(Path(result["rows"]).read_text().splitlines()) == 3
    assert "@24/" in again["points"][0]["name"]


def test_a_sweep_with_an_impossible_point_measures_none(run, tmp_path):
    for words in (("--samplers", "euler,eulr"), ("--samplers", "euler", "--steps", "4,21")):
        refused(run, "sweep", "runs/tiny", "--count", 20, "--metrics", "frechet", "--features",
                "pixels", "--out", tmp_path / "swept", *words)  # fmt: skip
        assert not (tmp_path / "swept").exists()


# --- guidance, held against how the run was trained -----------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "runs/plain", "--count", 1, "--guidance", 2),
        ("sample", "runs/plain", "--count", 1, "--guidance", 0),
        ("sample", "runs/plain", "--count", 1, "--set", "evaluation.guidance=2"),
        # What a command says now is not how the run was trained.
        ("sample", "runs/plain", "--guidance", 2, "--set", "trainer.dropout.label=0.1"),
        ("evaluate", "runs/plain", "--count", 20, "--metrics", "frechet", "--guidance", 2),
        ("sweep", "runs/plain", "--count", 20, "--metrics", "frechet", "--guidance", "1,2"),
        ("progressive", "runs/plain", "--count", 1, "--guidance", 2),
        ("check", "tiny", "evaluation.guidance=2", "trainer.dropout.label=0"),
        ("train", "tiny", "evaluation.guidance=2", "trainer.dropout.label=0", "--run", "runs/no"),
    ],
)
def test_guidance_by_a_null_label_that_was_never_trained_is_refused(run, words):
    err = refused(run, *words)
    assert "was never trained (trainer.dropout.label is 0)" in err
    assert "train or fine-tune with trainer.dropout.label=0.1" in err
    assert not Path("runs/no").exists() and not Path("runs/plain/sweep").exists()


def test_guidance_of_a_model_trained_without_labels_too_is_drawn(run):
    code, result, err = run("sample", "runs/tiny", "--count", 1, "--guidance", 2)
    assert (code, result["evaluations"]) == (0, 40), err
    assert main(["check", "tiny", "evaluation.guidance=2"]) == 0


def test_another_run_guides_what_was_never_without_its_label(run):
    words = ("--count", 1, "--guidance", 2, "--guide", "runs/tiny")
    code, result, err = run("sample", "runs/plain", *words)
    assert (code, result["evaluations"]) == (0, 40), err
    guide = "evaluation.guide={_target_: diffusion_pl.commands.runs.guide, run: runs/tiny}"
    assert main(["check", "tiny", "evaluation.guidance=2", "trainer.dropout.label=0", guide]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "runs/tiny", "--guidance-interval", "0.5,2"), "does nothing at guidance 1"),
        (("sample", "runs/tiny", "--guidance", 2, "--guidance-interval", "20,30"),
         "the sampler visits no level in (20, 30], only 10.4888 to 0.0316386"),
        (("check", "tiny", "evaluation.guidance=2", "network.classes=0"),
         "evaluation.guidance: guidance needs a model with classes"),
        (("losses", "runs/tiny", "--guidance-interval", "0.5,2"), "does nothing at guidance 1"),
    ],
)  # fmt: skip
def test_guidance_that_does_nothing_or_cannot_be_is_refused(run, words, message):
    assert message in refused(run, *words)


def test_an_imported_model_says_whether_it_was_trained_without_labels(home, monkeypatch):
    monkeypatch.chdir(home)
    published = {
        "precond": "EDMPrecond", "model_type": "SongUNet", "img_resolution": 8, "img_channels": 3,
        "label_dim": 8, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
        "attn_resolutions": [4],
    }  # fmt: skip
    for said, expected in (({"label_dropout": 0.1}, 0.1), ({"label_dropout": 0}, 0.0), ({}, 0.0)):
        nodes = edm.nodes(published | said)
        # The experiment that it borrows its data from was trained with dropout.
        made = experiment_of(nodes, Path("theirs.pkl"), (), name="brought", like="tiny", allow=())
        assert made.tree["trainer"]["dropout"] == {"label": expected}


def test_a_sweep_guides_only_where_there_is_guidance():
    call = cli.parse(["sweep", "runs/tiny", "--guidance", "1,2", "--guidance-interval", "1,2"])
    options = call.keywords["options"]
    for pair in ((1.0, 2.0), ("text=1", "text=1+label=2")):
        points = [sweep.Point("a.ckpt", "ema", None, None, weight) for weight in pair]
        plain, guided = (sweep._at(options, point) for point in points)
        assert plain.guidance_interval is None and guided.guidance_interval == (1.0, 2.0)
    assert points[1].sampling().guidance == {"text": 1.0, "label": 2.0}


def test_a_model_that_never_saw_its_labels_guides_nothing():
    with pytest.raises(ValueError, match="needs the model with its label, which was never trained"):
        check_guidance(2.0, taken={"label": 8}, dropout={"label": 1.0})
    check_guidance(2.0, taken={"label": 8}, dropout={"label": 0.1})
    check_guidance(1.0, taken={"label": 0}, dropout={})


# --- what is drawn, held against what was trained -------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "runs/tiny", "--set", "data.dataset.resolution=9"), "dataset.resolution: "),
        (("evaluate", "pictures", "--reference", "tiny", "--sampler", "heun"),
         "--sampler: is for sampling from a run, and pictures holds images"),
        (("evaluate", "pictures", "--reference", "tiny", "--guidance", 2),
         "--guidance: is for sampling from a run"),
    ],
)  # fmt: skip
def test_what_the_network_or_the_images_are_not_of_is_refused(run, home, words, message):
    (home / "pictures").mkdir(exist_ok=True)
    assert message in refused(run, *words)


def test_levels_that_training_never_drew_are_told(capsys):
    def said(low, high):
        return sampling.untrained_levels(Sampler(heun, Rho(low, high), 4), EDM())

    assert said(0.002, 80.0) is None
    assert "visits sigma 800 to 0.002, but training sampled 90.39 to 0.001" in said(0.002, 800.0)
    assert "visits sigma 80 to 0.0002, but" in said(0.0002, 80.0)
    assert main(["check", "cifar10_edm", "sampler.schedule.sigma_max=800"]) == 0
    assert "the network is untrained beyond" in capsys.readouterr().out
    for name in ("cifar10_edm", "cifar10_rectified_flow", "cifar10_edm_a_ve", "quickstart"):
        assert main(["check", name]) == 0
        assert "untrained beyond" not in capsys.readouterr().out


def test_near_pure_noise_a_flow_knows_whatever_level_its_time_hardly_tells_apart():
    """t = sigma / (1 + sigma): within a twentieth of its range of the highest time trained."""
    flow = RectifiedFlow(std=1.0)  # logit-normal: t to 0.99, sigma to exp(4.75) = 116

    def said(low, high):
        return sampling.untrained_levels(Sampler(heun, Rho(low, high), 4), flow)

    assert said(0.05, 10_000.0) is None  # t 0.9999
    # At the other end details are drawn: a level is lower than 0.0086 by a factor of 4 at most.
    assert "visits sigma 100 to 0.0008" in said(0.0008, 100.0)


# --- classes, strips and films --------------------------------------------------------------------


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def large(image, times=8):
    return image.repeat(times, 0).repeat(times, 1)


def test_classes_in_turn_have_a_row_each_under_their_name(run, tmp_path):
    names = runs.open_model(Path("runs/tiny")).class_names
    words = ("sample", "runs/tiny", "--classes", f"{names[5]},2", "--count", 5, "--first", 1)
    code, result, err = run(*words, "--steps", 2, "--out", tmp_path / "turn")
    assert code == 0, err
    labels = np.load(tmp_path / "turn" / "images.npz")["labels"]
    assert labels.tolist() == [2, 5, 2, 5, 2]  # images 1 to 5: image i has number i modulo 2
    images = drawn(result)
    single = ("sample", "runs/tiny", "--label", 2, "--count", 1, "--first", 3, "--steps", 2)
    _, alone, _ = run(*single, "--out", tmp_path / "alone")
    assert np.array_equal(drawn(alone)[0], images[2])
    # Two rows of two: class 5 has images 2 and 4, class 2 has 1 and 3; a pixel is eight wide.
    sheet = pixels(result["grid"])
    rows = [[images[1], images[3]], [images[0], images[2]]]
    body = sheet[:, -(2 * 64 + 2) :]
    for row, pair in enumerate(rows):
        for column, image in enumerate(pair):
            place = body[row * 66 : row * 66 + 64, column * 66 : column * 66 + 64]
            assert np.array_equal(place, large(image)), (row, column)
    left = sheet[:, : -(2 * 64 + 2)]
    assert left.shape[0] == 2 * 64 + 2
    written = [left[:64].min(axis=2), left[66:].min(axis=2)]
    assert all(each.min() < 100 for each in written)  # a name beside each row, and not the same
    assert not np.array_equal(*written)


def test_all_classes_are_taken_in_their_order(run, tmp_path):
    words = ("sample", "runs/tiny", "--classes", "all", "--steps", 1, "--out", tmp_path / "all")
    assert run(*words, "--count", 16)[0] == 0
    labels = np.load(tmp_path / "all" / "images.npz")["labels"]
    assert labels.tolist() == [*range(8), *range(8)]
    assert pixels(tmp_path / "all" / "grid.png").shape[0] == 8 * 66 - 2


def test_strip_and_film_end_with_the_images_that_were_sampled(run, tmp_path):
    out = tmp_path / "film"
    words = ("sample", "runs/tiny", "--count", 2, "--first", 3, "--out", out)
    code, result, err = run(*words, "--strip", "--film", "gif")
    assert code == 0, err
    images = drawn(result)
    strip = pixels(result["strip"])
    assert strip.shape[1] == 11 * 66 - 2  # ten levels and the image
    assert np.array_equal(strip[-64:, -64:], large(images[1]))
    assert np.array_equal(strip[-130:-66, -64:], large(images[0]))
    assert not np.array_equal(strip[-64:, :64], large(images[1]))
    assert strip[:-130].min() < 100  # words above
    with Image.open(result["film"]) as film:
        assert film.n_frames == 21  # twenty steps, then the images
        assert film.info["loop"] == 0
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append((np.asarray(film.convert("RGB")), film.info["duration"]))
    last, held = frames[-1]
    assert np.array_equal(last[-64:, -64:], large(images[1]))
    assert np.array_equal(last[-64:, :64], large(images[0]))
    assert held == 2000 and {duration for _, duration in frames[:-1]} == {100}
    titles = {frame[:-64].tobytes() for frame, _ in frames}
    assert len(titles) == 21  # each its own sigma


def test_a_film_shows_the_denoised_image_at_its_level(run):
    """At the first level x is nearly noise alone: D there, by hand."""
    opened = runs.open_run(Path("runs/tiny"), SamplerOptions(), RunOptions(seed=4))
    generator = opened.generator
    frames, words = film.denoised(generator, [6], 5)
    sampler = generator.sampler
    sigmas = sampler.sigmas()
    assert words == [*(f"sigma {sigmas[i]:.3g}" for i in (0, 5, 10, 14, 19)), "the images"]
    with generator.inference():
        x = sampler.start(generator.noise([6]))
        at_first = generator.guided(generator.condition([6]))(x, sigmas[0])
    assert torch.equal(frames[0, 0], to_bytes(at_first)[0])
    assert torch.equal(frames[0, -1], generator.images([6])[0][0])


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_an_mp4_has_the_film_s_frames(run, tmp_path):
    words = ("sample", "runs/tiny", "--count", 2, "--film", "mp4", "--out", tmp_path / "film")
    code, result, err = run(*words)
    assert code == 0, err
    words = ("ffmpeg", "-loglevel", "error", "-i", result["film"], "-f", "rawvideo", "-pix_fmt",
             "rgb24", "-")  # fmt: skip
    decoded = subprocess.run(words, capture_output=True, check=True).stdout
    height = 14 + 64  # a line of words and an image
    frames = np.frombuffer(decoded, np.uint8).reshape(-1, height, 130, 3).astype(int)
    assert len(frames) == 20 + 20  # twenty steps, and the images for two seconds
    images = drawn(result).astype(int)
    wanted = np.concatenate([large(images[0]), large(images[1])], axis=1)
    shown = np.concatenate([frames[-1, -64:, :64], frames[-1, -64:, -64:]], axis=1)
    assert np.abs(shown - wanted).mean() < 12  # colours have half the resolution in H.264
    assert np.abs(frames[0, -64:, :64] - large(images[0])).mean() > 24


# --- files and processes --------------------------------------------------------------------------

SEVEN = ("sample", "runs/tiny", "--count", 7, "--batch-size", 2, "--steps", 2)


@pytest.fixture(scope="module")
def seven(home):
    """Seven images of one process, as PNG files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main([*map(str, SEVEN), "--out", "seven"]) == 0
    return home / "seven"


def files(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def test_two_processes_sample_what_one_does(run, seven, tmp_path):
    code, result, err = run(*SEVEN, "--processes", 2, "--out", tmp_path / "two")
    assert code == 0, err
    assert (result["drawn"], result["total"], result["evaluations"]) == (7, 7, 2)
    assert files(tmp_path / "two") == files(seven)
    one, two = (np.load(folder / "images.npz") for folder in (seven, tmp_path / "two"))
    assert all(np.array_equal(one[key], two[key]) for key in ("images", "labels"))


@pytest.mark.parametrize(
    "names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")], ids=["torchrun", "srun"]
)
def test_ranks_that_others_started_share_the_batches(names, run, seven, tmp_path, monkeypatch):
    out = tmp_path / "ranks"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv(names[1], "2")
    # As rank 0 leaves the folder while it samples.
    (out / "images").mkdir(parents=True)
    said = json.loads((seven / "sample.json").read_text()) | {"complete": False}
    (out / "sample.json").write_text(json.dumps(said))
    monkeypatch.setenv(names[0], "1")
    code, result, err = run(*SEVEN, "--out", out)
    assert (code, result) == (0, None), err  # rank 0 alone answers
    assert sorted(files(out)) == ["000002.png", "000003.png", "000006.png"]
    assert not json.loads((out / "sample.json").read_text())["complete"]
    monkeypatch.setenv(names[0], "0")
    code, result, err = run(*SEVEN, "--out", out)
    assert (code, result["drawn"]) == (0, 4), err
    assert files(out) == files(seven)
    monkeypatch.setenv(names[0], "1")  # a rank that comes late leaves it complete
    assert run(*SEVEN, "--out", out)[0] == 0
    assert json.loads((out / "sample.json").read_text())["complete"]


def test_the_rank_of_a_process_is_told_by_its_starter():
    task = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert place_of({}) == (0, 1, 0)
    assert place_of({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == (2, 4, 0)
    assert place_of(task | {"SLURM_STEP_ID": "0"}) == (3, 8, 1)
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}  # of a smaller step in the job
    assert place_of(task | step) == (3, 4, 1)
    assert place_of(task) == (0, 1, 0)  # a batch script, which srun has not started
    with pytest.raises(UserError, match="RANK: is 4, and WORLD_SIZE 4"):
        place_of({"RANK": "4", "WORLD_SIZE": "4"})


def test_every_image_has_one_process_and_the_batches_of_one():
    alone = Rank().batches(range(3, 50), 4)
    shared = [Rank(number, 3).batches(range(3, 50), 4) for number in range(3)]
    assert sorted(batch for each in shared for batch in each) == alone
    assert [index for batch in alone for index in batch] == list(range(3, 50))
    assert alone[0] == [3] and alone[1] == [4, 5, 6, 7]  # cut at multiples of the size
    assert max(map(len, shared)) - min(map(len, shared)) <= 1


def test_a_process_that_ends_early_is_told_and_so_is_one_that_gives_nothing(
    run, tmp_path, monkeypatch
):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=sys.exit, args=(3,))
    busy = context.Process(target=time.sleep, args=(60,), daemon=True)
    process.start()
    busy.start()
    process.join()
    seen = []
    monkeypatch.setattr(sample_ranks, "PATIENCE", 0.0)
    with pytest.raises(UserError, match=r"1 of the processes ended with code 3 before all images"):
        sample_ranks.wait_for(lambda: [4, 5], [process, busy], 0.0, seen.append)
    well = context.Process(target=sys.exit, args=(0,))
    well.start()
    well.join()
    with pytest.raises(UserError, match=r"the processes ended, and 2 images are missing"):
        sample_ranks.wait_for(lambda: [4, 5], [well], 0.0, seen.append)
    busy.terminate()
    busy.join()
    sample_ranks.wait_for(list, [process], 0.0, seen.append)
    with pytest.raises(UserError, match=r"no image came for 0 s, and 1 are missing"):
        sample_ranks.wait_for(lambda: [4], [], 0.0, seen.append)
    assert seen == [2, 2, 0, 1]
    # Told at once, not when this process has sampled its own share.
    opened = runs.open_run(Path("runs/tiny"), SamplerOptions(), RunOptions())
    folder = SampleFolder(tmp_path / "ended", opened)
    whole = folder.begin(range(4))
    with pytest.raises(UserError, match=r"ended with code 3 before all images were sampled"):
        sample.sample_missing(folder, whole, Rank(0, 2), 2, [process])
    assert files(tmp_path / "ended") == {}


def test_progress_without_a_terminal_says_what_is_left(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "LINE", 0.0)
    for count, told in ((3, (2, 3)), (7, (4, 6, 7))):  # then from image 3 on: 3, 4 and 5, 6
        _, _, err = run(*SEVEN, "--count", count, "--out", tmp_path / "told")
        said = [line for line in err.splitlines() if line.startswith("sample: ")]
        assert [line.split(" images")[0] for line in said] == [
            f"sample: {done} of {count}" for done in told
        ]
        assert said[-1].endswith("0:00 left") and "images/s" in said[0]


def test_webdataset_reads_the_tars_and_so_does_prepare(run, seven, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_packing, "SHARD", 3)
    out = tmp_path / "tars"
    words = (*SEVEN, "--format", "tar", "--out", out)
    assert run(*words, "--count", 4)[0] == 0
    assert sorted(files(out)) == ["000000.tar", "000001.tar"]
    before = (out / "images" / "000000.tar").stat().st_mtime_ns
    code, result, err = run(*words)  # goes on: three more images, one of them in a tar there is
    assert (code, result["drawn"], result["total"]) == (0, 3, 7), err
    assert (out / "images" / "000000.tar").stat().st_mtime_ns == before
    tars = [str(out / "images" / f"{number:06d}.tar") for number in range(3)]
    assert sorted(files(out)) == [Path(each).name for each in tars]
    found = []
    for tar in tars:
        with open(tar, "rb") as stream:
            members = webdataset.tariterators.tar_file_expander([{"url": tar, "stream": stream}])
            found += list(webdataset.tariterators.group_by_keys(members))
    assert [each["__key__"] for each in found] == [f"{index:06d}" for index in range(7)]
    labels = np.load(seven / "images.npz")["labels"]
    assert [int(each["cls"]) for each in found] == labels.tolist()
    assert [each["png"] for each in found] == list(files(seven).values())
    assert run(*words)[1]["drawn"] == 0
    assert pixels(out / "grid.png").shape == pixels(seven / "grid.png").shape
    assert "prepare them first: python -m diffusion_pl prepare" in refused(run, "evaluate", out)
    code, _, err = run("prepare", out / "images", tmp_path / "set", "--resolutions", 8, "--labels",
                       "--workers", 1)  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["count"] == 7


def test_an_npz_alone_goes_on_and_holds_the_same_images(run, seven, tmp_path):
    out = tmp_path / "npz"
    words = (*SEVEN, "--format", "npz", "--out", out)
    code, result, err = run(*words, "--count", 3, "--first", 2)
    assert (code, result["images"]) == (0, str(out / "images.npz")), err
    assert run(*words)[1]["drawn"] == 4  # before and after those
    assert files(out) == {}
    with np.load(out / "images.npz") as mine, np.load(seven / "images.npz") as other:
        assert set(mine) == set(other) == {"images", "labels"}
        assert all(np.array_equal(mine[key], other[key]) for key in mine)
    assert np.array_equal(pixels(out / "grid.png"), pixels(seven / "grid.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--classes", "hart"), "--classes hart: no class of that name among 8; nearest: "),
        (("--classes", "9"), "label 9 is not one of the model's classes (0 to 7)"),
        (("--classes", "1,2", "--label", "1"), "name the classes by one of them"),
        (("--classes", "all", "--count", 7), "--count 7: is fewer than the 8 classes; --count 64"),
        (("--processes", 0), "--processes must be at least 1 (got 0)"),
        (("--processes", 3, "--count", 2), "2 images are 1 batch of 64, fewer than the 3"),
        (("--processes", 3, "--count", 12), "use at most 1, or --batch-size 4"),
    ],
)
def test_what_cannot_be_sampled_so_is_one_line(run, words, message):
    assert message in refused(run, "sample", "runs/tiny", "--count", 8, *words)


def test_a_folder_of_other_files_and_a_film_without_ffmpeg_are_one_line(run, seven, monkeypatch):
    said = refused(run, *SEVEN, "--format", "tar", "--out", seven)
    assert "holds its images as png; go on with --format png, or sample into another" in said
    monkeypatch.setenv("PATH", "")
    said = refused(run, *SEVEN, "--film", "mp4", "--out", seven)
    assert "--film mp4: needs ffmpeg, which is not here; install it, or --film gif" in said
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(run, *SEVEN, "--processes", 2, "--out", seven)
    assert "2 ranks were started already; leave it out" in said
