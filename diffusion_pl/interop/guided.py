"""Checkpoints of guided-diffusion and improved-diffusion (Dhariwal & Nichol 2021, Nichol & Dhariwal
2021, released code): a state dict alone, read into our network.

The weights' names and shapes tell the network but for its heads and the size of its images; of the
noise they tell nothing. What they do not tell the user says, in the words of the published command
lines (`--set image_size=64 --set noise_schedule=cosine ...`), or by a published model's name
(`--set published=64x64_diffusion`), whose command line PUBLISHED holds.

| theirs | here |
|---|---|
| UNetModel | networks ddpm_unet.DDPMUNet |
| learn_sigma, else fixed | objectives improved_ddpm.Hybrid, else L_simple |
| rescale_timesteps | the timestep times 1000 / diffusion_steps |
| timestep_respacing 250, ddim25 | spacings Respaced, DDIMUniform |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.interop.denoisers import matched, meta_network
from diffusion_pl.interop.layouts import multiple
from diffusion_pl.interop.pickles import read_state, state_dict
from diffusion_pl.interop.values import LEVELS, choice, flag, got, only, whole

FROM_WEIGHTS = "_told"  # our key for the settings that the weights show
GROUPS = 32  # of every normalisation
_ADM = {
    "diffusion_steps": 1000, "noise_schedule": "linear", "num_head_channels": 64,
    "rescale_timesteps": False, "use_new_attention_order": False,
}  # fmt: skip
_IMPROVED = {
    "diffusion_steps": 4000, "noise_schedule": "cosine", "num_heads": 4, "rescale_timesteps": True,
    "use_new_attention_order": False,
}  # fmt: skip
_BEDROOM = _IMPROVED | {
    "image_size": 256, "diffusion_steps": 1000, "noise_schedule": "linear", "num_heads": 1,
    "rescale_timesteps": False,
}  # fmt: skip
_LSUN = _ADM | {"image_size": 256, "dropout": 0.1}
# The published models by their file's name, with what their command lines say beside the weights.
PUBLISHED: dict[str, dict[str, Any]] = {
    "64x64_diffusion": _ADM
    | {"image_size": 64, "noise_schedule": "cosine", "dropout": 0.1,
       "use_new_attention_order": True},
    "128x128_diffusion": _ADM | {"image_size": 128, "num_head_channels": -1, "num_heads": 4},
    "256x256_diffusion": _ADM | {"image_size": 256},
    "256x256_diffusion_uncond": _ADM | {"image_size": 256},
    "512x512_diffusion": _ADM | {"image_size": 512},
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": _LSUN | {"dropout": 0.0},
    "imagenet64_uncond_100M_1500K": _IMPROVED | {"image_size": 64},
    "imagenet64_uncond_vlb_100M_1500K": _IMPROVED | {"image_size": 64},
    "imagenet64_cond_270M_250K": _IMPROVED | {"image_size": 64, "rescale_timesteps": False},
    "cifar10_uncond_50M_500K": _IMPROVED | {"image_size": 32, "dropout": 0.3},
    "cifar10_uncond_vlb_50M_500K": _IMPROVED | {"image_size": 32, "dropout": 0.3},
    "lsun_uncond_100M_1200K_bs128": _BEDROOM,
    "lsun_uncond_100M_2400K_bs64": _BEDROOM,
}  # fmt: skip
# The flags that a user may say, and those that change nothing of a drawn image.
FLAGS = {
    "image_size", "attention_resolutions", "channel_mult", "num_heads", "num_head_channels",
    "use_new_attention_order", "noise_schedule", "diffusion_steps", "rescale_timesteps",
    "predict_xstart", "sigma_small", "dropout", "timestep_respacing", "num_heads_upsample",
}  # fmt: skip
OF_TRAINING = {"use_kl", "rescale_learned_sigmas", "use_checkpoint", "use_fp16"}
# Flags that the weights tell, which a user may repeat.
SEEN = ("num_channels", "num_res_blocks", "class_cond", "learn_sigma", "use_scale_shift_norm",
        "resblock_updown")  # fmt: skip
SCHEDULES = {"linear": "LinearBetas", "cosine": "CosineBetas"}
PARTS = {
    "norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1",
    "norm1": "out_layers.0", "conv1": "out_layers.3", "skip": "skip_connection",
}  # fmt: skip
ATTENTION = {"norm": "norm", "qkv": "qkv", "proj": "proj_out"}
OUTSIDE = {
    "stem": "input_blocks.0.0", "map_layer0": "time_embed.0", "map_layer1": "time_embed.2",
    "map_label": "label_emb", "out_norm": "out.0", "out_conv": "out.2",
}  # fmt: skip


def read(
    path: Path, said: Mapping[str, Any] | None = None, weights: str = "ema"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint, such as 64x64_diffusion.pt or ema_0.9999_200000.pt.

    Args:
        path: the file.
        said: flags of the published command line, or `published`, a model's name.
        weights: of no use, a file holds one.

    Returns:
        The flags, what the weights tell under FROM_WEIGHTS, and the weights in float32.

    Raises:
        UserError: unreadable, of another layout, an upsampler or a classifier.
    """
    state = state_dict(read_state(path), str(path))
    config = dict(said or {})
    if (name := config.pop("published", None)) is not None:
        config = choice({"published": name}, "published", None, PUBLISHED) | config
    return config | {FROM_WEIGHTS: config_of_weights(state)}, state


def config_of_weights(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the weights say of their network.

    Raises:
        UserError: they are not in this layout, or of what is no denoiser of images.
    """
    if "input_blocks.0.0.weight" not in state or "time_embed.0.weight" not in state:
        beside = ", ".join(list(state)[:3])
        raise UserError(
            f"input_blocks.0.0.weight: is missing in guided-diffusion's layout (its keys: "
            f"{beside[:200]}, ...)"
        )
    if "out.2.weight" not in state or not any(key.startswith("output_blocks") for key in state):
        raise UserError("output_blocks: there are none; a classifier is not understood here")
    stem, out = state["input_blocks.0.0.weight"], state["out.2.weight"]
    channels = stem.shape[1]
    if out.shape[0] not in (channels, 2 * channels):
        raise UserError(
            f"input_blocks.0.0.weight: takes {channels} channels and out.2.weight gives "
            f"{out.shape[0]}; an upsampler, which sees a smaller image beside the noise, is not "
            "understood here"
        )
    width = state["time_embed.0.weight"].shape[1]
    label = state.get("label_emb.weight")
    levels = list(_levels(state))
    blocks = {len(level) for level, _ in levels}
    if len(blocks) != 1 or not 1 <= len(levels) <= LEVELS:
        raise UserError("input_blocks: each level must have as many residual blocks")
    first = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    return {
        "channels": channels,
        "learned_variance": out.shape[0] == 2 * channels,
        "classes": 0 if label is None else label.shape[0],
        "model_channels": width,
        "channel_mult": [
            multiple(state[f"{level[0]}.0.in_layers.2.weight"].shape[0], width)
            for level, _ in levels
        ],
        "blocks": blocks.pop(),
        "attends": [f"{level[0]}.1.qkv.weight" in state for level, _ in levels],
        "adaptive_scale": first == 2 * state["input_blocks.1.0.in_layers.2.weight"].shape[0],
        "resample": "even" if any(way == "op" for _, way in levels) else "block",
    }


def _levels(state: Mapping[str, Tensor]) -> Iterator[tuple[list[str], str]]:
    """The blocks of each level of the encoder, and how the resolution changes before the next."""
    level: list[str] = []
    numbers = {
        int(m.group(1)) for key in state if (m := re.match(r"input_blocks\.(\d{1,4})\.", key))
    }
    downs = _downs(state, numbers)
    for number in range(1, len(numbers)):
        place = f"input_blocks.{number}"
        if number in downs:
            yield level, downs[number]
            level = []
        elif f"{place}.0.in_layers.2.weight" not in state:
            raise UserError(
                f"{place}.0.in_layers.2.weight: is missing in guided-diffusion's layout"
            )
        else:
            level.append(place)
    yield level, ""


def _downs(state: Mapping[str, Tensor], numbers: set[int]) -> dict[int, str]:
    """Which blocks of the encoder halve the image, and how: "op" by a convolution."""
    found = {n: "op" for n in numbers if f"input_blocks.{n}.0.op.weight" in state}
    if found:
        return found
    # Residual blocks that halve look as the others do. The decoder tells how many blocks a level
    # has: its last one is followed by what doubles.
    ups = [
        int(m.group(1)) for key in state
        if (m := re.match(r"output_blocks\.(\d{1,4})\.[12]\.in_layers\.2\.weight", key))
    ]  # fmt: skip
    if not ups:
        if any(re.match(r"output_blocks\.\d+\.[12]\.conv\.weight", key) for key in state):
            raise UserError("input_blocks: halve without a convolution and output_blocks with one")
        return {}
    a_level = min(ups) + 1  # of the decoder, which has one more than the encoder
    return {n: "block" for n in range(a_level, max(numbers) + 1, a_level) if n in numbers}


def asked(config: Mapping[str, Any]) -> str | None:
    """What the weights do not tell and the user has to, None when all is said."""
    missing = [key for key in ("image_size", "noise_schedule", "diffusion_steps")
               if key not in config]  # fmt: skip
    heads = config.get("num_heads", 0), config.get("num_head_channels", -1)
    if "num_heads" not in config and config.get("num_head_channels", -1) == -1:
        missing.append("num_heads (or num_head_channels)")
    if heads != (1, -1) and "use_new_attention_order" not in config:
        missing.append("use_new_attention_order")
    if config.get("diffusion_steps", 0) != 1000 and "rescale_timesteps" not in config:
        missing.append("rescale_timesteps")
    if not config[FROM_WEIGHTS]["learned_variance"] and "sigma_small" not in config:
        missing.append("sigma_small")
    if not missing:
        return None
    return (
        f"the weights do not tell {', '.join(missing)}; say each as by --set image_size=64, in the "
        "words of the command line that it was trained with, or --set published=NAME for one of "
        f"{', '.join(PUBLISHED)}"
    )


def notes(config: Mapping[str, Any]) -> list[str]:
    """What a user is to know of what was read."""
    return []


def nodes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `network`, `objective` and `sampler` nodes of an experiment that says the same.

    Raises:
        UserError: a flag that is not known, or one that does not fit the weights.
    """
    found = config[FROM_WEIGHTS]
    for key in config:
        if key not in FLAGS | OF_TRAINING | set(SEEN) and key != FROM_WEIGHTS:
            raise UserError(f"{key}: is no flag of guided-diffusion {got(config[key])}")
    seen = (
        found["model_channels"], found["blocks"], found["classes"] > 0, found["learned_variance"],
        found["adaptive_scale"], found["resample"] == "block",
    )  # fmt: skip
    for key, value in zip(SEEN, seen, strict=True):
        only(config, key, value, value)
    sides = [config.get("image_size", 0) // 2**n for n in range(len(found["attends"]))]
    attended = {side for side, attend in zip(sides, found["attends"], strict=True) if attend}
    for key, value, own in (
        ("attention_resolutions", config.get("attention_resolutions"), attended),
        ("channel_mult", config.get("channel_mult"), found["channel_mult"]),
    ):
        said = [float(word) for word in re.findall(r"[\d.]+", str(value)[:200])]
        # A resolution that is none of the levels' is that of no block.
        same = said == own if isinstance(own, list) else {*said} & {*sides} == own
        if value and not same:
            raise UserError(f"{key}: the weights are of {own} {got(value)}")
    if config.get("num_heads_upsample", -1) not in (-1, config.get("num_heads")):
        raise UserError("num_heads_upsample: must be -1, as many heads as on the way down")
    table, process = _process(config)
    return {"network": _network(config), **process, "sampler": _sampler(config, table)}


def _network(config: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(config[FROM_WEIGHTS])
    side = whole(config, "image_size", None)
    dropout = config.get("dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"dropout: must be a share from 0 to 1 {got(dropout)}")
    attends = found.pop("attends")
    head_channels = config.get("num_head_channels", -1)
    node = {
        "_target_": "diffusion_pl.networks.ddpm_unet.DDPMUNet",
        "resolution": side,
        **found,
        "attention": [side // 2**level for level, attend in enumerate(attends) if attend],
        "dropout": float(dropout),
        "groups": GROUPS,
        "eps": 1e-5,
        "cosine_first": True,
        "endpoint": False,
    }
    if head_channels != -1:
        node["head_channels"] = whole(config, "num_head_channels", None)
    else:
        node["heads"] = whole(config, "num_heads", 1)
    return node


def _process(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The table's node, and the objective's in a node of its section."""
    T = whole(config, "diffusion_steps", None, 2, 100_000)
    kind = choice(config, "noise_schedule", None, SCHEDULES)
    table: dict[str, Any] = {"_target_": f"diffusion_pl.diffusion.timesteps.{kind}", "T": T}
    if kind == "LinearBetas":
        table |= {"beta_1": 1e-4 * 1000 / T, "beta_T": 0.02 * 1000 / T}
    predicted = "PredictImage" if flag(config, "predict_xstart", False) else "PredictNoise"
    preconditioning: dict[str, Any] = {
        "_target_": f"diffusion_pl.objectives.ddpm.{predicted}",
        "timesteps": table,
    }
    if flag(config, "rescale_timesteps", False):
        preconditioning["timestep_scale"] = 1000 / T
    parts = "diffusion_pl.diffusion.objective."
    objective: dict[str, Any] = {
        "_target_": f"{parts}Objective",
        "schedule": table,
        "preconditioning": preconditioning,
        "weight": {"_target_": f"{parts}EpsWeight"},
        "reduce": {"_target_": f"{parts}pixel_mean", "_partial_": True},
    }
    if config[FROM_WEIGHTS]["learned_variance"]:
        chain = {"_target_": "diffusion_pl.objectives.likelihood.ReverseChain"}
        objective = {
            "_target_": "diffusion_pl.objectives.improved_ddpm.Hybrid",
            "schedule": table,
            "preconditioning": preconditioning,
            "chain": {**chain, "timesteps": table, "variance": "learned"},
        }
    return table, {"objective": objective}


def _sampler(config: Mapping[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """Their chain on the respaced timesteps, or DDIM."""
    T = table["T"]
    said = str(config.get("timestep_respacing", "") or T)
    if not re.fullmatch(r"(ddim)?[1-9][0-9]{0,5}", said):
        raise UserError(
            f"timestep_respacing: must be a number of steps, or one after ddim "
            f"{got(config['timestep_respacing'])}"
        )
    steps = whole({"timestep_respacing": int(said.removeprefix("ddim"))}, "timestep_respacing",
                  None, 1, T)  # fmt: skip
    variance = "small" if flag(config, "sigma_small", False) else "large"
    variance = "learned" if config[FROM_WEIGHTS]["learned_variance"] else variance
    chain = {"_target_": "diffusion_pl.samplers.ancestral.ancestral", "_partial_": True}
    integrate: dict[str, Any] = {**chain, "variance": variance}
    spacing = "Respaced"
    if said.startswith("ddim"):
        integrate = {"_target_": "diffusion_pl.samplers.euler.euler", "_partial_": True}
        spacing = "DDIMUniform"
    node: dict[str, Any] = {
        "_target_": "diffusion_pl.samplers.sampler.Sampler",
        "integrate": integrate,
        "schedule": table,
        "steps": steps,
        "clip_denoised": True,
        "unit_start": True,
    }
    if steps != T:
        node["spacing"] = {"_target_": f"diffusion_pl.diffusion.spacings.{spacing}", "T": T}
    return node


def weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our network's state dict from published weights.

    Raises:
        UserError: names the first key that is missing, surplus or of another shape.
    """
    node = _network(config)
    network = meta_network(node, state)
    new_order = flag(config, "use_new_attention_order", False)

    def convert(ours: str, value: Tensor) -> Tensor:
        if ours == "map_label.weight":
            # Ours takes a one-hot vector times sqrt(classes), theirs a row of a table.
            value = value.T / node["classes"] ** 0.5
        elif ".attention.qkv." in ours:
            value = _qkv(value, network.get_submodule(ours.rpartition(".qkv.")[0]).heads, new_order)
        own = network.get_parameter(ours)
        return value[..., None] if (*value.shape, 1) == tuple(own.shape) else value

    names = ((ours, _key(ours, node)) for ours in network.state_dict())
    layout = " in guided-diffusion's layout"
    return matched(network, names, state, convert=convert, layout=layout)


def _qkv(value: Tensor, heads: int, new_order: bool) -> Tensor:
    """Rows by (head, channel, q/k/v), as ours are."""
    if value.shape[0] % (3 * heads):
        raise UserError(f"qkv: {value.shape[0]} rows are no whole number of {heads} heads")
    if new_order:
        rows = value.unflatten(0, (3, heads, -1)).movedim(0, 2)
    else:
        rows = value.unflatten(0, (heads, 3, -1)).transpose(1, 2)
    return rows.flatten(0, 2)


def _key(ours: str, node: Mapping[str, Any]) -> str:
    """The published name of one of our keys."""
    side, *rest, leaf = ours.split(".")
    if side in OUTSIDE:
        return f"{OUTSIDE[side]}.{leaf}"
    number, *part = int(rest[0]), *rest[1:]
    if part[0] == "attention":
        name, beside = ATTENTION[part[1]], 1
    else:
        name, beside = PARTS.get(part[0], part[0]), 0
    if side == "middle":
        return f"middle_block.{1 if beside else 2 * number}.{name}.{leaf}"
    if side == "encoder":
        name = "op" if name == "conv" else name
        return f"input_blocks.{number + 1}.{beside}.{name}.{leaf}"
    # What doubles stands behind the last block of its level there, and by itself here.
    blocks, levels = node["blocks"] + 1, len(node["channel_mult"])
    level, within = divmod(number, blocks + 1)
    if within == blocks:
        side_pixels = node["resolution"] // 2 ** (levels - 1 - level)
        beside, within = 1 + (side_pixels in node["attention"]), blocks - 1
    return f"output_blocks.{level * blocks + within}.{beside}.{name}.{leaf}"
