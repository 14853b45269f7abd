"""EDM's published checkpoints (Karras 2022, arXiv:2206.00364): their key names, configs, pickles.

| config | here |
|---|---|
| precond: EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond | objectives edm, vp, ve, edm_iddpm |
| model_type: SongUNet, DhariwalUNet | networks song_unet.SongUNet, adm.ADM |

The key names are in `edm_layout`; files of EDM2, whose class is `Precond`, are read by `edm2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.interop import edm2
from diffusion_pl.interop.denoisers import matched, meta_network
from diffusion_pl.interop.edm_layout import config_of_weights, names
from diffusion_pl.interop.pickles import Persistent, read_pickle, state_dict, tensors
from diffusion_pl.interop.values import LEVELS, got, whole
from diffusion_pl.networks.song_layers import kernel

NETWORKS = {
    "SongUNet": "diffusion_pl.networks.song_unet.SongUNet",
    "DhariwalUNet": "diffusion_pl.networks.adm.ADM",
}
# Preconditioning: our objective and which of its symbols a config may set.
OBJECTIVES: dict[str, tuple[str, tuple[str, ...]]] = {
    "EDMPrecond": ("diffusion_pl.objectives.edm.EDM", ("sigma_data",)),
    "VPPrecond": ("diffusion_pl.objectives.vp.VP", ("beta_d", "beta_min", "M", "epsilon_t")),
    "VEPrecond": ("diffusion_pl.objectives.ve.VE", ("sigma_min", "sigma_max")),
    "iDDPMPrecond": ("diffusion_pl.objectives.edm_iddpm.IDDPM", ("C_1", "C_2", "M")),
}
# Their argument, ours, and what it is when left out; None: it must be there.
ARGUMENTS: dict[str, tuple[str, Any]] = {
    "img_resolution": ("resolution", None),
    "img_channels": ("channels", None),
    "label_dim": ("classes", 0),
    "augment_dim": ("augment", 0),
    "model_channels": ("model_channels", None),
    "channel_mult": ("channel_mult", None),
    "num_blocks": ("blocks", None),
    "attn_resolutions": ("attention", None),
    "dropout": ("dropout", 0.1),
}
SONG: dict[str, tuple[str, Any]] = {
    "embedding_type": ("embedding", "positional"),
    "channel_mult_noise": ("noise_mult", 1),
    "encoder_type": ("encoder", "standard"),
    "resample_filter": ("resample_filter", [1, 1]),
}
# What our networks are built with, and what does not change the function.
FIXED = {"channel_mult_emb": 4, "decoder_type": "standard"}
CHOICES = {"embedding_type": ("positional", "fourier"), "encoder_type": ("standard", "residual")}
NOTES = "_notes"  # our key for what a user is to know of what was read
IGNORED = {"precond", "model_type", "label_dropout", "use_fp16", NOTES}


def read(
    path: Path, said: Mapping[str, Any] | None = None, weights: str = "ema"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an official network pickle or training state; nothing in it runs.

    Args:
        path: such as edm-cifar10-32x32-uncond-vp.pkl or training-state-002500.pt.
        said: keys of the config that the user says, over the file's.
        weights: "raw" for the raw weights of EDM2's training states; other files hold one: the
            average, or in a training state the raw weights.

    Returns:
        The config, what the file says over what the weights' shapes tell, and the weights in
        float32.

    Raises:
        UserError: unreadable, asking for what is refused, or no network of EDM's.
    """
    content = read_pickle(path)
    content = content if isinstance(content, dict) else {}
    if edm2.holds(content):
        return edm2.read(content, path, said or {}, weights)
    which = "net" if "ema" not in content and "net" in content else "ema"
    found = content.get(which)
    if not isinstance(found, Persistent) or found.name not in OBJECTIVES:
        name = found.name if isinstance(found, Persistent) else type(found).__name__
        raise UserError(
            f"{path}: {which!r} must be one of {', '.join(OBJECTIVES)} (got {name[:80]}) or "
            f"{edm2.PRECOND}; only EDM's and EDM2's network pickles and training states are read"
        )
    state = state_dict(tensors(found), str(path))
    model = found.state["_modules"].get("model")
    if not isinstance(model, Persistent) or model.name not in NETWORKS:
        name = model.name if isinstance(model, Persistent) else type(model).__name__
        raise UserError(
            f"{path}: the network must be one of {', '.join(NETWORKS)} (got {name[:80]})"
        )
    own = _kwargs(model) | _kwargs(found)
    own = {key: value for key, value in own.items() if key not in ("in_channels", "out_channels")}
    classes = {"precond": found.name, "model_type": model.name}
    config = config_of_weights(state) | own | dict(said or {}) | classes
    if which == "net":
        config[NOTES] = ["raw weights: a training state keeps no average"]
    return config, state


def _kwargs(module: Persistent) -> dict[str, Any]:
    found = module.state.get("_init_kwargs", {})
    return dict(found) if isinstance(found, dict) else {}


def asked(config: Mapping[str, Any]) -> str | None:
    """What is to be said of a file of EDM2, as an error line; EDM's pickles say all."""
    return edm2.asked(config) if _of_edm2(config) else None


def _of_edm2(config: Mapping[str, Any]) -> bool:
    return config.get("precond") == edm2.PRECOND


def notes(config: Mapping[str, Any]) -> list[str]:
    """What a user is to know of what was read."""
    return list(config.get(NOTES, []))


def nodes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `network`, `objective` and `sampler` nodes of an experiment that says the same.

    Beside them `label_dropout`, the share of the labels that were hidden in training.

    Raises:
        UserError: a config without a published layout, by its first such key.
    """
    if _of_edm2(config):
        return edm2.nodes(config)
    _check(config)
    target, symbols = OBJECTIVES[config["precond"]]
    objective = {key: config[key] for key in symbols if key in config}
    network: dict[str, Any] = {"_target_": NETWORKS[config["model_type"]]}
    for theirs, (ours, usual) in _arguments(config).items():
        value = config.get(theirs, usual)
        network[ours] = list(value) if isinstance(value, list | tuple) else value
    if config["precond"] == "iDDPMPrecond":
        network["learned_variance"] = True
    return {
        "network": network,
        "objective": {"_target_": target, **objective},
        "sampler": _sampler(config, objective),
        "label_dropout": float(config.get("label_dropout") or 0.0),
    }


def weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our network's state dict from published weights.

    Raises:
        UserError: names the first key that is missing, surplus or of another shape.
    """
    if _of_edm2(config):
        return edm2.weights(config, state)
    network = meta_network(nodes(config)["network"], state)
    refusal = partial(_misfit, config, state)
    found = matched(
        network, names(config, network), state, refusal=refusal,
        # iDDPM's table u is made from C_1, C_2 and M.
        unread=lambda key: key == "u" or key.endswith(".resample_filter"),
    )  # fmt: skip
    taps = kernel(config.get("resample_filter", [1, 1]))
    for key, value in state.items():
        if key.endswith(".resample_filter") and not (
            value.shape == taps.shape and torch.allclose(value.float(), taps)
        ):
            raise refusal(f"{key}: is not the filter that the config says")
    return found


def _arguments(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    return ARGUMENTS | (SONG if config["model_type"] == "SongUNet" else {})


def _check(config: Mapping[str, Any]) -> None:
    """Raise ValueError for the first key of a config that no published layout has."""
    for key, known in (("precond", OBJECTIVES), ("model_type", NETWORKS)):
        if config.get(key) not in known:
            raise UserError(
                f"{key}: has no published layout (got {config.get(key)!r}); one of "
                f"{', '.join(known)}"
            )
    arguments = _arguments(config)
    symbols = OBJECTIVES[config["precond"]][1]
    for key, value in config.items():
        if key in FIXED and value != FIXED[key]:
            raise UserError(f"{key}: {value!r} is not followed here; only {FIXED[key]!r} is")
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{key}: {value!r} is not followed here; only {CHOICES[key]} are")
        if key not in {*arguments, *symbols, *FIXED, *IGNORED}:
            raise UserError(
                f"{key}: is no argument of {config['precond']} and {config['model_type']}"
            )
    for key, (_, usual) in arguments.items():
        if usual is None and key not in config:
            raise UserError(f"{key}: is missing in the config of a published network")
        value = config.get(key, usual)
        if isinstance(usual, list) or key in ("channel_mult", "attn_resolutions"):
            if not isinstance(value, list | tuple) or len(value) > LEVELS:
                raise UserError(f"{key}: must be a list of at most {LEVELS} values {got(value)}")
        elif key != "dropout" and not isinstance(usual, str):
            whole(config, key, usual, 0)
    whole(config, "M", 1000, 2, 100_000)


def _sampler(config: Mapping[str, Any], objective: Mapping[str, Any]) -> dict[str, Any]:
    """The published sampler: 18 steps at 32 pixels, 40 at 64, with labels of ImageNet 256."""
    heun: dict[str, Any] = {"_target_": "diffusion_pl.samplers.heun.heun", "_partial_": True}
    steps = 18 if config["img_resolution"] <= 32 else 40
    discrete = config["precond"] == "iDDPMPrecond"
    if config.get("label_dim", 0) >= 1000:
        churn = 80.0 if discrete else 40.0  # Karras 2022, Table 5
        heun |= {"S_churn": churn, "S_tmin": 0.05, "S_tmax": 50.0, "S_noise": 1.003}
        steps = 256
    schedule: dict[str, Any] = {"_target_": "diffusion_pl.diffusion.schedules.Rho"}
    if discrete:
        where = "diffusion_pl.objectives.edm_iddpm"
        heun["nearest"] = {"_target_": f"{where}.nearest", "_partial_": True, **objective}
        schedule = {"_target_": f"{where}.RoundedRho", **objective}
    elif config["precond"] == "VEPrecond":
        low, high = objective.get("sigma_min", 0.02), objective.get("sigma_max", 100.0)
        schedule |= {"sigma_min": max(0.002, low), "sigma_max": min(80.0, high)}
    return {
        "_target_": "diffusion_pl.samplers.sampler.Sampler",
        "integrate": heun,
        "schedule": schedule,
        "steps": steps,
    }


def _misfit(config: Mapping[str, Any], state: Mapping[str, Tensor], what: str) -> ValueError:
    """What does not fit, and the config that these weights are of as far as their shapes tell."""
    try:
        found = config_of_weights(state)
    except ValueError as error:
        return UserError(f"{what}; {error}")
    usual = {key: value for key, (_, value) in _arguments(config).items()} | dict(config)
    other = [f"{key}: {value}" for key, value in found.items() if usual.get(key) != value]
    return UserError(f"{what}; the weights are of a config with {', '.join(other) or 'the same'}")
