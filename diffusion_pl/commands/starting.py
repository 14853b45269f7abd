"""Weights of another run to start from, compared with what is to be trained (`train --from`).

The new run must train the same denoiser and network that the weights are of. Denoisers are compared
by their four c's as functions of sigma, networks by the settings that change their function without
changing the shape of a weight.
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
from diffusion_pl.evaluation.prompts import TextEncoder
from diffusion_pl.names import shown
from diffusion_pl.training import checkpoint as checkpoints

# Arguments of networks that do not change the function of the weights, or show in their shapes.
HARMLESS = {"classes", "dropout", "activation_checkpointing", "resolution", "routing"}
LEVELS = 33  # at which the c's are compared
SAME = 1e-4  # relative difference of the c's that counts as rounding


@dataclass(frozen=True)
class StartWeights:
    """Weights that a run starts from.

    Args:
        path: the checkpoint.
        state: of the denoiser, without the tensors of its labels where those are initialised.
        fresh: the names of these tensors.
        encoder: of the captions that the weights were trained with; None where it is not known.
    """

    path: Path
    state: Mapping[str, Tensor]
    fresh: frozenset[str]
    encoder: TextEncoder | None

    def fill(self, denoiser: Denoiser) -> None:
        """Load the weights into a denoiser built as for `load_weights`."""
        own = {key: value for key, value in denoiser.state_dict().items() if key in self.fresh}
        denoiser.load_state_dict({**self.state, **own})


def load_weights(run: Path, experiment: Config, options: TrainOptions, leads: bool) -> StartWeights:
    """Read the averaged weights of `--from`; refuse those of another denoiser or network.

    Args:
        run: the run or checkpoint.
        experiment: to be trained, bound.
        options: which differences are accepted.
        leads: whether this process prints what differs.

    Raises:
        UserError: names what differs, or the first key that does not fit.
    """
    path = runs.checkpoint_of(run)
    loaded = checkpoints.load(path)
    tree, _ = checkpoints.described(loaded, path)
    state, fresh = _match(options.fresh_labels, experiment, loaded, tree, path)
    start = StartWeights(path, state, fresh, checkpoints.text_encoder(loaded, path))
    unfit = [*_network(tree, experiment), *_coefficients(options.allow, tree, experiment, path)]
    if unfit and not options.accept_differences:
        raise UserError(
            f"--from {path}: its weights were trained for something else ({'; '.join(unfit)}); "
            "train the same, or start from them all the same: --accept-differences"
        )
    differing = unfit or config.differences(
        {"objective": tree["objective"]}, {"objective": experiment.tree["objective"]}
    )
    if differing and leads:
        text = f"starting from {path}, trained otherwise: {'; '.join(differing)}"
        print(shown(text), file=sys.stderr)
    return start


def _network(tree: Mapping[str, Any], experiment: Config) -> list[str]:
    """The settings in which networks with equal weights differ, a line each."""
    old, new = (parts.with_defaults(node) for node in (tree["network"], experiment.tree["network"]))
    lines = config.differences({"network": old}, {"network": new})
    return [line for line in lines if line.split(":")[0].split(".")[1] not in HARMLESS]


def _coefficients(
    allow: Sequence[str], tree: Mapping[str, Any], experiment: Config, path: Path
) -> list[str]:
    """The first of the four c's in which the objectives differ, in the range to be trained."""
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
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The weights that fit the network, without those of its labels if `fresh_labels`, and the
    names of these.

    Raises:
        UserError: another number of classes without that option, or the first key that does not
            fit.
    """
    objective: TrainingObjective = config.build(experiment, "objective")
    wanted = objective.denoiser(parts.meta_network(experiment))
    then, now = tree["network"].get("classes", 0), experiment.tree["network"].get("classes", 0)
    if then == now and not fresh_labels:
        state = checkpoints.match_weights(wanted, loaded, "ema", path)
        return state, frozenset()
    if not fresh_labels:
        raise UserError(
            f"--from {path}: it was trained on {then} classes, this network has {now}; initialise "
            "the labels' weights and keep all others: --fresh-labels"
        )
    network = {**experiment.tree["network"], "classes": then}
    same = dataclasses.replace(experiment, tree={**experiment.tree, "network": network})
    # Tensors whose shape changes with the number of classes are the labels'.
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
    return kept, frozenset(fresh)
