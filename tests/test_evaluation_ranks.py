"""One, two and three processes on the CPU draw the same images and give the same numbers."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.evaluation import Drawing, Evaluation, evaluate, reference_of
from diffusion_pl.metrics import shapes
from diffusion_pl.metrics.density_coverage import DensityCoverage
from diffusion_pl.metrics.frechet import Frechet
from diffusion_pl.metrics.inception_score import InceptionScore
from diffusion_pl.metrics.kernel import Kernel
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


def measure(folder, world_size, batch_size):
    """Rows of one evaluation, and its grid, as plain lists."""
    torch.manual_seed(0)
    sampler = Sampler(partial(heun, S_churn=10.0), Rho(), 4)
    drawing = Drawing(Denoiser(Smooth(), Karras(0.5)), sampler, (3, 16, 16), classes=3)
    settings = Evaluation(every=1, count=COUNT, metrics=METRICS, batch_size=batch_size, grid=100)
    extractor = shapes.load()
    images = Synthetic(170, 16, batch_size=8).open()
    cache = Path(folder) / f"references-{world_size}-{batch_size}"
    reference = reference_of(images, settings, extractor, cache, torch.device("cpu"))
    rows, shown = evaluate(drawing, settings, extractor, reference)
    values = {row["name"]: row["value"] for row in rows} | {"bias": rows[0]["bias"]}
    return {"values": values, "ranks": rows[0]["ranks"], "grid": shown.flatten().tolist()}


def one_rank(rank, world_size, folder, batch_size):
    """What each process runs."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{world_size}", rank=rank, world_size=world_size
    )
    result = measure(folder, world_size, batch_size)
    (Path(folder) / f"{world_size}-{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("alone"), 1, 64)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 7), (3, 50)])
@pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file")
def test_ranks_draw_the_images_of_one_process_and_all_give_its_numbers(
    world_size, batch_size, alone, tmp_path
):
    # A server that has imported everything forks the ranks: seconds less than a start of each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchmetrics"])
    ranks = [
        context.Process(target=one_rank, args=(rank, world_size, str(tmp_path), batch_size))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    results = [
        json.loads((tmp_path / f"{world_size}-{rank}.json").read_text())
        for rank in range(world_size)
    ]
    for result in results:
        assert result["ranks"] == world_size
        assert result["grid"] == alone["grid"]
        assert result["values"].keys() == alone["values"].keys()
        for name, value in result["values"].items():
            assert value == pytest.approx(alone["values"][name], rel=1e-9), name
