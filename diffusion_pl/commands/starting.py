"""Weights of another run to start from, held against what they were trained for (`train --from`).

What the new run trains must be what the weights are of: the same denoiser around the same network.
That is seen in the four c's as functions of sigma, whatever an objective is called, and in those
settings of the network that change its function and no weight's shape.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_pl import config
from diffusion_pl.commands import parts, runs
from diffusion_pl.commands.options import TrainOptions
from diffusion_pl.config import Config
from diffusion_pl.diffusion.objective import TrainingObjective, trained_range
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.diffusion.schedules import LogUniform
from diffusion_pl.errors import UserError
from diffusion_pl.names import shown
from diffusion_pl.training import checkpoint as checkpoints

# Arguments of networks that leave the function of the weights as it is, or show in their shapes.
HARMLESS = {"classes", "dropout", "activation_checkpointing", "resolution"}
LEVELS = 33  # at which the c's are compared
SAME = 1e-4  # relative, of the c's: float32 settings and rounded limits are the same


@dataclass(frozen=True)
class StartWeights:
    """Weights that a run starts from.

    Args:
        path: the checkpoint.
        state: of the denoiser; without the tensors of its labels where those begin anew.
        fresh: the names of these.
    """

    path: Path
    state: Mapping[str, Tensor]
    fresh: frozenset[str]

    def fill(self, denoiser: Denoiser) -> None:
        """Put the weights into a denoiser as `load_weights` saw it built."""
        own = {key: value for key, value in denoiser.state_dict().items() if key in self.fresh}
        denoiser.load_state_dict({**self.state, **own})


def load_weights(run: Path, experiment: Config, options: TrainOptions, leads: bool) -> StartWeights:
    """Read the averaged weights of `--from`, and refuse those that were trained for something else.

    Args:
        run: the run or checkpoint.
        experiment: what is to be trained, bound.
        options: what is consented to.
        leads: whether this process says what differs.

    Raises:
        UserError: names what differs, and what to do; or the first key that does not fit.
    """
    path = runs.checkpoint_of(run)
    loaded = checkpoints.load(path)
    tree, _ = checkpoints.described(loaded, path)
    start = _match(options.fresh_labels, experiment, loaded, tree, path)
    unfit = [*_network(tree, experiment), *_coefficients(options.allow, tree, experiment, path)]
    if unfit and not options.accept_differences:
        raise UserError(
            f"--from {path}: its weights were trained for something else ({'; '.join(unfit)}); "
            "train what they are of, or start from them all the same: --accept-differences"
        )
    told = unfit or config.differences(
        {"objective": tree["objective"]}, {"objective": experiment.tree["objective"]}
    )
    if told and leads:
        said = f"starting from {path}, trained otherwise: {'; '.join(told)}"
        print(shown(said), file=sys.stderr)
    return start


def _network(tree: Mapping[str, Any], experiment: Config) -> list[str]:
    """The settings in which the networks differ though their weights may fit, a line each."""
    old, new = (parts.with_defaults(node) for node in (tree["network"], experiment.tree["network"]))
    lines = config.differences({"network": old}, {"network": new})
    return [line for line in lines if line.split(":")[0].split(".")[1] not in HARMLESS]


def _coefficients(
    allow: Sequence[str], tree: Mapping[str, Any], experiment: Config, path: Path
) -> list[str]:
    """The first of the four c's in which the objectives differ, within what is to be trained."""
    if tree["objective"] == experiment.tree["objective"]:
        return []
    old: TrainingObjective = config.build(config.load_resolved(tree, str(path), allow), "objective")
    new: TrainingObjective = config.build(experiment, "objective")
    sigma = LogUniform(*trained_range(new))(torch.linspace(0, 1, LEVELS, dtype=torch.float64))
    before, after = (objective.preconditioning(sigma) for objective in (old, new))
    for name, one, other in zip(after._fields, before, after, strict=True):
        scale = torch.maximum(one.abs(), other.abs()).clamp(min=1e-6)
        apart = (one - other).abs() / scale
        if bool((apart > SAME).any()):
            worst = int(apart.argmax())
            changed = config.differences({"objective": tree["objective"]},
                                         {"objective": experiment.tree["objective"]})  # fmt: skip
            return [
                f"{', '.join(changed)}: at sigma {float(sigma[worst]):.3g} {name} was "
                f"{float(one[worst]):.4g}, here {float(other[worst]):.4g}"
            ]
    return []


def _match(
    fresh_labels: bool,
    experiment: Config,
    loaded: Mapping[str, Any],
    tree: Mapping[str, Any],
    path: Path,
) -> StartWeights:
    """The weights that the network takes; those of its labels begin anew where that is asked for.

    Raises:
        UserError: another number of classes without a word, or the first key that does not fit.
    """
    objective: TrainingObjective = config.build(experiment, "objective")
    wanted = objective.denoiser(parts.meta_network(experiment))
    then, now = tree["network"].get("classes", 0), experiment.tree["network"].get("classes", 0)
    if then == now and not fresh_labels:
        state = checkpoints.match_weights(wanted, loaded, "ema", path)
        return StartWeights(path, state, frozenset())
    if not fresh_labels:
        raise UserError(
            f"--from {path}: it was trained on {then} classes, this network is of {now}; begin its "
            f"labels anew, and keep all else: --fresh-labels"
        )
    network = {**experiment.tree["network"], "classes": then}
    same = dataclasses.replace(experiment, tree={**experiment.tree, "network": network})
    # One class more or less shows which tensors are the labels'.
    other = {**experiment.tree["network"], "classes": now + 1 if now else 0}
    beside = dataclasses.replace(experiment, tree={**experiment.tree, "network": other})
    state = checkpoints.match_weights(
        objective.denoiser(parts.meta_network(same)), loaded, "ema", path
    )
    shapes = {key: value.shape for key, value in wanted.state_dict().items()}
    compared = objective.denoiser(parts.meta_network(beside)).state_dict()
    fresh = {
        key
        for key, shape in shapes.items()
        if key not in state or state[key].shape != shape or compared[key].shape != shape
    }
    kept = {key: value for key, value in state.items() if key in shapes and key not in fresh}
    return StartWeights(path, kept, frozenset(fresh))
