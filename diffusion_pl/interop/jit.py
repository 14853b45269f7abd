"""JiT's checkpoints (Li & He 2025, arXiv:2511.13720), read and written: weights and their names.

A training checkpoint of the released code is a dictionary of `model`, the raw weights,
`model_ema1` and `model_ema2`, averages with decays of 0.9999 and 0.9996 a step, and `args`, the
command line as an argparse.Namespace; nothing of it is run. Shapes tell the network but for the
block that class tokens enter at; neither they nor the names tell the scale of the noise and t_eps.

| theirs | here |
|---|---|
| pos_embed | not kept: a fixed table, which the file's must equal |
| time features [cos, sin] | [sin, cos], so the columns of the first layer change places |
| row `classes` of the class table | label -1 |
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_pl.diffusion.objective import TrainingObjective
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.diffusion.schedules import LogNormal
from diffusion_pl.errors import UserError
from diffusion_pl.interop import denoisers
from diffusion_pl.interop.denoisers import matched, meta_network
from diffusion_pl.interop.pickles import Standin, read_state, state_dict
from diffusion_pl.interop.values import WIDEST, choice, got, only, real, whole
from diffusion_pl.io.files import write_atomically
from diffusion_pl.networks.jit import TIME_FEATURES, JiT
from diffusion_pl.networks.tokens import patch_table
from diffusion_pl.objectives.jit import ClampedWeight, Interpolation

# Model: width, depth, heads, bottleneck, first block with class tokens (Table 9; G as the author
# has it there, the released code has no such class).
SIZES = {
    "B": (768, 12, 12, 128, 4),
    "L": (1024, 24, 16, 128, 8),
    "H": (1280, 32, 16, 256, 10),
    "G": (1664, 40, 16, 256, 10),
}
# Their argument, ours, and what it is when left out; None: it must be there.
ARGUMENTS: dict[str, tuple[str, Any]] = {
    "input_size": ("resolution", None),
    "in_channels": ("channels", 3),
    "num_classes": ("classes", None),
    "patch_size": ("patch_size", None),
    "hidden_size": ("width", None),
    "depth": ("depth", None),
    "num_heads": ("heads", None),
    "bottleneck_dim": ("bottleneck", None),
    "in_context_len": ("class_tokens", None),
    "in_context_start": ("class_tokens_from", None),
}
OBJECTIVE = {"P_mean": ("mean", -0.8), "P_std": ("std", 0.8)}
ASKED = {"in_context_start": 4, "noise_scale": 1.0, "t_eps": 0.05, "label_drop_prob": 0.1,
         "P_mean": -0.8, "P_std": 0.8}  # fmt: skip
AVERAGES = {0.9999: "model_ema1", 0.9996: "model_ema2"}
# Of the command line, what this module looks at.
COMMAND = ("model", "P_mean", "P_std", "noise_scale", "t_eps", "proj_dropout", "attn_dropout",
           "label_drop_prob", "in_context_start")  # fmt: skip
OTHERS = {*COMMAND, "model_type", "mlp_ratio", "ema_decay"}
NOTES = "_notes"
OUTSIDE = {
    "class_positions": "in_context_posemb", "time0": "t_embedder.mlp.0",
    "time1": "t_embedder.mlp.2", "label": "y_embedder.embedding_table",
    "patches": "x_embedder.proj1", "stem": "x_embedder.proj2", "norm": "final_layer.norm_final",
    "head": "final_layer.linear", "affine": "final_layer.adaLN_modulation.1",
}  # fmt: skip
BLOCK = {
    "norm0": "norm1", "norm1": "norm2", "attention.norm_q": "attn.q_norm",
    "attention.norm_k": "attn.k_norm", "attention": "attn", "affine": "adaLN_modulation.1",
}  # fmt: skip


def read(
    path: Path, said: Mapping[str, Any] | None = None, weights: str = "ema"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint, such as checkpoint-last.pth; nothing in it is run.

    Args:
        path: the file: a training checkpoint, or one state dict.
        said: keys of the config that the user says, over the file's; `ema_decay=0.9996` takes the
            second average.
        weights: "raw" takes the raw weights.

    Returns:
        The config, what the file says over what the weights' shapes tell, and the weights in
        float32, their names without `net.`.

    Raises:
        UserError: unreadable, or without the weights that are asked for.
    """
    content = read_state(path)
    said = dict(said or {})
    command: dict[str, Any] = {}
    notes: list[str] = []
    if isinstance(content, Mapping) and "model" in content:
        args = content.get("args")
        args = args.state if isinstance(args, Standin) else args
        if isinstance(args, Mapping):
            command = {key: args[key] for key in COMMAND if key in args}
        key = "model" if weights == "raw" else choice(said, "ema_decay", 0.9999, AVERAGES)
        if key not in content:
            raise UserError(
                f"{path}: holds no {key}; it holds {', '.join(map(str, content))[:200]}"
            )
        content = content[key]
        notes = [
            "raw weights"
            if weights == "raw"
            else f"{key}, the average of decay {said.get('ema_decay', 0.9999)} a step"
        ]
    state = state_dict(content, str(path))
    state = {key.removeprefix("net."): value for key, value in state.items()}
    config = config_of_weights(state) | command | said
    if (name := config.get("model")) is not None:
        start = size_of(name, config)
        config.setdefault("in_context_start", start)
    return config | {NOTES: notes}, state


def config_of_weights(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the published weights' names and shapes say of their config.

    Raises:
        UserError: they are not in JiT's layout.
    """
    try:
        bottleneck, channels, patch = state["x_embedder.proj1.weight"].shape[:3]
        tokens, width = state["pos_embed"].shape[1:]
        head_width = state["blocks.0.attn.q_norm.weight"].shape[0]
        table = state.get("y_embedder.embedding_table.weight")
        front = state.get("in_context_posemb")
        found = {int(m.group(1)) for key in state if (m := re.match(r"blocks\.(\d{1,4})\.", key))}
        rows = 0 if table is None else table.shape[0]
        front_tokens = 0 if front is None else front.shape[1]
    except (KeyError, ValueError, IndexError) as error:
        beside = ", ".join(list(state)[:3])[:200]
        raise UserError(f"{error}: is not in JiT's layout (its keys: {beside}, ...)") from error
    side = math.isqrt(tokens)
    if side * side != tokens or width % head_width or not rows:
        raise UserError("the weights are not in JiT's layout: no square of patches with classes")
    return {
        "input_size": side * patch,
        "in_channels": channels,
        "num_classes": rows - 1,
        "patch_size": patch,
        "hidden_size": width,
        "depth": len(found),
        "num_heads": width // head_width,
        "bottleneck_dim": bottleneck,
        "in_context_len": front_tokens,
    }


def size_of(name: Any, config: Mapping[str, Any]) -> int:
    """The first block with class tokens of a model by its published name, such as JiT-B/16.

    Raises:
        UserError: an unknown name, or weights of another model; names the one that they fit.
    """
    match = re.fullmatch(r"JiT-([A-Z])/(\d{1,4})", name) if isinstance(name, str) else None
    if match is None or match.group(1) not in SIZES:
        raise UserError(f"model: must be such as JiT-B/16, of {', '.join(SIZES)} {got(name)}")
    shape = tuple(config[key] for key in ("hidden_size", "depth", "num_heads", "bottleneck_dim"))
    if (match.group(1), int(match.group(2))) == (_fitting(shape), config["patch_size"]):
        return SIZES[match.group(1)][-1]
    fitting = _fitting(shape)
    theirs = f"JiT-{fitting}/{config['patch_size']}" if fitting else "no published model"
    raise UserError(
        f"model: the weights are those of {theirs}, not of {name}: width {shape[0]}, {shape[1]} "
        f"blocks, {shape[2]} heads, bottleneck {shape[3]}, patches of {config['patch_size']}"
    )


def _fitting(shape: tuple[int, ...]) -> str:
    """The size whose network has this width, depth, heads and bottleneck; "" for none."""
    return next((size for size, one in SIZES.items() if one[:4] == shape), "")


def asked(config: Mapping[str, Any]) -> str | None:
    """What the file does not say and is to be said, as an error line; None: nothing."""
    missing = [key for key in ASKED if key not in config]
    if "in_context_start" in missing and not config.get("in_context_len"):
        missing.remove("in_context_start")
    if not missing:
        return None
    side = config.get("input_size", 256)
    values = {**ASKED, "noise_scale": max(1.0, side / 256)}
    shape = tuple(config.get(k) for k in ("hidden_size", "depth", "num_heads", "bottleneck_dim"))
    if fitting := _fitting(shape):  # type: ignore[arg-type]
        values["in_context_start"] = SIZES[fitting][-1]
    words = " ".join(f"--set {key}={values[key]}" for key in missing)
    return f"{missing[0]}: it does not say {', '.join(missing)}; the paper's are {words}"


def notes(config: Mapping[str, Any]) -> list[str]:
    """What a user is to know of what was read."""
    return list(config.get(NOTES, []))


def nodes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `network`, `objective` and `sampler` nodes of an experiment that says the same.

    Beside them `label_dropout`, the share of the labels that were hidden in training.

    Raises:
        UserError: a key that is not understood, or of another type or size.
    """
    for key in config:
        if key not in {*ARGUMENTS, *OBJECTIVE, *ASKED, *OTHERS, NOTES}:
            raise UserError(f"{key}: is no argument of JiT's network or denoiser")
    only(config, "model_type", "JiT", "JiT")
    only(config, "mlp_ratio", 4.0, 4.0)
    only(config, "attn_dropout", 0.0, 0.0)
    network: dict[str, Any] = {"_target_": "diffusion_pl.networks.jit.JiT"}
    for theirs, (ours, usual) in ARGUMENTS.items():
        least = 0 if theirs in ("num_classes", "in_context_len", "in_context_start") else 1
        if theirs == "in_context_start" and not network["class_tokens"]:
            continue
        network[ours] = whole(config, theirs, usual, least)
    dropout = config.get("proj_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"proj_dropout: must be in [0, 1) {got(dropout)}")
    network["dropout"] = float(dropout)
    scale, t_eps = real(config, "noise_scale", 1.0, WIDEST), real(config, "t_eps", 0.05, 1)
    objective: dict[str, Any] = {"noise_scale": scale, "t_eps": t_eps}
    for theirs, (ours, number) in OBJECTIVE.items():
        value = config.get(theirs, number)
        if type(value) not in (int, float) or abs(value) > WIDEST:
            raise UserError(f"{theirs}: must be a number {got(value)}")
        objective[ours] = float(value)
    hidden = config.get("label_drop_prob", 0.1)
    if type(hidden) not in (int, float) or not 0 <= hidden <= 1:
        raise UserError(f"label_drop_prob: must be in [0, 1] {got(hidden)}")
    return {
        "network": network,
        "objective": {"_target_": "diffusion_pl.objectives.jit.JiT", **objective},
        "sampler": sampler(scale, t_eps),
        "label_dropout": float(hidden),
    }


def sampler(noise_scale: float, t_eps: float) -> dict[str, Any]:
    """The released sampler: Heun in 50 equal steps of t, 99 evaluations, the velocity clamped."""
    return {
        "_target_": "diffusion_pl.samplers.sampler.Sampler",
        "integrate": {
            "_target_": "diffusion_pl.samplers.heun.heun", "_partial_": True,
            "noise_scale": noise_scale,
        },
        "schedule": {
            "_target_": "diffusion_pl.diffusion.paths.Along",
            "path": {
                "_target_": "diffusion_pl.objectives.rectified_flow.Straight",
                "shift": noise_scale,
            },
            "start": 0.0,
            "end": 1.0,
        },
        "steps": 50,
        "spacing": {"_target_": "diffusion_pl.diffusion.spacings.EqualSteps"},
        "velocity_clamp": {
            "_target_": "diffusion_pl.diffusion.guidance.VelocityClamp",
            "t_eps": t_eps, "noise_scale": noise_scale,
        },
    }  # fmt: skip


def weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our network's state dict from published weights.

    Raises:
        UserError: names the first key that is missing, surplus or of another shape.
    """
    state = {key.removeprefix("net."): value for key, value in state.items()}
    network = meta_network(nodes(config)["network"], state)
    found = matched(
        network, names(network), state, convert=_ours, unread=lambda key: key == "pos_embed"
    )
    side = config["input_size"] // config["patch_size"]
    table = patch_table(config["hidden_size"], side, side, torch.device("cpu"))
    given = state.get("pos_embed", table[None])
    if given.shape != (1, *table.shape) or not torch.allclose(given[0].float(), table, atol=1e-2):
        raise UserError("pos_embed: is not the fixed table of JiT's code")
    return found


def names(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Every key of a network's state dict, with the published one."""
    for key in network.state_dict():
        first, *rest = key.split(".")
        if first != "blocks":
            yield key, ".".join([OUTSIDE[first], *rest])
            continue
        part = ".".join(rest[1:])
        for ours, theirs in BLOCK.items():
            if part.startswith(f"{ours}."):
                part = theirs + part[len(ours) :]
                break
        yield key, f"blocks.{rest[0]}.{part}"


def _ours(key: str, value: Tensor) -> Tensor:
    """A published tensor as ours."""
    if key == "class_positions":
        return value.squeeze(0)
    return value.roll(TIME_FEATURES // 2, dims=1) if key == "time0.weight" else value


def denoiser_from(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Denoiser:
    """A published model as a denoiser, `denoiser(x, sigma, label=...)`, x = image + sigma noise.

    Args:
        config: arguments of the published network and denoiser, such as `hidden_size` and
            `noise_scale`.
        state: the published weights, their names with or without `net.`.

    Returns:
        In evaluation mode, without gradients; no label and label -1 are the null class.

    Raises:
        UserError: names the first key that does not fit.
    """
    from diffusion_pl.interop import jit  # this module, as the readers are named

    return denoisers.denoiser_from(jit, config, state)


def write(
    denoiser: Denoiser,
    objective: TrainingObjective,
    label_dropout: float,
    resolution: int,
    path: Path,
) -> None:
    """Write a checkpoint that the released code loads.

    Its `args`, a plain dictionary, say what shapes do not, in the words of the released command.

    Args:
        denoiser: a JiT that predicts the image.
        objective: that trained it.
        label_dropout: share of the labels that were hidden from it.
        resolution: side of the images.
        path: the file, written whole or not at all.

    Raises:
        UserError: another network or preconditioning, or settings that the layout does not have.
    """
    network, form = denoiser.network, denoiser.preconditioning
    if not isinstance(network, JiT) or not isinstance(form, Interpolation):
        raise UserError(
            "only a JiT with its objective has JiT's layout (got "
            f"{type(network).__name__}, {type(form).__name__}); export it as safetensors"
        )
    inner: Any = objective
    while isinstance(inner, nn.Module) and hasattr(inner, "objective"):  # further losses, weights
        inner = inner.objective
    weight, schedule = getattr(inner, "weight", None), getattr(inner, "schedule", None)
    if (form.predict, form.timestep_scale, form.reversed_time) != ("image", 1.0, False) or not (
        isinstance(weight, ClampedWeight)
        and weight.loss == "velocity"
        and isinstance(schedule, LogNormal)
    ):
        raise UserError(
            "JiT's layout knows its objective with predict: image, loss: velocity and "
            "timestep_scale: 1 alone; export it as safetensors"
        )
    learned = network.out_channels != network.channels
    own_kind = network.in_channels != network.channels or learned
    if own_kind or network.text_width or network.convolution or not network.classes:
        raise UserError(
            "JiT's layout knows networks with classes, and no position_frequencies, "
            "learned_variance, text, image_channels or convolution; export it as safetensors"
        )
    own = network.state_dict()
    state = {f"net.{theirs}": _theirs(ours, own[ours]) for ours, theirs in names(network)}
    side = resolution // network.patch_size
    state["net.pos_embed"] = patch_table(network.width, side, side, torch.device("cpu"))[None]
    middle: Any = network.blocks[len(network.blocks) // 4]
    dropout = middle.mlp.drop.p if len(network.blocks) >= 4 else 0.0
    args = {
        "img_size": resolution,
        "class_num": network.classes,
        "noise_scale": form.noise_scale,
        "t_eps": weight.t_eps,
        # Rounded, since ln s was added to it.
        "P_mean": round(math.log(form.noise_scale) - schedule.mean, 12),
        "P_std": schedule.std,
        "label_drop_prob": label_dropout,
        "proj_dropout": dropout,
        "in_context_start": network.class_tokens_from,
    }
    content = {"model": state, "model_ema1": state, "model_ema2": state, "args": args}
    write_atomically(path, lambda file: torch.save(content, file))


def _theirs(key: str, value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    if key == "class_positions":
        return value[None]
    return value.roll(TIME_FEATURES // 2, dims=1) if key == "time0.weight" else value
