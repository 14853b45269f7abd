"""EDM2's network pickles and training states (Karras 2024, arXiv:2312.02696) of models on pixels.

| file | holds |
|---|---|
| network-snapshot-*.pkl, phema-*.pkl | an average, its settings, encoder and loss as objects |
| training-state-*.pt | state dicts of the raw weights and of two averages, the loss's numbers |

Their weights are stored at any scale, for every layer normalises its own (networks/edm2_layers.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.interop.denoisers import matched, meta_network
from diffusion_pl.interop.edm_layout import sides
from diffusion_pl.interop.pickles import Persistent, state_dict, tensors
from diffusion_pl.interop.values import LEVELS, WIDEST, got, real, several, whole

PRECOND, PIXELS, LOSS = "Precond", "StandardRGBEncoder", "EDM2Loss"
# Their argument, ours, and what it is when left out; None: it must be there.
ARGUMENTS: dict[str, tuple[str, Any]] = {
    "img_resolution": ("resolution", None),
    "img_channels": ("channels", None),
    "label_dim": ("classes", None),
    "model_channels": ("model_channels", 192),
    "channel_mult": ("channel_mult", [1, 2, 3, 4]),
    "num_blocks": ("blocks", 3),
    "attn_resolutions": ("attention", [16, 8]),
    "dropout": ("dropout", 0),
    "channel_mult_noise": ("noise_mult", None),
    "channel_mult_emb": ("embedding_mult", None),
    "label_balance": ("label_balance", 0.5),
    "concat_balance": ("concat_balance", 0.5),
    "res_balance": ("residual_balance", 0.3),
    "attn_balance": ("attention_balance", 0.3),
    "channels_per_head": ("head_channels", 64),
    "clip_act": ("clip", 256),
    "resample_filter": ("resample_filter", [1, 1]),
}
NEEDED = ("img_resolution", "img_channels", "label_dim")
SYMBOLS = {"P_mean": None, "P_std": None, "sigma_data": 0.5}
OTHERS = ("precond", "use_fp16", "logvar_channels", "encoder", "ema_std", "_state", "_notes")
BLOCK = {
    "conv0": "conv_res0", "conv1": "conv_res1", "affine": "emb_linear", "affine_gain": "emb_gain",
    "skip": "conv_skip", "attention.qkv": "attn_qkv", "attention.proj": "attn_proj",
}  # fmt: skip
OUTSIDE = {
    "fourier": "emb_fourier", "map_noise": "emb_noise", "map_label": "emb_label",
    "out_conv": "out_conv", "out_gain": "out_gain",
}  # fmt: skip


def holds(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is of EDM2."""
    found, net = content.get("ema"), content.get("net")
    return (isinstance(found, Persistent) and found.name == PRECOND) or (
        isinstance(net, Mapping) and any(str(key).startswith("unet.") for key in net)
    )


def read(
    content: Mapping[str, Any], path: Path, said: Mapping[str, Any], weights: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights of a file's content; see `edm.read`.

    Args:
        content: that `holds` something.
        path: of the file, for messages.
        said: keys of the config that the user says, over the file's.
        weights: "raw" takes the raw weights of a training state.

    Raises:
        UserError: a second network, or weights that are not said or not there.
    """
    found = content.get("ema")
    if isinstance(found, Persistent):
        if weights == "raw":
            raise UserError(f"{path}: holds an average alone; leave out --weights raw")
        modules = found.state.get("_modules")
        unet = modules.get("unet") if isinstance(modules, dict) else None
        if not isinstance(unet, Persistent) or unet.name != "UNet":
            raise UserError(f"{path}: the network must be a UNet {got(getattr(unet, 'name', 0))}")
        state = state_dict(tensors(found), str(path))
        config = _kwargs(unet) | _kwargs(found)
        encoder = content.get("encoder")
        if isinstance(encoder, Persistent):
            config["encoder"] = encoder.name
        loss = content.get("loss_fn")
        numbers: Any = loss.state if isinstance(loss, Persistent) and loss.name == LOSS else {}
        about: list[str] = []
    else:
        chosen, about = _chosen(content, said, weights)
        state = state_dict(chosen, str(path))
        config = config_of_weights(state) | {"_state": True}
        numbers = content.get("loss_fn")
    if isinstance(numbers, Mapping):
        config |= {key: numbers[key] for key in SYMBOLS if key in numbers}
    about.append(
        "the learned weight of the loss is not taken: fine-tuning begins it anew, see "
        "objectives/edm2.py"
    )
    return config | dict(said) | {"precond": PRECOND, "_notes": about}, state


def _kwargs(module: Persistent) -> dict[str, Any]:
    found = module.state.get("_init_kwargs")
    return dict(found) if isinstance(found, dict) else {}


def _chosen(
    content: Mapping[str, Any], said: Mapping[str, Any], weights: str
) -> tuple[Any, list[str]]:
    """The weights of a training state that are asked for, and what is to be said of them."""
    if weights == "raw":
        return content["net"], ["raw weights of a training state"]
    kept = content.get("ema")
    kept = kept if isinstance(kept, Mapping) else {}
    lengths, averages = kept.get("stds"), kept.get("emas")
    if not isinstance(lengths, list) or not isinstance(averages, list) or not averages:
        raise UserError("the training state keeps no average; take --weights raw")
    length = said.get("ema_std")
    if length not in lengths or len(lengths) != len(averages):
        raise UserError(
            f"ema_std: must be the length of one of its averages, {lengths} {got(length)}; say it "
            f"by --set ema_std={lengths[0]}, or take --weights raw"
        )
    return averages[lengths.index(length)], [f"the average of relative length {length}"]


def config_of_weights(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the published weights' names and shapes say of their config.

    Raises:
        UserError: the weights are not in EDM2's layout.
    """
    found = {int(m.group(1)) for key in state if (m := re.match(r"unet\.enc\.(\d{1,6})x", key))}
    sizes = sorted(found, reverse=True)[: LEVELS + 1]
    try:
        at = [f"unet.enc.{size}x{size}_block" for size in sizes]
        widths = [state[f"{name}0.conv_res1.weight"].shape[0] for name in at]
        width, label = widths[0], state.get("unet.emb_label.weight")
        lengths = state["unet.emb_fourier.freqs"].shape[0], state["unet.emb_noise.weight"].shape[0]
        if any(one % width for one in (*widths, *lengths)):
            raise UserError("the weights' widths are no multiples of the first level's")
        return {
            "img_resolution": sizes[0],
            "img_channels": state["unet.out_conv.weight"].shape[0],
            "label_dim": 0 if label is None else label.shape[1],
            "model_channels": width,
            "channel_mult": [one // width for one in widths],
            "channel_mult_noise": lengths[0] // width,
            "channel_mult_emb": lengths[1] // width,
            "num_blocks": sum(f"{at[0]}{n}.conv_res1.weight" in state for n in range(len(state))),
            "attn_resolutions": [
                size
                for size, name in zip(sizes, at, strict=True)
                if f"{name}0.attn_qkv.weight" in state
            ],
        }
    except (KeyError, IndexError) as error:
        raise UserError(f"the weights are not in EDM2's layout (no {error})") from error


def asked(config: Mapping[str, Any]) -> str | None:
    """What the file does not say and is to be said, as an error line; None: nothing."""
    if config.get("encoder", PIXELS) != PIXELS:
        return None  # refused by `nodes`, whatever else is missing
    if "encoder" not in config and config.get("img_channels") == 4:
        return (
            "encoder: it does not say whether its 4 channels are latents, which need a second "
            f"network, or pixels; for pixels say --set encoder={PIXELS}"
        )
    if config.get("_state") and "dropout" not in config:
        return "dropout: a training state does not say it; say --set dropout=0.0, or its value"
    missing = [key for key, usual in SYMBOLS.items() if usual is None and key not in config]
    if missing:
        return (
            f"{missing[0]}: it does not say the noise levels of its training; the paper's for "
            "pixels are --set P_mean=-0.8 --set P_std=1.6"
        )
    return None


def nodes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `network`, `objective` and `sampler` nodes of an experiment that says the same.

    Raises:
        UserError: a key that is not understood, or latents of a second network.
    """
    _check(config)
    network: dict[str, Any] = {"_target_": "diffusion_pl.networks.edm2_unet.EDM2UNet"}
    for theirs, (ours, usual) in ARGUMENTS.items():
        value = config.get(theirs, usual)
        if theirs in list(ARGUMENTS)[:8] or value != usual:
            network[ours] = list(value) if isinstance(value, list | tuple) else value
    heun = {"_target_": "diffusion_pl.samplers.heun.heun", "_partial_": True}
    return {
        "network": network,
        "objective": {
            "_target_": "diffusion_pl.objectives.edm2.EDM2",
            **{key: float(config.get(key, usual)) for key, usual in SYMBOLS.items()},
            "channels": config.get("logvar_channels", 128),
        },
        # The released sampler: 63 evaluations.
        "sampler": {
            "_target_": "diffusion_pl.samplers.sampler.Sampler",
            "integrate": heun,
            "schedule": {"_target_": "diffusion_pl.diffusion.schedules.Rho"},
            "steps": 32,
        },
        "label_dropout": 0.0,  # a model without labels guides, trained apart
    }


def _check(config: Mapping[str, Any]) -> None:
    """Raise ValueError for the first key that is not understood."""
    encoder = config.get("encoder", PIXELS)
    if encoder != PIXELS:
        raise UserError(
            f"encoder: needs a second network that is not read here {got(encoder)}; only models "
            f"on pixels are, with a {PIXELS}"
        )
    for key in config:
        if key not in {*ARGUMENTS, *SYMBOLS, *OTHERS}:
            raise UserError(f"{key}: is no argument of EDM2's {PRECOND}")
    for key in ("img_resolution", "img_channels", "model_channels", "num_blocks"):
        whole(config, key, ARGUMENTS[key][1])
    whole(config, "label_dim", None, 0)
    for key in ("channels_per_head", "logvar_channels"):
        whole(config, key, 64)
    for key in ("channel_mult_noise", "channel_mult_emb"):
        if config.get(key) is not None:
            whole(config, key, None)
    for key in ("channel_mult", "resample_filter"):
        several({key: ARGUMENTS[key][1]} | dict(config), key, int)
    if config.get("attn_resolutions", [1]):
        several({"attn_resolutions": [1]} | dict(config), "attn_resolutions", int)
    for key in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
        real(config, key, ARGUMENTS[key][1], 1)
    if config.get("clip_act", 256) is not None:
        real(config, "clip_act", 256)
    for key in ("P_std", "sigma_data"):
        real(config, key, 0.5)
    for key in ("dropout", "P_mean"):
        if type(config.get(key, 0)) not in (int, float) or abs(config.get(key, 0)) > WIDEST:
            raise UserError(f"{key}: must be a number {got(config[key])}")


def weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our network's state dict from published weights.

    Raises:
        UserError: names the first key that is missing, surplus or of another shape.
    """
    network = meta_network(nodes(config)["network"], state)
    return matched(
        network, names(config, network), state,
        # A gain is a scalar there and a row of one here.
        convert=lambda ours, value: value.reshape(1) if value.ndim == 0 else value,
        unread=lambda key: key.startswith("logvar_"),
    )  # fmt: skip


def names(config: Mapping[str, Any], network: nn.Module) -> Iterator[tuple[str, str]]:
    """Every key of a network's state dict, with the published one."""
    full = config["img_resolution"]
    multipliers = config.get("channel_mult", ARGUMENTS["channel_mult"][1])
    sizes = [full >> level for level in range(len(multipliers))]
    blocks = config.get("num_blocks", ARGUMENTS["num_blocks"][1])
    theirs = dict(sides(sizes, blocks, "unet")) | {
        ours: f"unet.{name}" for ours, name in OUTSIDE.items()
    }
    for key in network.state_dict():
        module = re.match(r"(?:encoder|decoder|middle)\.\d+|\w+", key)
        assert module is not None
        rest = key[module.end() + 1 :]
        part = next((one for one in BLOCK if rest == one or rest.startswith(f"{one}.")), "")
        rest = BLOCK[part] + rest[len(part) :] if part else rest
        yield key, ".".join(word for word in (theirs[module.group()], rest) if word)
