"""Every YAML in experiments/ goes through the commands: train, stop, resume, sample, measure.

Widths, depths, sides, timesteps and counts are made small. The kinds of data, network, objective,
average, sampler and metrics, and how they are joined, are the experiment's own.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from pathlib import Path

import homes
import prepared
import pytest
import torch
from test_experiments import NAMES, shrink, smallest
from worded import minilm_or_skip

from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.config import targets
from diffusion_pl.data.cifar10 import CIFAR10
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.shards import Shards
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.timesteps import Timesteps
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.history import History, is_evaluation, is_held_out

BATCH = 2
COUNT = 2  # images drawn to be measured
STEPS = 3  # of a sampler
T = 40  # timesteps of a table; the linear one of improved DDPM needs more than 20
CLASSES = 2  # of a folder of images


def small(name):
    """An experiment, resolved, with everything that costs time made small."""
    experiment = config.load(name, (), homes.ROOT / "experiments")
    tree = copy.deepcopy(experiment.tree)
    shorten_tables(tree)
    shrink(tree["network"])
    cut_levels(tree["network"])
    shrink_sides(dataclasses.replace(experiment, tree=tree))
    base = tree["sampler"].get("base", tree["sampler"])
    base["steps"] = min(base["steps"], STEPS)
    if base is not tree["sampler"] and tree["sampler"].get("by") == "sigma":
        sigmas = config.build(dataclasses.replace(experiment, tree=tree), "sampler.base").sigmas()
        tree["sampler"]["restart"] = float(sigmas[1])  # so few steps may not reach its own
    tree["features"] |= {"name": "shapes"}
    tree["evaluation"]["reference"] = None  # the training data instead
    tree["evaluation"] |= {"every": 100, "count": COUNT, "batch_size": COUNT}
    for metric in tree["evaluation"]["metrics"]:
        if "splits" in inspect.signature(targets.locate(metric["_target_"])).parameters:
            metric["splits"] = 1
    tree["data"] |= {"batch_size": BATCH, "num_workers": 0}
    small_run = {"total_images": 2 * BATCH, "checkpoint_every": BATCH, "log_every": BATCH}
    here = {"accelerator": "cpu", "devices": 1, "loggers": []}
    tree["trainer"] |= small_run | here
    tree["lr_schedule"] = None
    if "patch_size" in tree["network"]:  # its first images are all the same grey
        tree["optimizer"].get("rest", tree["optimizer"])["lr"] = 0.05
        tree["ema"]["half_life"] = 1.0
    return dataclasses.replace(experiment, tree=tree)


def shorten_tables(node):
    """Fewer timesteps in every table and objective of a tree, with as much noise at their end."""
    if "T" in node:
        taken = inspect.signature(targets.locate(node["_target_"])).parameters
        for beta in {"beta_1", "beta_T"} & taken.keys():
            node[beta] = node.get(beta, taken[beta].default) * node["T"] / T
        node["T"] = T
    for value in node.values():
        if isinstance(value, dict):
            shorten_tables(value)


def cut_levels(network):
    """No more than the two innermost levels of a network, narrow ones, one block each."""
    if "channel_mult" not in network:  # a plain transformer
        return
    more = len(network["channel_mult"]) - 2
    if isinstance(network["blocks"], list):
        network["blocks"] = [1 for _ in network["blocks"][max(more, 0) :]]
    else:
        network["blocks"] = 1
    network["channel_mult"] = [min(by, 2) for by in network["channel_mult"][max(more, 0) :]]
    for key in {"transformers", "heads"} & network.keys():
        network[key] = min(network[key], 2)


def shrink_sides(experiment):
    """Images, and all that is said of them in pixels, as small as the network takes them."""
    tree = experiment.tree
    data, network, sampler = tree["data"], tree["network"], tree["sampler"]
    dataset = data["dataset"]
    if "resolution" not in dataset:  # CIFAR-10's is fixed
        return
    lowest = min(data.get("resolution_weights") or [dataset["resolution"]])
    factor = max(lowest // smallest(parts.meta_network(experiment)), 1)
    for section, key in (
        (dataset, "resolution"),
        (network, "resolution"),
        (network, "dropout_from"),
    ):
        if key in section:
            section[key] //= factor
    network["attention"] = [at // factor for at in network.get("attention", ())]
    if not network["attention"]:
        del network["attention"]
    if weights := data.get("resolution_weights"):
        data["resolution_weights"] = {at // factor: each for at, each in weights.items()}
    if data.get("crop"):
        data["crop"]["size"] //= factor
    if dataset.get("made_of"):
        recipe = dataset["made_of"]["recipe"]
        recipe["resolutions"] = [at // factor for at in recipe["resolutions"]]
    if "levels" in sampler:
        sampler["levels"] = [at // factor for at in sampler["levels"]]


def provide(experiment, place):
    """Data of the experiment's own kind, made once for all experiments that can share them."""
    weights = experiment.tree["data"].get("resolution_weights")
    data, network = experiment.tree["data"]["dataset"], experiment.tree["network"]
    kind = targets.locate(data["_target_"])
    if network.get("text_width"):
        minilm_or_skip()
        network |= {"text_width": 384, "text_length": 32}
    if experiment.tree["evaluation"].get("prompts"):
        prompts = place / "prompts.txt"
        prompts.write_text("a red heart on a light ground\na dark star\n")
        experiment.tree["evaluation"]["prompts"] = str(prompts)
    archive = place / "cifar-10-python.tar.gz"
    if not archive.exists():
        prepared.cifar10(archive, 4)
    if kind is Synthetic:
        data["count"] = 8
        if data.get("captions"):
            data["caption_length"] = network["text_length"]
    if kind is CIFAR10:
        data["path"] = str(archive)
    sides = sorted(weights or [data.get("resolution")])
    if kind is ImageFolder:
        if network.get("classes"):
            network["classes"] = CLASSES
        folder = place / f"images-{sides[-1]}"
        if not folder.exists():
            prepared.fill(folder, prepared.files(8, sides[-1], sides[-1]))
        data["path"] = str(folder)
    if kind is Shards:
        made, words = data.get("made_of"), ",".join(map(str, sides))
        folder = place / f"shards-{words}"
        if data.get("text"):
            folder = place / f"captioned-{words}"
            if not folder.exists():
                files = prepared.files(8, sides[-1], sides[-1])
                captions = {Path(name).with_suffix(".txt"): b"a photograph" for name in files}
                source = prepared.fill(place / "captioned", files | captions)
                encode = ("--captions", "--encode", "minilm")
                assert prepared.prepare(source, folder, *encode, resolutions=words) == 0
        elif made is None:
            if not folder.exists():
                source = prepared.fill(place / "originals", prepared.files(8, sides[-1], sides[-1]))
                assert prepared.prepare(source, folder, resolutions=words) == 0
        elif made["source"]["path"] == "synthetic":
            made["source"]["count"] = 8
            folder = place / f"synthetic-{words}"
        else:
            made["source"]["path"] = str(archive)
            folder = place / "cifar-10-shards"
        data["path"] = str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    (folder / "experiments").mkdir()
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_resumes_and_is_drawn_from_and_measured(name, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    experiment = small(name)
    provide(experiment, place)
    Path(f"experiments/{name}.yaml").write_text(config.dump(experiment))
    answer = homes.answering(capsys)
    run = Path("runs") / name
    code = homes.main(["train", name])
    assert code == 0, capsys.readouterr().err
    whole = checkpoints.load(checkpoints.latest(run / "checkpoints"))
    every = History(run / "metrics.jsonl").rows()
    rows = [row for row in every if is_evaluation(row)]
    assert {row["images"] for row in rows} == {2 * BATCH}
    losses = [(row["weights"], row["images"]) for row in every if is_held_out(row)]
    wanted = [("ema", 2 * BATCH), ("denoiser", 2 * BATCH)]
    assert losses == (wanted if experiment.tree["evaluation"].get("losses") else [])
    capsys.readouterr()
    # Stopped after the first step, it goes on to the same bits.
    (run / f"checkpoints/{2 * BATCH:012d}.ckpt").unlink()
    checkpoints.point_to(run / f"checkpoints/{BATCH:012d}.ckpt")
    assert homes.main(["train", name]) == 0
    assert "going on" in capsys.readouterr().err
    again = checkpoints.load(checkpoints.latest(run / "checkpoints"))
    assert whole["state_dict"].keys() == again["state_dict"].keys()
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, again["state_dict"][key]), key
    code, result, err = answer("sample", run, "--count", 1)
    assert code == 0, err
    code, result, err = answer("evaluate", run, "--count", COUNT)
    assert code == 0, err
    assert [row["name"] for row in result["measures"]] == [row["name"] for row in rows]
    measure_likelihood(answer, run, experiment)


def measure_likelihood(answer, run, experiment):
    """By the flow and by the bound, where the run has them; else a line says why not."""
    several = len(experiment.tree["sampler"].get("levels", [1])) > 1
    objective = config.build(experiment, "objective")
    table = isinstance(getattr(objective.preconditioning, "timesteps", None), Timesteps)
    for by in ("flow", "bound"):
        few = ("--steps", STEPS) if by == "flow" else ()
        code, result, err = answer("likelihood", run, "--count", 1, "--by", by, *few)
        if several:  # no size of a pyramid is drawn as its likelihood would take it
            assert (code, result) == (2, None)
            assert "--base-alone" in err and err.count("\n") == 1
        elif by == "bound" and not table:
            assert (code, result) == (2, None)
            assert "no discrete timesteps" in err and err.count("\n") == 1
        else:
            assert code == 0, err
