"""What `prepare` recommends fits the data and the machine, and works when it is typed."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch
from prepared import file, fill, noise, prepare
from torch.utils.flop_counter import FlopCounterMode

from diffusion_pl import cli, config
from diffusion_pl.commands import parts, recommend
from diffusion_pl.commands.hints import interpreter
from diffusion_pl.commands.recommend import Machine, duration, operations, plan
from diffusion_pl.data.shard_format import Manifest
from diffusion_pl.networks.song_unet import SongUNet

CPU = Machine("cpu", "2 CPU cores", 2, 1.2e11)
GPU = Machine("gpu", "a GPU", 16, 5e14)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    assert prepare("synthetic", folder, "--count", 40, "--shard-images", 40) == 0
    return folder


def _as(folder: Path, *sides: int, count: int = 40, classes: int = 8) -> Manifest:
    """The set as if it had other sizes and images."""
    read = Manifest.read(folder)
    return dataclasses.replace(read, resolutions=list(sides), count=count, classes=classes)


def _network(side: int, channels: int = 16) -> SongUNet:
    return SongUNet(
        side,
        model_channels=channels,
        channel_mult=recommend._channel_mult(side),
        blocks=1,
        attention=[],
    )


@pytest.mark.parametrize("side", [8, 12, 16, 30, 32, 64, 128])
def test_operations_are_those_that_torch_counts(side):
    """All but attention's and the embedding's, a ninth at most."""
    with torch.device("meta"):
        network = _network(side)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, side, side), torch.zeros(1))
    ratio = operations(side, 16, recommend._channel_mult(side)) / counter.get_total_flops()
    assert 0.88 < ratio <= 1


def test_the_time_is_that_of_training_here():
    """In the process's own time, as far as the stated share of a product's speed goes."""
    torch.set_num_threads(1)
    network = _network(32)
    image, noise_level, times = torch.randn(16, 3, 32, 32), torch.zeros(16), []
    on = Machine("cpu", "a core", 1, recommend._core_speed())
    for _ in range(3):
        began = time.process_time()
        network(image, noise_level).square().mean().backward()
        times.append(time.process_time() - began)
    stated = 16 / recommend._rate(on, 32, 16, 16)
    assert 1 / 4 < stated / min(times) < 4


SIDES = [8, 30, 32, 96, 128, 256, 512, 1024]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("on", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("count", [40, 50_000])
def test_the_command_binds_whatever_the_size(side, on, count, shapes):
    """Every override of the printed command is an argument of what it configures.

    Labels in every second case, so that each side, machine and count meets both.
    """
    classes = 8 * ((SIDES.index(side) + (on is GPU) + (count > 40)) % 2)
    found = plan(_as(shapes, side, count=count, classes=classes), shapes, on)
    words = shlex.split(found.command)
    assert words[:4] == [interpreter(), "-m", "diffusion_pl", "train"]
    assert words[5:7] == ["--run", "runs/shapes"]
    experiment = parts.read(words[4], words[7:])
    data = config.build(experiment, "data")
    assert (data.dataset.path, data.dataset.resolution) == (str(shapes), side)
    assert data.batch_size <= count and not data.hflip
    assert experiment.get("network.classes") == classes
    network = parts.meta_network(experiment)
    network.check_resolution(side, side)
    settings = config.build(experiment, "trainer")
    assert settings.total_images == found.images and found.seconds > 0
    assert (words[4] == "cifar10_small") == (on is CPU or count < 10_000 or side == 30)


def test_few_images_get_a_small_network_and_few_passes(shapes):
    """320 photographs are no reason for 56 M parameters and 200 M images."""
    for on in (CPU, GPU):
        found = plan(_as(shapes, 64, count=320), shapes, on)
        words = shlex.split(found.command)
        network = parts.meta_network(parts.read(words[4], words[7:]))
        assert sum(each.numel() for each in network.parameters()) < 4e6
        assert found.images <= 400 * 320
    assert "400 times each" in plan(_as(shapes, 32, count=320), shapes, CPU).lines[0]


def test_the_budget_is_worth_the_machine(shapes):
    """An hour of CPUs and no more; a slower one sees fewer images, never less than 20,000."""
    found = plan(_as(shapes, 32, count=60_000), shapes, CPU)
    assert found.seconds <= 3600 and found.images < 400 * 60_000
    # A step of 16 images: the products' time, and 25 ms beside.
    step = 16 * 3 * operations(32, 16, [1, 2, 4]) / (1.2e11 * 0.55) + 0.025
    assert found.seconds == pytest.approx(found.images / 16 * step)
    slower = plan(_as(shapes, 32, count=60_000), shapes, dataclasses.replace(CPU, speed=6e10))
    assert found.images / 2 < slower.images < 0.6 * found.images and slower.seconds <= 3600
    slow = plan(_as(shapes, 256), shapes, dataclasses.replace(CPU, speed=1e10))
    assert slow.images == 20_000 and slow.seconds > 4 * 3600
    assert "that is long without a GPU: at 64 px" in slow.lines[1]
    assert "--resolutions 64 --count 40" in slow.lines[1]


def test_the_time_of_a_published_run_is_that_of_its_network(shapes):
    """EDM's U-Net of 55.7 M parameters takes 42.4 GFLOP a forward pass by torch's own counter."""
    found = plan(_as(shapes, 32, count=50_000, classes=0), shapes, GPU)
    assert found.seconds == pytest.approx(200e6 * 3 * 42.4e9 / (5e14 / 7), rel=0.01)
    assert "cifar10_edm, 200,000,000 images seen, about 4 days" in found.lines[0]


def test_a_published_budget_is_cut_to_the_data(shapes):
    small = plan(_as(shapes, 32, count=12_000), shapes, GPU)
    assert "trainer.total_images=48000000" in small.overrides
    large = plan(_as(shapes, 32, count=50_000), shapes, GPU)
    assert not any(each.startswith("trainer.total_images") for each in large.overrides)


@pytest.mark.parametrize(
    ("sides", "name"),
    [
        ([256, 128, 64], "pyramidal_256"),
        ([64, 32, 16], "pyramidal_small"),
        ([30, 15], "cifar10_small"),
    ],
)
def test_several_sizes_are_a_pyramid_on_a_gpu_and_the_smallest_on_cpus(sides, name, shapes):
    words = shlex.split(plan(_as(shapes, *sides), shapes, GPU).command)
    assert words[4] == name
    read = parts.read(name, words[7:])
    if name.startswith("pyramidal"):
        data = config.build(read, "data")
        assert set(data.resolution_weights) == set(sides)
        assert data.dataset.made_of is None
        assert list(config.build(read, "sampler").levels) == sorted(sides)
    words = shlex.split(plan(_as(shapes, *sides), shapes, CPU).command)
    smallest = min(side for side in sides if side >= 16)
    assert words[4] == "cifar10_small" and f"data.dataset.resolution={smallest}" in words


@pytest.mark.parametrize(("side", "whole"), [(63, 56), (66, 64), (225, 224)])
def test_a_side_that_no_network_suits_is_said(side, whole, shapes):
    found = plan(_as(shapes, side), shapes, CPU)
    assert f"no network suits {side} px" in found.lines[0]
    assert f" prepare synthetic {shapes}-{whole} --resolutions {whole} --count 40" in found.command


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 7])
def test_processes_share_the_batch_evenly(cores, shapes):
    on = Machine("cpu", f"{cores} CPU cores", cores, cores * 6e10)
    words = shlex.split(plan(_as(shapes, 32, count=50_000), shapes, on).command)
    experiment = parts.read(words[4], words[7:])
    devices = experiment.get("trainer.devices")
    assert 1 <= devices <= cores and experiment.get("data.batch_size") % devices == 0


def test_a_run_is_called_as_the_folder_of_its_data(shapes, monkeypatch):
    monkeypatch.chdir(shapes)
    words = shlex.split(plan(_as(shapes, 32), Path("."), CPU).command)
    assert words[5:7] == ["--run", "runs/shapes"]


def test_the_printed_command_works_when_it_is_typed(tmp_path, monkeypatch, capsys):
    """From photographs in folders to a run that can be drawn from, with a budget of seconds."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "my photos", {f"{n}/{i}.png": file(noise(i)) for n in "ab" for i in range(6)})
    words = ["prepare", "my photos", "my data", "--resolutions", "8", "--labels"]
    assert cli.main(words) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert output.err.endswith(f"next:\n  {result['train']}\n")
    assert "for 12 images of 8 px" in output.err and "about" in output.err
    assert result["train_seconds"] > 0 and "CPU core" in result["machine"]
    program, *rest = shlex.split(result["train"])
    assert os.path.samefile(program, sys.executable)
    assert rest[:3] == ["-m", "diffusion_pl", "train"]
    short = ["trainer.total_images=64", "trainer.devices=1", "evaluation.metrics=[]"]
    assert cli.main([*rest[2:], *short]) == 0
    assert cli.main(["sample", "runs/my data", "--count", "2", "--label", "b"]) == 0


def test_the_interpreter_is_named_as_it_is_typed_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert interpreter() == ".venv/bin/python"
    monkeypatch.setattr(sys, "executable", "/opt/my env/bin/python3")
    assert interpreter() == "'/opt/my env/bin/python3'"


def test_times_are_spoken_as_people_do():
    found = [duration(each) for each in (20, 120, 4000, 7200, 36_000, 900_000)]
    assert found == ["20 seconds", "2 minutes", "67 minutes", "2.0 hours", "10.0 hours", "10 days"]
