"""The closed list of parts: all that an experiment needs, and nothing that reaches further."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusion_pl import config
from diffusion_pl.config import Config, ConfigError
from diffusion_pl.config.registry import HANDED_ON, MADE, PARTS, is_part, misplaced
from diffusion_pl.config.targets import locate, why_untrusted
from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.diffusion.preconditioning import Coefficients
from diffusion_pl.errors import UserError
from diffusion_pl.networks.network import Network
from diffusion_pl.networks.unet import UNet

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusion_pl"
# Parts that stand outside the mathematics, the data and the metrics.
ELSEWHERE = {
    "diffusion_pl.commands.runs.guide",
    "diffusion_pl.evaluation.Evaluation",
    "diffusion_pl.evaluation.settings.Evaluation",
    "diffusion_pl.evaluation.settings.Losses",
    "diffusion_pl.training.ema.EMA",
    "diffusion_pl.training.lr_schedule.Cosine",
    "diffusion_pl.training.lr_schedule.WarmupDecay",
    "diffusion_pl.training.muon.Muon",
    "diffusion_pl.training.optimizers.Group",
    "diffusion_pl.training.optimizers.Grouped",
    "diffusion_pl.training.settings.TrainerConfig",
}
ROOMS = ("data", "diffusion", "metrics", "networks", "objectives", "samplers")


def name_of(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def nodes(value: Any, place: str) -> Iterator[tuple[str, str, bool]]:
    """Every target below a section, with its place and whether it is handed on."""
    if isinstance(value, list):
        for child in value:
            yield from nodes(child, place)
    elif isinstance(value, dict):
        ours = "_target_" in value
        if ours:
            yield value["_target_"], place, value.get("_partial_") is True
        for name, child in value.items():
            yield from nodes(child, str(name) if ours else place)


EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_is_made_of_parts_that_stand_in_their_places(file):
    for section, value in config.load(str(file)).tree.items():
        for target, place, partial in nodes(value, section):
            assert is_part(target)
            assert misplaced(target, place, partial) is None


def test_what_the_importers_write_is_made_of_parts():
    written = re.compile(r'"(diffusion_pl(?:\.\w+)+\.\w+)"')
    texts = [file.read_text() for file in (PACKAGE / "interop").glob("*.py")]
    found = [name for text in texts for name in written.findall(text)]
    assert len(found) >= 15
    modules = {name_of(file) for file in PACKAGE.rglob("*.py")}
    assert not [name for name in found if name not in modules and not is_part(name)]


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_part_is_there_and_is_this_packages_own_or_one_of_lightning_s(part):
    found = locate(part, ())
    if part.startswith("lightning.pytorch."):  # what keeps to the run's folder
        assert part.split(".")[2] in ("profilers", "strategies")
        return
    assert found.__module__.startswith("diffusion_pl.")
    assert found.__module__.split(".")[1] in ROOMS or part in ELSEWHERE


def place_of(found: Any) -> str | None:
    """The place that a class or function of this package has the form of, None for none."""
    members = set(dir(found))
    if inspect.isclass(found):
        if issubclass(found, nn.Module) and {"check_resolution", "forward"} <= members:
            return "network"
        if {"prepare", "open", "resolution"} <= members:
            return "dataset"
        if {"dataset", "batch_size"} <= set(fields(found)):
            return "data"
        if {"wants_features", "build"} <= members:
            return "metrics"
        if {"loss", "denoiser", "schedule", "preconditioning"} <= members | set(fields(found)):
            return "objective"
        if {"sigma", "slope", "time"} <= members:
            return "path"
        call = vars(found).get("__call__")
        if call is None:
            return None
        wanted = list(inspect.signature(call).parameters)[1:]
        returned = inspect.signature(call, eval_str=True).return_annotation
        if wanted == ["sigma"]:
            return "preconditioning" if returned is Coefficients else "weight"
        return {
            ("u",): "schedule", ("steps",): "spacing", ("error",): "reduce",
            ("image", "draws"): "image",
        }.get(tuple(wanted))  # fmt: skip
    parameters = list(inspect.signature(found).parameters)
    if parameters[:4] == ["denoise", "x", "sigmas", "randn_like"]:
        return "integrate"
    returned = inspect.signature(found, eval_str=True).return_annotation
    if returned is torch.Tensor and parameters in (["error"], ["steps"]):
        return {"error": "reduce", "steps": "spacing"}[parameters[0]]
    if inspect.isclass(returned) and place_of(returned) == "objective":
        return "objective"
    return None


def fields(kind: type) -> dict[str, Any]:
    return getattr(kind, "__dataclass_fields__", {})


def test_the_walk_knows_the_forms():
    from diffusion_pl.samplers.heun import heun

    assert place_of(heun) == "integrate"
    assert place_of(TrainingObjective) == "objective"


def test_every_part_of_the_package_is_on_the_list():
    """A network, sampler, schedule, ... that is not listed could be trained and never opened."""
    lacking = []
    for room in ROOMS:
        for file in sorted((PACKAGE / room).glob("*.py")):
            module = importlib.import_module(name_of(file))
            for name, found in vars(module).items():
                own = getattr(found, "__module__", None) == module.__name__
                if name.startswith("_") or not own or not callable(found):
                    continue
                if getattr(found, "_is_protocol", False) or not hasattr(found, "__qualname__"):
                    continue
                if found in (Network, UNet):
                    continue  # what networks share is none
                place = place_of(found)
                listed = (*MADE.get(place or "", ()), *HANDED_ON.get(place or "", ()))
                if place and f"{module.__name__}.{name}" not in listed:
                    lacking.append(f"{place}: {module.__name__}.{name}")
    assert not lacking


def test_everything_else_of_the_package_is_refused():
    """The command line, downloads, writers, readers of settings and all other functions."""
    refused = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                target = f"{name_of(file)}.{node.name}"
                if target not in PARTS:
                    assert why_untrusted(target, ()), target
                    refused.append(target)
    assert {
        "diffusion_pl.cli.main",
        "diffusion_pl.commands.train.command",
        "diffusion_pl.config.reading.load",
        "diffusion_pl.io.download.fetch",
        "diffusion_pl.data.prepare.prepare",
        "diffusion_pl.metrics.inception.download",
        "diffusion_pl.io.files.write_atomically",
    } <= set(refused)
    assert len(refused) > 300


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (
            {"sampler": {"_target_": "diffusion_pl.networks.adm.ADM", "resolution": 8}},
            "sampler._target_: diffusion_pl.networks.adm.ADM is no sampler; take one of "
            "Sampler, PyramidSampler, or your own",
        ),
        (
            {
                "sampler": {
                    "_target_": "diffusion_pl.samplers.sampler.Sampler",
                    "schedule": {"_target_": "diffusion_pl.diffusion.paths.Linear"},
                    "integrate": {
                        "_target_": "diffusion_pl.samplers.heun.heun",
                        "_partial_": True,
                    },
                    "steps": 3,
                }
            },
            "sampler.schedule._target_: diffusion_pl.diffusion.paths.Linear is no schedule",
        ),
        (
            {"evaluation": {"_target_": "diffusion_pl.evaluation.Evaluation", "every": 1,
                            "metrics": [{"_target_": "diffusion_pl.objectives.edm.EDM"}]}},
            "evaluation.metrics.0._target_: diffusion_pl.objectives.edm.EDM is no metrics",
        ),
        (
            {"network": {"_target_": "torch.optim.Adam", "_partial_": True}},
            "network._target_: torch.optim.Adam is no network",
        ),
        (
            {"ema": {"_target_": "diffusion_pl.training.ema.EMA", "half_life": 1,
                     "_partial_": True}},
            "ema._target_: diffusion_pl.training.ema.EMA is called here; remove `_partial_: true`",
        ),
        (
            {"optimizer": {"_target_": "torch.optim.Adam", "_partial_": True,
                           "lr": {"_target_": "diffusion_pl.training.ema.EMA", "half_life": 1}}},
            "optimizer.lr._target_: diffusion_pl.training.ema.EMA may not stand here: lr takes no "
            "part",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packages", [None, ()])
def test_a_part_where_another_is_expected_is_told(tree, says, packages):
    loaded = Config("x", "x.yaml", tree, packages=packages)
    with pytest.raises(ConfigError) as error:
        config.check(loaded)
    assert f"x.yaml: {says}" in str(error.value)
    with pytest.raises(ConfigError, match="_target_"):
        config.build(loaded, next(iter(tree)))


def test_a_callable_of_the_users_own_takes_any_part():
    rho = {"_target_": "diffusion_pl.diffusion.schedules.Rho"}
    node = {"sampler": rho, "weight": [rho], "x": {"ema": rho}}
    tree = {"network": {"_target_": "builtins.dict", **node}}
    config.check(Config("x", "x.yaml", tree))
    assert config.build(Config("x", "x.yaml", tree), "network")["sampler"].rho == 7.0


def test_every_optimizer_of_torch_is_a_part():
    whole = torch.optim.Optimizer
    classes = {name: each for name, each in vars(torch.optim).items() if inspect.isclass(each)}
    optimizers = [n for n, each in classes.items() if issubclass(each, whole) and each != whole]
    assert len(optimizers) > 10
    for name in optimizers:
        assert locate(f"torch.optim.{name}", ()) is getattr(torch.optim, name)


def test_every_scheduler_of_torch_is_a_part_in_its_place_alone():
    module = torch.optim.lr_scheduler
    whole = module.LRScheduler
    classes = {name: each for name, each in vars(module).items() if inspect.isclass(each)}
    schedulers = [n for n, each in classes.items() if issubclass(each, whole) and n[0] != "_"]
    schedulers.remove("LRScheduler")
    assert len(schedulers) > 10
    for name in schedulers:
        path = f"torch.optim.lr_scheduler.{name}"
        assert locate(path, ()) is getattr(module, name)
        assert misplaced(path, "lr_schedule", True) is None
        assert "add `_partial_: true`" in misplaced(path, "lr_schedule", False)
        assert "is no optimizer" in misplaced(path, "optimizer", True)
    assert "is no lr_schedule" in misplaced("torch.optim.Adam", "lr_schedule", True)
    for other in ("LRScheduler", "Optimizer", "warnings.warn", "Tensor"):
        with pytest.raises(UserError, match=r"is no lr_schedule|is outside|is defined in"):
            locate(f"torch.optim.lr_scheduler.{other}", ())
