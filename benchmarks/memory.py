"""How much memory a training step takes, by network, without a device: shapes alone are run.

Tensors are fake (they have shapes and no contents), so networks of billions of parameters and
images of 512 pixels fit anywhere. Every storage is counted from the operation that makes it to its
end, over a forward and a backward pass under bf16 autocast. What is counted is what torch asks for:
an allocator's fragments, kernels' work space and the device's context come on top.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import record
from diffusion_pl import config

# So many that the images, and not the gradients, decide when the peak is; what one takes is the
# difference over the number of them.
BATCHES = (32, 64)

EXPERIMENTS = {
    "DDPM++": "cifar10_edm",
    "ADM": "imagenet64_edm",
    "SimpleUNet": "imagenet512_simple_unet",
    "UViT": "imagenet512_simple_uvit",
}


class Living(TorchDispatchMode):
    """Bytes of the storages that operations within it have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        results = operation(*arguments, **(keywords or {}))
        # What an operation changes in place or looks at was there before it.
        for given in tree_leaves((arguments, keywords or {})):
            if isinstance(given, Tensor):
                self._note(given.untyped_storage(), 0)
        for made in tree_leaves(results):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                self._note(storage, storage.nbytes())
        return results

    def _note(self, storage: Any, size: int) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        weakref.finalize(storage, self._gone, size)
        self.bytes += size
        self.most = max(self.most, self.bytes)

    def _gone(self, size: int) -> None:
        self.bytes -= size


def step(network: nn.Module, batch: int, classes: int, side: int) -> tuple[int, int]:
    """Bytes of a training step beside the parameters: before the backward pass, and at the peak."""
    image = torch.randn(batch, 3, side, side)
    level = torch.rand(batch)
    condition = {"label": torch.zeros(batch, dtype=torch.int64)} if classes else {}
    with Living() as living:
        with torch.autocast("cpu", torch.bfloat16):
            output = network(image, level, **condition)
            loss = output.float().square().mean()
        kept = living.bytes
        loss.backward()
    network.zero_grad()
    return kept, living.most


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
