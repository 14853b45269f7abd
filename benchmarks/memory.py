"""How much memory a training step takes, by network, without a device: shapes alone are run.

Tensors are fake (they have shapes and no contents), so networks of billions of parameters and
images of 512 pixels fit anywhere. Every storage is counted from the operation that makes it to its
end, over a forward and a backward pass under bf16 autocast. What is counted is what torch asks for:
an allocator's fragments, kernels' work space and the device's context come on top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import record
from diffusion_pl import config
from diffusion_pl.training.meter import Meter

# So many that the images, and not the gradients, decide when the peak is; what one takes is the
# difference over the number of them.
BATCHES = (32, 64)

EXPERIMENTS = {
    "DDPM++": "cifar10_edm",
    "ADM": "imagenet64_edm",
    "SimpleUNet": "imagenet512_simple_unet",
    "UViT": "imagenet512_simple_uvit",
}


def step(network: nn.Module, batch: int, classes: int, side: int) -> tuple[int, int]:
    """Bytes of a training step beside the parameters: before the backward pass, and at the peak."""
    image = torch.randn(batch, 3, side, side)
    level = torch.rand(batch)
    condition = {"label": torch.zeros(batch, dtype=torch.int64)} if classes else {}
    with Meter() as meter:
        with torch.autocast("cpu", torch.bfloat16):
            output = network(image, level, **condition)
            loss = output.float().square().mean()
        kept = meter.fixed
        loss.backward()
    network.zero_grad()
    return kept, max(meter.curve.values())


def figures(name: str, activation_checkpointing: bool) -> dict[str, Any]:
    """What an image takes of a network, and what any number of them does."""
    experiment = config.load(
        name, [f"network.activation_checkpointing={str(activation_checkpointing).lower()}"]
    )
    side = experiment.get("network.resolution")
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = config.build(experiment, "network")
        few, many = (step(network, batch, network.classes, side) for batch in BATCHES)
        with FlopCounterMode(display=False) as counter:
            step(network, 1, network.classes, side)
    more = BATCHES[1] - BATCHES[0]
    kept, peak = ((after - before) / more for before, after in zip(few, many, strict=True))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "resolution": side,
        "TFLOP an image": round(counter.get_total_flops() / 1e12, 3),
        "an image, MiB kept": round(kept / 2**20, 1),
        "an image, MiB at the peak": round(peak / 2**20, 1),
        "without images at the peak, MiB": round((many[1] - peak * BATCHES[1]) / 2**20),
    }


def main() -> None:
    """Count and record."""
    found = {
        name: {
            "kept": figures(experiment, activation_checkpointing=False),
            "recomputed": figures(experiment, activation_checkpointing=True),
        }
        for name, experiment in EXPERIMENTS.items()
    }
    record("memory", found)


if __name__ == "__main__":
    main()
