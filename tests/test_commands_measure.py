"""What measures, as a user types it: evaluate, reference, sweep, losses."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import homes
import numpy as np
import pytest
import torch
from PIL import Image
from test_commands_models import TINY

from diffusion_pl.cli import main
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.images import save_png
from diffusion_pl.metrics import real_images
from diffusion_pl.metrics import reference as references

PLAIN = TINY.replace("steps: 20", "steps: 4")
NAME = "@20/synthetic-8/pixels"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A trained run with two checkpoints, and the run's data as pictures."""
    folder = tmp_path_factory.mktemp("home")
    measured = PLAIN.replace("checkpoint_every: 16", "checkpoint_every: 8")
    homes.trained(folder, measured.replace("name: shapes", "name: pixels"))
    (folder / "pictures").mkdir()
    for i, image in enumerate(Synthetic(40, 8).open().read(torch.arange(40))):
        save_png(image, folder / "pictures" / f"{i:02d}.png")
    return folder


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    return homes.answering(capsys)


def width(picture):
    with Image.open(picture) as file:
        return file.size[0]


def values(result):
    return {row["name"].partition("@")[0]: row["value"] for row in result["measures"]}


def test_a_run_is_measured_by_what_is_asked_for(run):
    words = ("evaluate", "runs/tiny", "--count", 20, "--metrics")
    code, result, err = run(*words, "frechet,precision_recall")
    assert code == 0, err
    assert [row["name"] for row in result["measures"]] == [
        f"fd{NAME}", f"precision{NAME}", f"recall{NAME}",
    ]  # fmt: skip
    row = result["measures"][0]
    assert (row["weights"], row["images_seen"], row["evaluations"]) == ("ema", 16, 4)
    assert row["checkpoint"] == "runs/tiny/checkpoints/000000000016.ckpt"
    assert "the covariance is singular" in err and f"fd{NAME} = " in err
    code, everything, _ = run(*words, "all", "--features", "shapes")
    assert set(values(everything)) == {
        "fd", "cs", "cs_std", "kd", "kd_std", "precision", "recall", "density", "coverage",
        "mmd",
    }  # fmt: skip
    code, result, err = run(*words, "frechett")
    assert (code, result) == (2, None)
    assert "there is no frechett; choose from frechet, spatial," in err and err.count("\n") == 1


def test_the_raw_weights_and_other_blocks_give_other_numbers(run):
    words = ("evaluate", "runs/tiny", "--count", 20, "--metrics", "frechet")
    averaged, raw = (run(*words, "--weights", kind)[1] for kind in ("ema", "denoiser"))
    assert raw["measures"][0]["weights"] == "denoiser"
    assert "ema" not in raw["measures"][0]
    assert values(raw) != values(averaged)
    _, blocks, err = run(*words, "--blocks", 3)
    assert blocks["measures"][0]["blocks"][0] == pytest.approx(values(averaged)["fd"], rel=1e-12)
    assert "(mean of 3; min" in err


def test_sampled_files_measure_like_the_run_that_drew_them(run, tmp_path):
    code, _, _ = run("sample", "runs/tiny", "--count", 20, "--out", tmp_path / "drawn")
    assert code == 0
    _, own, _ = run("evaluate", "runs/tiny", "--count", 20, "--metrics", "frechet")
    drawn = tmp_path / "drawn"
    for place in (drawn / "images.npz", drawn, drawn / "images"):
        words = ("evaluate", place, "--reference", "tiny", "--features", "pixels")
        code, result, err = run(*words)
        assert code == 0, err
        assert values(result)["fd"] == pytest.approx(values(own)["fd"], rel=1e-9)
        row = result["measures"][0]
        assert (row["source"], row["n"]) == (str(place), 20)
        assert row["drawn"]["settings"]["steps"] == 4


def test_statistics_of_any_data_are_made_once_and_compared_with(run, home, tmp_path):
    words = ("reference", "pictures", "--features", "pixels")
    code, made, err = run(*words, "--out", tmp_path / "mine.safetensors")
    assert code == 0, err
    assert (made["images"], made["resolution"], made["single_images"]) == (40, 8, 40)
    computed = references.load(tmp_path / "mine.safetensors")
    pixels = Synthetic(40, 8).open().read(torch.arange(40)).double() / 255
    torch.testing.assert_close(computed.mean, pixels.flatten(1).mean(dim=0))
    before = sorted(Path("data/references").iterdir())
    assert run(*words)[0] == 0
    assert sorted(Path("data/references").iterdir()) == before
    _, small, _ = run(*words, "--moments-only")
    assert (small["single_images"], small["file"] != made["file"]) == (0, True)
    _, quarter, err = run(*words, "--resolution", 4)
    assert quarter["resolution"] == 4, err
    # The run's own data are these pictures.
    measure = ("evaluate", "runs/tiny", "--count", 20, "--metrics", "frechet")
    _, own, _ = run(*measure)
    code, result, err = run(*measure, "--reference", tmp_path / "mine.safetensors")
    assert code == 0, err
    assert values(result)["fd"] == pytest.approx(values(own)["fd"], rel=1e-6)
    assert result["measures"][0]["reference"] == "folder-pictures-8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "nowhere"], "nowhere: there is no such run, nor images"),
        (["evaluate", "pictures"], "name what to compare the images with: --reference DATA"),
        (["evaluate", "pictures", "--reference", "nothing"], "no such experiment (got 'nothing')"),
        (["evaluate", "pictures", "--reference", "tiny", "--count", "41"], "has 40 images (need"),
        (["evaluate", "mixed", "--reference", "tiny"], "exact"),
        (["evaluate", "notes", "--reference", "tiny"], "no images"),
        (["evaluate", "runs/tiny", "--reference", "other.safetensors"], "resolution is 16"),
        (["evaluate", "runs/tiny", "--reference", "broken.safetensors"], "not reference statistic"),
        (["evaluate", "runs/tiny", "--label", "0"], "Unknown option: --label"),
        (["evaluate", "runs/tiny", "--features", "vgg"], "name must be one of auto, inception"),
        (["reference", "pictures", "--features", "pixels", "--feature-precision", "bf16"], "fp32"),
        (["sweep", "runs/tiny", "--weights", "raw"], "ema, denoiser or ema:LENGTH (got 'raw')"),
        (["sample", "runs/tiny", "--weights", "ema:0.1"], "train with ema.posthoc_every"),
        (["sweep", "runs/tiny", "--samplers", "heun", "--steps", "0"], "at least 1 step (got 0)"),
        (["sweep", "runs/tiny", "--count", "20", "--metrics", "score"], "pixels knows no classes"),
        (
            ["train", "tiny", "--run", "runs/other", "evaluation.reference=edm2.pkl"],
            "edm2.pkl: has statistics for fid, none for the extractor pixels",
        ),
        (
            ["train", "tiny", "--run", "runs/other", "evaluation.reference=gone.npz"],
            "gone.npz: no such file of reference statistics",
        ),
        (["losses", "runs/tiny", "--levels", "1"], "must be at least 2 (got 256, 1)"),
        (["losses", "runs/tiny", "--data", "pictures"], "has no labels, and the model needs them"),
    ],
)
def test_what_cannot_be_measured_is_one_line(run, home, words, message, capsys):
    if not (home / "mixed").exists():
        for name, sides in {"mixed": (8, 9)}.items():
            (home / name).mkdir()
            for i, side in enumerate(sides):
                pixels = np.full((side, side, 3), 40 * i, np.uint8)
                Image.fromarray(pixels).save(home / name / f"{i}.png")
        (home / "notes").mkdir()
        (home / "notes" / "a.txt").write_text("no picture")
        (home / "broken.safetensors").write_bytes(b"nothing")
        (home / "edm2.pkl").write_bytes(pickle.dumps({"fid": {"mu": np.zeros(8)}}))
        from diffusion_pl.metrics.pixels import Pixels

        other = real_images.compute(Synthetic(8, 16).open(), Pixels())
        other.save(home / "other.safetensors")
    code, result, err = run(*words)
    assert (code, result) == (2, None), err
    assert message in err and err.strip().count("\n") == 0


def test_a_sweep_measures_every_combination_once_and_goes_on_where_it_stopped(run, home):
    words = (
        "sweep",
        "runs/tiny",
        "--count",
        20,
        "--metrics",
        "frechet",
        "--samplers",
        "heun,euler",
    )
    code, first, err = run(*words, "--steps", "2,4")
    assert code == 0, err
    rows = Path(first["rows"]).read_text().splitlines()
    assert len(rows) == len(first["points"]) == 4
    assert [p["evaluations"] for p in first["points"]] == [3, 7, 2, 4]
    assert width(first["plot"]) > 800
    assert "pixels" in err and "euler" in err
    # Drop the last point, as if it had been killed there, and ask for more.
    Path(first["rows"]).write_text("\n".join(rows[:3]) + "\n")
    code, again, _ = run(*words, "--steps", "2,4,5")
    after = Path(first["rows"]).read_text().splitlines()
    assert after[:3] == rows[:3]
    assert len(after) == len(again["points"]) == 6
    same = {(p["sampler"], p["steps"]): p["value"] for p in again["points"]}
    for point in first["points"]:
        assert same[point["sampler"], point["steps"]] == pytest.approx(point["value"], rel=1e-12)
    best = [p["value"] for p in again["pareto"]["evaluations"]]
    assert best == sorted(best, reverse=True)
    assert best[-1] == min(p["value"] for p in again["points"])
    row = json.loads(after[0])
    assert {"commit", "versions", "fingerprint", "sampler"} <= set(row)


def test_a_sweep_runs_over_checkpoints_weights_and_guidance(run):
    words = ("sweep", "runs/tiny", "--count", 20, "--metrics", "frechet", "--out", "other")
    code, result, err = run(
        *words, "--checkpoints", "--weights", "ema,denoiser", "--guidance", "1,2"
    )
    assert code == 0, err
    assert len(result["points"]) == 8
    assert len({p["value"] for p in result["points"]}) > 4  # some images are equal bytes
    assert [p["evaluations"] for p in result["points"]] == [4, 8] * 4
    assert {Path(p["checkpoint"]).stem for p in result["points"]} == {
        "000000000008",
        "000000000016",
    }


def test_the_error_by_level_of_both_weights_is_given_with_a_plot(run, home):
    code, result, err = run("losses", "runs/tiny", "--count", 16, "--levels", 5)
    assert code == 0, err
    assert set(result["levels"]) == {"ema", "denoiser"}
    for curve in result["levels"].values():
        sigmas = [level["sigma"] for level in curve]
        assert len(sigmas) == 5 and sigmas == sorted(sigmas)
        assert all(level["error"] > 0 and level["standard_error"] > 0 for level in curve)
    assert result["levels"]["ema"] != result["levels"]["denoiser"]
    assert width(home / result["plot"]) > 600


def test_help_names_every_command_that_measures(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("reference", "sweep", "losses"))
