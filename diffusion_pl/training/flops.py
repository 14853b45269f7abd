"""Model FLOPs utilisation (Chowdhery 2022, PaLM, App. B): of the peak that a device's maker states.

A training step is counted as three forward passes of the network, without recomputation, further
losses or the averages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from diffusion_pl.training.settings import resolve_precision
from diffusion_pl.training.step_cost import conditions

# FLOP/s of dense bf16 (fp16) products with fp32 sums, from the makers' data sheets; the first name
# that a device's name contains counts.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
}


def utilization(trainer: Any, module: Any) -> float | None:
    """The share of the devices' peak that an image a second makes; None where it is not known.

    Args:
        trainer: of a run whose data is open.
        module: the DiffusionModule.
    """
    device, data = trainer.strategy.root_device, trainer.datamodule.data
    if device.type != "cuda" or data.resolution_weights is not None:
        return None
    settings = module.settings
    peak = peak_of(
        torch.cuda.get_device_name(device), resolve_precision(settings.precision, "cuda")
    )
    if peak is None:
        return None
    side = module.resolution if data.crop is None else min(module.resolution, data.crop.size)
    forward = forward_flops(module.ema.network, data.dataset.channels, side)
    return None if forward is None else 3 * forward / (peak * trainer.world_size)


def peak_of(device: str, precision: str) -> float | None:
    """The peak of a device in FLOP/s; None where it is not known.

    Args:
        device: its name, as torch gives it; of a part of one (MIG) no peak is known.
        precision: fp32, bf16 or fp16; of fp32 the peak depends on settings, so none is stated.
    """
    if precision not in ("bf16", "fp16") or "MIG" in device:
        return None
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def forward_flops(network: Any, channels: int, side: int) -> float | None:
    """FLOP of a forward pass for one image, products alone; None where they cannot be counted.

    Where tokens are routed in training, they are not counted.

    Args:
        network: F; its weights are not touched.
        channels: of the image.
        side: of the image, pixels.
    """
    if getattr(network, "routing", None) is not None:
        return None
    try:
        with torch.device("meta"):
            condition = conditions(network, 1, (side, side), augmented=False, positioned=False)
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        meta = {  # also of sharded ones
            name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for name, value in tensors.items()
        }
        image = torch.zeros(1, channels, side, side, device="meta")
        level = torch.zeros(1, device="meta")
        eager = torch.compiler.set_stance("force_eager")
        with eager, FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(network, meta, (image, level), condition)
    except Exception:  # a network of the user's may do anything with what has no values
        return None
    return float(counter.get_total_flops())
