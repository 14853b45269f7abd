"""What an evaluation will cost is counted by a stand-in that keeps the denoiser's protocol."""

from __future__ import annotations

import shutil
import warnings
from functools import partial

import homes
import pytest
import torch
from test_commands_models import TINY
from torch import nn

from diffusion_pl.diffusion.guidance import Guide
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.evaluation import ImageGenerator
from diffusion_pl.evaluation.sources import Labels
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.pyramid import PyramidSampler
from diffusion_pl.samplers.sampler import Sampler

LEARNED = Sampler(partial(ancestral, variance="learned"), Rho(), 5, clip_denoised=True)
DROPOUT = {"label": 0.1}
CHURN = Sampler(partial(heun, S_churn=10.0), Rho(), 4)


class Telling(nn.Module):
    """A raw network of some classes that may say more than the image; counts its evaluations."""

    def __init__(self, classes=0, more=3):
        super().__init__()
        self.classes, self.channels, self.more = classes, 3, more
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.ran = 0

    def check_resolution(self, height, width):
        pass

    def forward(self, x, c_noise, label=None):
        self.ran += 1
        assert c_noise.shape == (len(x),) and (label is None or label.shape == (len(x),))
        return self.gain * torch.cat([x, x[:, : self.more]], dim=1)


def generator(sampler, *, classes=0, more=3, guided_by=None, **options):
    if guided_by is not None:
        guide = Denoiser(Telling(classes, guided_by), Karras(0.5))
        options |= {"guide": Guide("runs/bad", guide), "guidance": 2.0}
    denoiser = Denoiser(Telling(classes, more), Karras(0.5))
    sources = [Labels(classes)] if classes else []
    return ImageGenerator(denoiser, sampler, (3, 16, 16), sources=sources, **options)


@pytest.mark.parametrize("sampler", [LEARNED, CHURN])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"classes": 4},
        {"classes": 4, "dropout": DROPOUT, "guidance": 2.0},
        {
            "classes": 4,
            "dropout": {"label": 0.1},
            "guidance": 2.0,
            "guidance_interval": (0.5, 10.0),
        },
        {"guided_by": 0},  # a guide that says nothing of the variance
        {"classes": 4, "guided_by": 3, "guidance_interval": (0.5, 10.0)},
        {"precision": torch.bfloat16},
    ],
)
def test_the_calls_that_are_foreseen_are_those_that_are_made(sampler, options):
    for made in (sampler, PyramidSampler(sampler, [0.5, 1], restart=0.5)):
        before = generator(made, **options)
        _, evaluations = before.images([0])
        ran = before.denoiser.network.ran
        foreseen = before.calls()
        assert foreseen.total() == evaluations
        assert set(foreseen) == ({16} if made is sampler else {8, 16})
        assert before.denoiser.network.ran - ran == len(foreseen)  # once at each size


def test_what_the_network_cannot_answer_is_said_when_it_is_foreseen():
    with pytest.raises(ValueError, match="gives no variance: it has 3 output channels, 6 are"):
        generator(LEARNED, more=0).calls()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with experiments/tiny.yaml, where commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    shutil.copy(homes.ROOT / "experiments/base.yaml", tmp_path / "experiments")
    small = TINY.replace("count: 40", "count: 8").replace("resolution: 8", "resolution: 16")
    (tmp_path / "experiments/tiny.yaml").write_text(small)
    return tmp_path


def test_a_run_whose_sampler_asks_too_much_ends_before_its_first_step(place, capsys):
    assert homes.main(["train", "tiny", "sampler.integrate.variance=learned"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "gives no variance" in said and "network.learned_variance=true" in said
    assert not list(place.glob("runs/tiny/checkpoints/*.ckpt"))


@pytest.fixture
def imported(place):
    """A folder of the diffusers library whose model learned its variance, imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = library.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=6, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, norm_eps=1e-6, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), flip_sin_to_cos=False, freq_shift=1,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), downsample_padding=0,
    )  # fmt: skip
    scheduler = library.DDPMScheduler(num_train_timesteps=20, variance_type="learned_range")
    library.DDPMPipeline(unet, scheduler).save_pretrained(place / "theirs")
    assert homes.main(["import", "diffusers", "theirs", "runs/theirs", "--like", "tiny"]) == 0
    return place


def test_an_imported_model_of_learned_variance_is_fine_tuned(imported, capsys):
    words = ["train", "runs/theirs/config.yaml", "--from", "runs/theirs", "--run", "runs/tuned"]
    assert homes.main(words) == 0, capsys.readouterr().err
    assert (imported / "runs/tuned/checkpoints/000000000016.ckpt").exists()
