"""Images per second of the published networks, beside diffusers' UNet2DModel at DDPM's setting.

JiT-B/16 stands beside the same network in plain modules (plain_jit.py, the same weights) and beside
a U-ViT of as many FLOPs, at 64 and 256 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import interleaved, median, record
from benchmarks.plain_jit import PlainJiT
from diffusion_pl.networks.ddpm_unet import DDPMUNet
from diffusion_pl.networks.jit import JiT
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.networks.uvit import UViT
from diffusion_pl.training.settings import resolve_precision

CASES = ("fp32", "bf16")


def diffusers_unet() -> UNet2DModel:
    """The network of google/ddpm-cifar10-32: 35,746,307 parameters."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        norm_eps=1e-6,
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DDPM++ (ours)": partial(SongUNet, 32, augment=9, dropout=0.13),
    "DDPM U-Net (ours)": partial(DDPMUNet, 32),
    "DDPM U-Net (diffusers)": diffusers_unet,
}


# JiT-B/16 (Li & He 2025, Table 9).
B16: dict[str, Any] = {
    "classes": 1000, "patch_size": 16, "width": 768, "depth": 12, "heads": 12, "bottleneck": 128,
    "class_tokens": 32, "class_tokens_from": 4,
}  # fmt: skip
TRANSFORMERS: dict[str, Callable[[int], nn.Module]] = {
    "JiT-B/16 (ours)": lambda side: JiT(side, **B16),
    "JiT-B/16 (plain modules)": lambda side: PlainJiT(side, **B16),
    # 24.8 GMACs at 256 pixels, JiT-B/16 25.2.
    "U-ViT (ours)": lambda side: UViT(
        side, classes=1000, model_channels=64, channel_mult=(1, 2, 12), blocks=(1, 1), halvings=2,
        transformers=12, heads=12, dropout=0.0,
    ),
}  # fmt: skip


def call(network: nn.Module, image: Tensor, level: Tensor) -> Tensor:
    """The network's output, whatever its library wraps it in."""
    output = network(image, level)
    return output if isinstance(output, Tensor) else output.sample


def run(
    networks: Mapping[str, Callable[[], nn.Module]],
    side: int,
    batch: int,
    device: str,
    repetitions: int,
    precisions: tuple[str, ...],
) -> dict[str, Any]:
    """Forward and training step of every network in every precision, taking turns."""
    image = torch.randn(batch, 3, side, side, device=device)
    image = image.to(memory_format=torch.channels_last)
    level = torch.rand(batch, device=device)
    forward: dict[str, Callable[[], object]] = {}
    train: dict[str, Callable[[], object]] = {}
    figures: dict[str, Any] = {}
    for name, make in networks.items():
        network = make().to(device)
        ours = "ours" in name
        if ours:  # the peer as its users run it
            network = network.to(memory_format=torch.channels_last)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(network, image[:1], level[:1])
        figures[name] = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "GFLOP per image": round(counter.get_total_flops() / 1e9, 2),
        }
        # diffusers' U-Net as its users train it; the stand-in differs in its modules alone.
        fused = ours or isinstance(network, PlainJiT)
        optimizer = torch.optim.Adam(network.parameters(), fused=fused)
        for precision in precisions:
            wrap = partial(torch.autocast, device, torch.bfloat16, enabled=precision == "bf16")
            forward[f"{name}/{precision}"] = partial(_forward, network, image, level, wrap)
            train[f"{name}/{precision}"] = partial(_train, network, image, level, wrap, optimizer)
    for kind, cases in (("forward", forward), ("training", train)):
        for key, seconds in interleaved(cases, repetitions).items():
            name, _, precision = key.partition("/")
            figures[name][f"{kind} images/s {precision}"] = round(batch / median(seconds), 2)
    return figures


def _forward(network: nn.Module, image: Tensor, level: Tensor, wrap: Any) -> None:
    network.eval()
    with torch.inference_mode(), wrap():
        call(network, image, level)
    _finish(image)


def _train(
    network: nn.Module, image: Tensor, level: Tensor, wrap: Any, optimizer: torch.optim.Optimizer
) -> None:
    network.train()
    with wrap():
        loss = call(network, image, level).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    _finish(image)


def _finish(image: Tensor) -> None:
    if image.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Measure and record."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--repetitions", type=int, default=5)
    options.add_argument("--precisions", nargs="+", choices=CASES)
    chosen = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Without matrix units bf16 is emulated, 40 times slower than fp32: nobody would train so.
    usual = CASES if resolve_precision("auto", device) == "bf16" else ("fp32",)
    precisions = tuple(chosen.precisions or usual)
    how = device, chosen.repetitions, precisions
    figures = run(NETWORKS, 32, chosen.batch, *how)
    for side in (64, 256):
        made = {name: partial(make, side) for name, make in TRANSFORMERS.items()}
        found = run(made, side, 2, *how)
        figures |= {f"{name} at {side}, batch 2": each for name, each in found.items()}
    record("networks", {"batch": chosen.batch, "device": device, **figures})


if __name__ == "__main__":
    main()
