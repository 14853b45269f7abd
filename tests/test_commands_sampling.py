"""Options of drawing, as a user types them, held against what the run is and how it was trained."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import homes
import numpy as np
import pytest
from test_commands_models import TINY

from diffusion_pl import cli
from diffusion_pl.cli import main
from diffusion_pl.commands import runs, sampling, sweep
from diffusion_pl.commands.import_ import experiment_of
from diffusion_pl.diffusion.classifier_free import check_guidance
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.evaluation import ImageGenerator
from diffusion_pl.evaluation.sources import Labels
from diffusion_pl.interop import edm
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.objectives.edm_iddpm import nearest
from diffusion_pl.objectives.rectified_flow import RectifiedFlow
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.dpm_solver import dpmpp_2m
from diffusion_pl.samplers.euler import euler
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Sampler

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
