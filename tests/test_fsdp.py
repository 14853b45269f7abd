"""A model that is spread over its ranks makes the run and the files of ranks that hold it whole."""

from __future__ import annotations

import shutil

import pytest
import torch
from faults import RUN, assert_equal, left, marked, newest, write
from homes import experiments
from omegaconf import OmegaConf
from started import train

from diffusion_pl.signals import RESUMABLE
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History

FSDP = "trainer.strategy=fsdp"
# 40 images are a whole batch of one rank and a part of one of the other.
LOSSES = (
    "evaluation.losses={_target_: diffusion_pl.evaluation.settings.Losses, every: 32, count: 40, "
    "levels: 2}"
)

UVIT = """network:
  _target_: diffusion_pl.networks.uvit.UViT
  resolution: 16
  classes: 8
  model_channels: 8
  channel_mult: [1, 2]
  blocks: [1]
  transformers: 1
  heads: 2
  dropout: 0.0
  embedding_channels: 16
  activation_checkpointing: true
"""
# With this rate and eps Adam does not blow rounding up; see test_exact.py.
GENTLE = ["trainer.total_images=480", "optimizer.lr=1e-4", "optimizer.eps=1e-3", "trainer.keep=5",
          "trainer.checkpoint_every=120", "ema.posthoc_every=480", "evaluation.every=100000",
          "evaluation.count=32"]  # fmt: skip


def folder_for(tmp_path_factory, text):
    place = tmp_path_factory.mktemp("fsdp")
    experiments(place, text, "tried")
    return place


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    place = folder_for(tmp_path_factory, "")
    write(place)
    return place


@pytest.fixture(scope="module")
def straight(small):
    """Twelve steps of the U-Net with everything random that there is."""
    runs = {}
    for name, words in {"ddp": [], "fsdp": [FSDP]}.items():
        words = [*words, "trainer.device_batch_size=2", LOSSES]
        assert train(small, name, *words, ranks=2).codes == [0, 0]
        runs[name] = left(small, name)
    return runs


def test_a_checkpoint_is_laid_out_as_that_of_ranks_that_hold_all(straight, small):
    one, other = (dict(straight[name][0]) for name in ("ddp", "fsdp"))
    sections = [loaded.pop("diffusion_pl") for loaded in (one, other)]
    for section in sections:
        assert (section["format"], section["images"]) == (2, 96)
    assert sections[0]["config"].keys() == sections[1]["config"].keys()
    assert_alike(one, other)
    checkpoints.verify(newest(small, "fsdp"))
    assert {name: len(content) for name, content in straight["ddp"][2].items()} == {
        name: len(content) for name, content in straight["fsdp"][2].items()
    }


def assert_alike(one, other, where=""):
    """That two trees differ in the numbers of their tensors at most."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_alike(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for pair in zip(one, other, strict=True):
            assert_alike(*pair, where)
    else:
        assert one == other or one != one, where


def test_losses_norms_and_measurements_are_those_of_ranks_that_hold_all(straight):
    one, other = straight["ddp"][1], straight["fsdp"][1]
    assert [row.get("name") for row in one] == [row.get("name") for row in other]
    losses = [row["weights"] for row in other if str(row.get("name")).startswith("loss@40/")]
    assert losses == ["ema", "denoiser"] * 3
    for first, second in zip(one, other, strict=True):
        for key in {"loss", "gradient_norm", "value"} & first.keys():
            assert second[key] == pytest.approx(first[key], rel=1e-3), (key, first)


def test_stopped_and_gone_on_is_the_run_that_was_not(straight, small):
    words = [FSDP, "trainer.device_batch_size=2", LOSSES]
    stopped = train(small, "stopped", *words, ranks=2, faults={1: "TERM:5"}).codes
    assert set(stopped) <= {0, RESUMABLE} and RESUMABLE in stopped and marked(small, "stopped")
    assert 8 <= int(newest(small, "stopped").stem) <= 32
    assert train(small, "stopped", *words, ranks=2).codes == [0, 0]
    assert_equal(straight["fsdp"], left(small, "stopped"))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """60 steps of a U-ViT that recomputes, at two sizes, the larger one in two passes."""
    before, rest = RUN.split("network:\n")
    after = rest[rest.index("\nema:") + 1 :]  # without augmentation, which it takes no labels of
    text = (before + UVIT + after).replace("OBJECTIVE", "{_target_: "
                                           "diffusion_pl.objectives.edm.EDM}")  # fmt: skip
    place = folder_for(tmp_path_factory, text)
    words = [*GENTLE, "trainer.device_batch_size=2"]
    for name, more in {"ddp": [], "fsdp": [FSDP]}.items():
        assert train(place, name, *words, *more, ranks=2).codes == [0, 0]
    return place, words


def test_60_steps_end_where_those_of_ranks_that_hold_all_end(large):
    place, _ = large
    one, other = left(place, "ddp")[0], left(place, "fsdp")[0]
    assert one["global_step"] == other["global_step"] == 60
    near(one["state_dict"], other["state_dict"])
    for number, state in one["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(
                other["optimizer_states"][0]["state"][number][name], value, rtol=1e-3, atol=1e-4
            )


def near(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert float((other[key] - value).abs().max()) < 1e-6, key


def allow(place, run, **changes):
    """Change the trainer's settings of a run that is there."""
    path = place / "runs" / run / "config.yaml"
    tree = OmegaConf.load(path)
    tree.trainer.update(changes)
    OmegaConf.save(tree, path)


def test_a_run_goes_from_ddp_to_fsdp_to_one_process(large):
    place, words = large
    run = place / "runs" / "change"
    shutil.copytree(place / "runs" / "ddp", run)
    for images in (360, 480):
        (run / "checkpoints" / f"{images:012d}.ckpt").unlink()
    checkpoints.point_to(run / "checkpoints" / "000000000240.ckpt")
    history = History(run / "metrics.jsonl")
    history.rewind(240)
    allow(place, "change", total_images=360)  # the budget is not free to change
    half = [*words, FSDP, "trainer.total_images=360"]
    assert train(place, "change", *half, ranks=2).codes == [0, 0]
    assert int(newest(place, "change").stem) == 360
    allow(place, "change", total_images=480)
    assert train(place, "change", *words).codes == [0]
    near(left(place, "ddp")[0]["state_dict"], left(place, "change")[0]["state_dict"])
