"""One, two and three processes on the CPU draw the same images and give the same numbers."""

from __future__ import annotations

from functools import partial

import pytest
import started
import torch
from torch import nn

from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.evaluation import Evaluation, ImageGenerator, evaluate, reference_of
from diffusion_pl.evaluation.sources import Labels
from diffusion_pl.metrics import shapes
from diffusion_pl.metrics.density_coverage import DensityCoverage
from diffusion_pl.metrics.fid import Frechet
from diffusion_pl.metrics.inception_score import InceptionScore
from diffusion_pl.metrics.kid import Kernel
from diffusion_pl.metrics.precision_recall import PrecisionRecall
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Sampler

METRICS = (Frechet(), InceptionScore(), Kernel(3, 40), PrecisionRecall(), DensityCoverage())
COUNT = 150  # four whole tiles and a part of one: three ranks get two, two and one


class Smooth(nn.Module):
    """A raw network of one convolution, so that pixels depend on their neighbours."""

    classes, channels = 3, 3

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, c_noise, label=None):
        return self.mix(x) + (0.0 if label is None else label[:, None, None, None] / 2 - 0.5)


def measure(rank, world_size, folder, batch_size):
    """Rows of one evaluation, and its grid, as plain lists."""
    torch.manual_seed(0)
    sampler = Sampler(partial(heun, S_churn=10.0), Rho(), 4)
    generator = ImageGenerator(
        Denoiser(Smooth(), Karras(0.5)), sampler, (3, 16, 16), sources=[Labels(3)]
    )
    settings = Evaluation(every=1, count=COUNT, metrics=METRICS, batch_size=batch_size, grid=100)
    extractor = shapes.load()
    images = Synthetic(170, 16).open()
    cache = folder / f"references-{world_size}-{batch_size}"
    reference = reference_of(images, settings, extractor, cache, torch.device("cpu"))
    rows, shown = evaluate(generator, settings, extractor, reference)
    values = {row["name"]: row["value"] for row in rows} | {"bias": rows[0]["bias"]}
    return {"values": values, "ranks": rows[0]["ranks"], "grid": shown.flatten().tolist()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return measure(0, 1, tmp_path_factory.mktemp("alone"), 64)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 7), (3, 50)])
def test_ranks_draw_the_images_of_one_process_and_all_give_its_numbers(
    world_size, batch_size, alone, tmp_path
):
    results = started.answers(measure, world_size, tmp_path, batch_size)
    for result in results:
        assert result["ranks"] == world_size
        assert result["grid"] == alone["grid"]
        assert result["values"].keys() == alone["values"].keys()
        for name, value in result["values"].items():
            assert value == pytest.approx(alone["values"][name], rel=1e-9), name
