"""What one does with a trained model, as a user types it: import, export, fine-tune, invert, ..."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from homes import experiments
from markdown_it import MarkdownIt
from pages import parsed
from PIL import Image
from published import Fixture
from safetensors.torch import save_file
from test_text_networks import WITH_TEXT, stirred, told

from diffusion_pl.cli import main
from diffusion_pl.commands import card, runs
from diffusion_pl.commands.options import RunOptions, SamplerOptions
from diffusion_pl.interop import program
from diffusion_pl.interop.layouts import PESSER
from diffusion_pl.networks.ddpm_unet import DDPMUNet
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.training import checkpoint as checkpoints

ROOT = Path(__file__).parents[1]
TINY = """# A tiny run for tests (no published number)
defaults: base
data:
  dataset: {_target_: diffusion_pl.data.synthetic.Synthetic, count: 40, resolution: 8}
  batch_size: 8
network:
  _target_: diffusion_pl.networks.ddpm_unet.DDPMUNet
  resolution: 8
  classes: 8
  model_channels: 8
  channel_mult: [1, 2]
  blocks: 1
  attention: [4]
  groups: 4
  dropout: 0.0
objective: {_target_: diffusion_pl.objectives.ddpm.DDPM, T: 20, beta_1: 1e-3, beta_T: 0.4}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20}
sampler:
  _target_: diffusion_pl.samplers.sampler.Sampler
  integrate: {_target_: diffusion_pl.samplers.ancestral.ancestral, _partial_: true, variance: large}
  schedule:
    _target_: diffusion_pl.diffusion.timesteps.LinearBetas
    T: 20
    beta_1: 1e-3
    beta_T: 0.4
  steps: 20
  clip_denoised: true
  unit_start: true
features: {name: shapes}
evaluation: {every: 1000, count: 8, batch_size: 8, grid: 4, metrics: []}
trainer: {total_images: 16, checkpoint_every: 16, log_every: 16, accelerator: cpu, precision: fp32,
  loggers: [], dropout: {label: 0.2}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with experiments/ and a trained run of each of two seeds."""
    folder = tmp_path_factory.mktemp("home")
    experiments(folder, TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "tiny"]) == 0
        assert (
            main(["train", "tiny", "seed=1", "trainer.total_images=8", "--run", "runs/weak"]) == 0
        )
    return folder


@pytest.fixture
def run(home, monkeypatch, capsys):
    """Run a command there and give its exit code, its JSON and stderr."""
    monkeypatch.chdir(home)

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else None, captured.err

    return call


def weights(folder):
    return checkpoints.load(runs.checkpoint_of(Path(folder)))["state_dict"]


def test_guidance_by_another_run_costs_both_networks(run):
    code, plain, _ = run("sample", "runs/tiny", "--count", 2)
    assert (code, plain["evaluations"], plain["guide"]) == (0, 20, None)
    words = ("sample", "runs/tiny", "--count", 2, "--guidance", 2, "--guide", "runs/weak")
    code, result, err = run(*words)
    assert (code, result["evaluations"]) == (0, 40), err
    assert result["guide"].startswith("runs/weak/checkpoints/")
    _, part, _ = run(*words, "--guidance-interval", "0.5,2")
    assert 20 < part["evaluations"] < 40


def test_an_experiment_names_its_guide(run):
    code, result, err = run(
        "sample", "runs/tiny", "--count", 1, "--set", "evaluation.guidance=2", "--set",
        "evaluation.guide={_target_: diffusion_pl.commands.runs.guide, run: runs/weak}",
        "--set", "evaluation.guidance_interval=[0.5, 2.0]",
    )  # fmt: skip
    assert code == 0, err
    assert 20 < result["evaluations"] < 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--guide", "runs/weak"], "a guide does nothing at guidance 1"),
        (["--guidance", "2", "--guidance-interval", "3,1"], "needs 0 <= low < high (got 3 to 1)"),
        (["--guidance", "2", "--guide", "runs/none"], "there is no such run"),
    ],
)
def test_guidance_that_cannot_be_is_one_line(run, words, message):
    code, out, err = run("sample", "runs/tiny", *words)
    assert (code, out) == (2, None)
    assert message in err and err.count("\n") == 1


@pytest.fixture
def pair(home):
    """Two PNG files of the run's size."""
    paths = []
    for index, value in enumerate((60, 200)):
        paths.append(home / f"{index}.png")
        Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(paths[-1])
    return paths


def test_an_image_survives_its_latent(run, pair):
    code, result, err = run("invert", "runs/tiny", *pair, "--label", 3)
    assert code == 0, err
    assert len(result["latent_std"]) == 2 and Path(result["grid"]).exists()
    assert max(result["rms_error_of_255"]) < 10  # 20 coarse steps of an untrained network
    latent = np.load(Path(result["folder"]) / "latents.npz")
    assert latent["latents"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("words", [["--by", "noise"], ["--by", "flow"], ["--spherical"]])
def test_interpolation_draws_a_row_between_two_images(run, pair, words):
    code, result, err = run(
        "interpolate", "runs/tiny", *pair, "--label", 0, "--count", 3, "--sigma", 0.2, *words
    )
    assert code == 0, err
    files = sorted(Path(result["folder"]).glob("0*.png"))
    means = []
    for file in files:
        with Image.open(file) as image:
            means.append(np.asarray(image).mean())
    assert len(means) == 3 and means[0] < means[1] < means[2]
    assert result["sigma"] == 0.2
    assert ("ancestral" in str(result["integrate"])) == ("flow" not in words)


def test_progressive_images_end_in_what_sample_draws(run):
    code, result, err = run("progressive", "runs/tiny", "--count", 2, "--frames", 4)
    assert code == 0, err
    assert len(result["sigmas"]) == 5 and result["sigmas"][-1] == 0
    run("sample", "runs/tiny", "--count", 2, "--out", "drawn")
    for row in range(2):
        last = (Path(result["folder"]) / f"{row:06d}_004.png").read_bytes()
        assert last == Path(f"drawn/images/{row:06d}.png").read_bytes()


def test_images_go_along_the_flow_both_ways_by_what_can(run, pair):
    words = ("invert", "runs/tiny", *pair, "--label", 3)
    plain, ddim = (run(*words, *more)[1] for more in ((), ("--sampler", "ddim")))
    assert (plain["integrate"], ddim["integrate"]) == ("heun", "euler")
    assert plain["rms_error_of_255"] != ddim["rms_error_of_255"]
    for command in (words, ("interpolate", *words[1:], "--by", "flow")):
        code, result, err = run(*command, "--sampler", "ancestral")
        assert (code, result) == (2, None)
        assert "--sampler: ancestral cannot be run in both directions, as heun, midp" in err
    code, _, err = run(*words, "--base-alone")
    assert code == 2 and "--base-alone: the run samples at one size" in err


def test_branches_of_a_sampler_without_noise_are_refused(run):
    words = ("progressive", "runs/tiny", "--count", 2, "--share", 1.0, "--sampler", "euler")
    code, result, err = run(*words)
    assert (code, result) == (2, None)
    assert "--share 1: the sampler adds no noise below it" in err


def test_branches_share_their_beginning(run):
    words = ("progressive", "runs/tiny", "--count", 2)
    _, late, _ = run(*words, "--share", 0.1, "--out", "late")
    run(*words, "--share", 5.0, "--out", "early")
    assert late["shared_above"] == 0.1

    def apart(folder):
        one, other = (
            np.asarray(Image.open(f"{folder}/{i:06d}_000.png")).astype(float) for i in range(2)
        )
        return np.abs(one - other).mean()

    assert 0 < apart("late") < apart("early")


def test_likelihood_is_that_of_the_images_whatever_the_batch(run):
    words = ("likelihood", "runs/tiny", "--count", 2, "--probes", 2, "--steps", 4)
    code, whole, err = run(*words)
    assert code == 0, err
    assert whole["bits_per_dim"] > 0 and whole["standard_error"] > 0 and whole["probes_error"] > 0
    assert (whole["count"], whole["evaluations"]) == (2, 8)
    _, exact, _ = run("likelihood", "runs/tiny", "--count", 2, "--probes", 0, "--steps", 4)
    # The untrained network's Jacobian is nearly diagonal: few bits are left to the probes.
    assert exact["bits_per_dim"] == pytest.approx(whole["bits_per_dim"], abs=0.05)
    assert exact["probes_error"] is None
    _, parts, _ = run(*words, "--batch-size", 1)
    assert parts["bits_per_dim"] == pytest.approx(whole["bits_per_dim"], rel=1e-4)
    code, bound, err = run("likelihood", "runs/tiny", "--count", 2, "--by", "bound")
    assert code == 0, err
    assert bound["by"] == "bound" and bound["bits_per_dim"] > 0


def test_a_run_exported_and_imported_draws_the_same(run):
    code, result, err = run("export", "runs/tiny", "tiny.safetensors")
    assert code == 0, err
    assert result["images"] == 16
    code, result, err = run("import", "safetensors", "tiny.safetensors", "runs/again")
    assert code == 0, err
    for folder in ("runs/tiny", "runs/again"):
        assert run("sample", folder, "--count", 1, "--out", folder.replace("/", "-"))[0] == 0
    one, other = (Path(f"runs-{name}/images/000000.png").read_bytes() for name in ("tiny", "again"))
    assert one == other
    assert run("export", "runs/tiny", "tiny.safetensors")[0] == 2  # nothing is overwritten
    assert run("import", "safetensors", "tiny.safetensors", "runs/again")[0] == 2


def test_a_run_goes_to_diffusers_and_comes_back(run):
    code, _, err = run("export", "runs/tiny", "folder", "--format", "diffusers")
    assert code == 0, err
    code, result, err = run("import", "diffusers", "folder", "runs/back", "--like", "tiny")
    assert code == 0, err
    assert len(result["sha256"]) == 64
    before, after = weights("runs/tiny"), weights("runs/back")
    for key, value in after.items():
        torch.testing.assert_close(value, before[f"ema.{key.partition('.')[2]}"])
    first = Path("runs/back/config.yaml").read_text().splitlines()[0]
    assert first == f"# Imported from folder (diffusers), sha256 {result['sha256']}"
    code, sampled, err = run("sample", "runs/back", "--count", 1)
    assert (code, sampled["evaluations"]) == (0, 20), err
    assert run("evaluate", "runs/back")[0] == 0


def test_an_exported_program_is_the_denoiser_for_any_batch(run):
    code, result, err = run("export", "runs/tiny", "tiny.pt2", "--format", "torch")
    assert code == 0, err
    assert result["difference"] < 1e-5
    denoise = runs.open_model(Path("runs/tiny")).denoiser
    program = torch.export.load("tiny.pt2").module()
    generator = torch.Generator().manual_seed(5)
    for count, sigma in ((1, 0.05), (2, 10.0), (4, 1.0), (7, 0.3)):
        x = torch.randn(count, 3, 8, 8, generator=generator) * (1 + sigma)
        levels = sigma * torch.linspace(0.8, 1.0, count)
        label = torch.arange(count) % 9 - 1
        found, wanted = (each(x, levels, label=label) for each in (program, denoise))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert count == 1 or not torch.equal(found, program(x, levels, label=label.flip(0)))
    # As docs/sampling.md hands it to a sampler, whose state is float64.
    opened = runs.open_run(Path("runs/tiny"), SamplerOptions(), RunOptions())
    generator, label = opened.generator, torch.tensor([3, 5])

    def by_program(x, sigma):
        return program(x.float(), sigma.float().expand(x.shape[0]), label=label)

    one, other = (
        generator.sampler(each, generator.noise([0, 1]), generator.step_noise([0, 1]))
        for each in (by_program, partial(generator.denoiser, label=label))
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_a_program_that_differs_from_the_denoiser_is_not_kept(run, tmp_path, monkeypatch):
    denoise = runs.open_model(Path("runs/tiny")).denoiser
    other = runs.open_model(Path("runs/tiny"), "denoiser").denoiser
    about = ((3, 8, 8), (0.05, 10.0), Path("x.pt2"))
    assert program.compare(denoise, denoise, *about) == 0
    with pytest.raises(ValueError, match=r"x.pt2: the exported program differs .* not kept"):
        program.compare(denoise, other, *about)

    class Two(torch.nn.Module):
        def forward(self, x, sigma, **condition):
            if len(x) != 2:
                raise RuntimeError("two alone")
            return denoise(x, sigma, **condition)

    with pytest.raises(ValueError, match=r"takes no batch of 1, so it is not kept \(two alone\)"):
        program.compare(denoise, Two(), *about)
    # The comparison stands between the file and its name.
    small = EDM().denoiser(Convolution()).eval().requires_grad_(False)
    monkeypatch.setattr(program, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="so it is not kept"):
        program.write(tmp_path / "x.pt2", small, (3, 8, 8), (0.05, 10.0), {})
    assert not list(tmp_path.iterdir())
    small.network.fixed = True
    with pytest.raises(ValueError, match=r"torch.export cannot trace Convolution \(.*--format"):
        program.write(tmp_path / "x.pt2", small, (3, 8, 8), (0.05, 10.0), {})


class Convolution(torch.nn.Module):
    """The least of a network; `fixed`: of batches of one size alone."""

    fixed = False

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, c_noise):
        return self.convolution(x) * (len(x) if self.fixed else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_TEXT)
def test_every_network_can_be_exported_as_a_program(name, tmp_path):
    """With classes, text and a source image, and weights of which every part counts."""
    network = told(stirred(WITH_TEXT[name](image_channels=3)))
    denoise = EDM().denoiser(network).eval().requires_grad_(False)
    assert program.write(tmp_path / "a.pt2", denoise, (3, 16, 16), (0.01, 50.0), {}) < 1e-5


def test_a_card_says_what_the_weights_are_and_their_numbers_alone(run):
    measured = ("evaluate", "runs/tiny", "--count", 20, "--metrics", "frechet", "--features",
                "pixels")  # fmt: skip
    code, result, err = run(*measured, "--seed", 3)
    assert code == 0, err
    [row] = result["measures"]
    code, result, err = run("export", "runs/tiny", "carded.safetensors")
    assert code == 0, err
    text = Path("carded.safetensors.md").read_text()
    assert result["card"] == "carded.safetensors.md"
    tables = cells(text)
    facts = {key: value for key, value, *_ in reversed(tables)}  # the first of a name
    assert facts["weights"] == "averaged, EMA (half_life 20)"
    assert facts["images seen in training"] == "16"
    assert facts["data"].startswith("Synthetic (count 40, resolution 8), 40 images, sha256 ")
    assert facts["classes"].startswith(runs.open_model(Path("runs/tiny")).class_names[0])
    assert facts["trainer.total_images"] == "16" and facts["network.channel_mult"] == "[1, 2]"
    [told] = [each for each in tables if each[0] == row["name"]]
    assert float(told[1]) == pytest.approx(row["value"], rel=1e-4)
    assert told[2].startswith("averaged") and told[3] == "20 generated, from number 0 of seed 3"
    assert "pixels" in told[4] and row["reference"] in told[5] and told[8] == "3"
    assert "## Licence\n\nNot stated. Whoever publishes" in text
    assert "import safetensors carded.safetensors runs/imported" in text
    # Numbers of other weights say nothing of these.
    assert run("export", "runs/tiny", "raw.safetensors", "--weights", "denoiser")[0] == 0
    text = Path("raw.safetensors.md").read_text()
    assert "None of these weights (raw, after 16 images) has been measured" in text
    assert row["name"] not in text.replace("\\", "")


def rendered(text):
    """By CommonMark's rules, as on the hub."""
    return MarkdownIt("commonmark").enable("table").render(text)


def cells(text):
    """The rows of a page's tables, as a browser shows them."""
    page = parsed(rendered(text))
    return [[each.text for each in (*row.find("th"), *row.find("td"))] for row in page.find("tr")]


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>", "a|b`c`", "[a](http://b.c)", "*x* _y_ ~z~", "\\|\\<b>",
     "&lt;i&gt;", "https://b.c/d www.b.c", "# a\n\n- b", "a\x1b[31m", "$x$ @y"],
)  # fmt: skip
def test_a_name_stays_text_on_a_card(name):
    page = parsed(rendered("\n".join(card.table(["k", "v"], [("a", card.escaped(name))]))))
    shown = name.replace("\n", "\\n").replace("\x1b", "\\x1b")
    assert [each.text for each in page.find("td")] == ["a", shown]
    assert not any(page.find(tag) for tag in ("script", "b", "i", "a", "em", "code", "h1", "li"))
    assert "://" not in card.escaped(name) and "www." not in card.escaped(name)


def test_a_run_without_snapshots_says_what_averages_need(run):
    code, _, err = run("ema", "runs/tiny")
    assert code == 2 and err.count("\n") == 1
    assert "runs/tiny/posthoc: has no snapshots" in err
    assert "train with ema.posthoc_every=N, images between two snapshots, such as 1;" in err
    assert "what was not kept in training cannot be averaged afterwards" in err


def test_a_diffusers_folder_has_its_card_inside_and_nothing_is_overwritten(run):
    assert run("export", "runs/tiny", "carded", "--format", "diffusers")[0] == 0
    assert "DDPMPipeline.from_pretrained('carded')" in Path("carded/README.md").read_text()
    Path("mine.pt2.md").write_text("mine")
    for words, message in (
        (("mine.pt2", "--format", "torch"), "mine.pt2.md: exists already; name another path"),
        (("mine.pt", "--format", "torch"), "ends in .pt2; name mine.pt2"),
    ):
        code, _, err = run("export", "runs/tiny", *words)
        assert code == 2 and message in err and err.count("\n") == 1
    assert Path("mine.pt2.md").read_text() == "mine" and not Path("mine.pt").exists()


def test_an_imported_run_is_fine_tuned_from_its_weights(run, parity):
    fixture = Fixture(parity / "ddpm_unet.npz")
    Path("published").mkdir()
    config = {key: value for key, value in fixture.config.items() if not key.startswith("_")}
    Path("published/config.json").write_text(json.dumps(config))
    save_file(fixture.weights, "published/diffusion_pytorch_model.safetensors")
    Path("published/scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    code, _, err = run(
        "import", "diffusers", "published", "runs/published",
    )  # fmt: skip
    assert code == 0, err
    data = [
        "data.dataset._target_=diffusion_pl.data.synthetic.Synthetic", "data.dataset.count=16",
        "data.dataset.resolution=16", "trainer.total_images=8", "evaluation.metrics=[]",
        "evaluation.count=2", "sampler.steps=2", "features.name=shapes", "trainer.accelerator=cpu",
        "trainer.loggers=[]", "optimizer.lr=1e-12",
    ]  # fmt: skip
    words = ("train", "runs/published/config.yaml", *data, "--from", "runs/published")
    code = main([*words, "--run", "runs/tuned"])
    assert code == 0
    before, after = weights("runs/published"), weights("runs/tuned")
    for key in after:
        torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=1e-9)
    assert Path("runs/tuned/from").read_text().startswith("runs/published/checkpoints/")


def test_hos_converted_weights_become_a_run(run):
    torch.manual_seed(0)
    network = DDPMUNet(32, model_channels=32, channel_mult=(1, 2), blocks=1, dropout=0.1)
    torch.save({key: value.clone() for key, value in PESSER.write(network)}, "model-790000.ckpt")
    code, _, err = run("import", "pesser", "model-790000.ckpt", "runs/ho")
    assert code == 0, err
    for key, value in network.state_dict().items():
        assert torch.equal(weights("runs/ho")[f"ema.network.{key}"], value)
    code, result, err = run("sample", "runs/ho", "--count", 1, "--steps", 2)
    assert (code, result["evaluations"]) == (0, 2), err
    code, _, err = run("import", "pesser", "model-790000.ckpt", "runs/ho2", "--like", "tiny")
    assert code == 2 and "the model has 3 x 32 x 32 images (got 3 x 8 x 8)" in err


def test_fine_tuning_starts_network_and_average_at_the_others_average(run, capsys):
    words = ["train", "tiny", "trainer.total_images=8", "optimizer.lr=1e-12"]
    assert main([*words, "--from", "runs/tiny", "--run", "runs/tuned2"]) == 0
    wanted, found = weights("runs/tiny"), weights("runs/tuned2")
    for key, value in wanted.items():
        if key.startswith("ema."):
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
            torch.testing.assert_close(found[f"denoiser{key[3:]}"], value, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert main([*words, "--from", "runs/weak", "--run", "runs/tuned2"]) == 2
    assert "started from runs/tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "tiny", "network.model_channels=16", "--from", "runs/tiny", "--run", "x"],
         "has shape"),
        (["train", "tiny", "network.classes=0", "trainer.dropout.label=0", "--from", "runs/tiny",
          "--run", "x2"],
         "it was trained on 8 classes, this network has 0; initialise the labels"),
        (["train", "tiny", "--from", "runs/none", "--run", "y"], "there is no such run"),
        (["import", "diffusers", "nowhere", "runs/z"], "config.json: cannot be read"),
        (["import", "pesser", "nowhere", "runs/z"], "cannot be read as a checkpoint"),
        (["import", "safetensors", "nowhere", "runs/z"], "cannot be read as safetensors"),
        (["invert", "runs/tiny", "nowhere.png", "--label", "1"], "nowhere.png: cannot be read"),
        (["progressive", "runs/tiny", "--share", "1000"], "within the sampler's"),
        (["likelihood", "runs/tiny", "--count", "41"], "synthetic-8 has 40 images"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(run, words, message):
    code, out, err = run(*words)
    assert (code, out) == (2, None)
    assert message in err and err.count("\n") == 1


def test_a_model_with_classes_asks_for_the_images_class(run, pair):
    code, _, err = run("invert", "runs/tiny", *pair)
    assert code == 2 and "--label: name the images' class, 0 to 7" in err


def test_a_folder_of_imported_weights_is_not_trained_on(run):
    run("export", "runs/tiny", "folder2", "--format", "diffusers")
    run("import", "diffusers", "folder2", "runs/brought", "--like", "tiny")
    code, _, err = run("train", "runs/brought/config.yaml", "--run", "runs/brought")
    assert code == 2 and "holds imported weights" in err


def test_an_exported_run_opens_in_the_library(run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("diffusers")
    run("export", "runs/tiny", "folder3", "--format", "diffusers")
    theirs = library.UNet2DModel.from_pretrained("folder3", local_files_only=True).eval()
    model = runs.open_model(Path("runs/tiny"))
    x_t, t, label = torch.randn(2, 3, 8, 8), torch.tensor([3, 19]), torch.tensor([4, 0])
    with torch.no_grad():
        expected = theirs(x_t, t, class_labels=label).sample
        eps = model.denoiser.network(x_t, t.double(), label=label)
    torch.testing.assert_close(eps, expected, rtol=1e-4, atol=1e-6)
    scheduler = library.DDPMScheduler.from_pretrained("folder3")
    assert scheduler.config.variance_type == "fixed_large"
    assert scheduler.config.num_train_timesteps == 20
