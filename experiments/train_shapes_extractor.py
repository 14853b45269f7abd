"""Train the embedded feature extractor and write its weights into the package.

    python experiments/train_shapes_extractor.py

Ten minutes on one CPU core. It is run once: every number measured with the extractor carries the
digest of the file that this script writes.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from diffusion_pl.data.scenes import GROUNDS, latents
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.images import Images
from diffusion_pl.metrics import shapes
from diffusion_pl.metrics.shapes import SIDE, Shapes, ShapesNetwork, resize

# Strongest noise, standard deviation on the scale [-1, 1]: 38 of 255 levels.
NOISE = 0.3


def examples(count: int, seed: int) -> tuple[Images, Tensor, Tensor]:
    """The images of a seed, what the network sees of them (B, 3, 32, 32), and labels (B,)."""
    images = Synthetic(count, SIDE, seed).open()
    assert images.labels is not None
    return images, resize(images.read(torch.arange(count))), images.labels


def mirror_and_tint(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and jitter contrast and colours: what leaves the quality alone.

    Args:
        x: (B, 3, H, W) in [-1, 1].
        generator: the only source of randomness.

    Returns:
        (B, 3, H, W), somewhat beyond [-1, 1] at times.
    """
    draw = torch.rand(len(x), 5, 1, 1, generator=generator)
    x = torch.where(draw[:, :1] < 0.5, x.flip(3), x)
    middle = x.mean(dim=(2, 3), keepdim=True)
    return middle + (x - middle) * (0.75 + 0.4 * draw[:, 1:2]) + 0.3 * (draw[:, 2:] - 0.5)


def spoil(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blur half of the images and add noise to half of them, independently.

    Args:
        x: (B, 3, H, W).
        generator: the only source of randomness.

    Returns:
        (B, 3, H, W) in [-1, 1], and how much each was spoilt, (B, 2) in [0, 1]. The square root of
        the strength, so that a trace of noise is told from none.
    """
    strength = (2 * torch.rand(len(x), 2, generator=generator) - 1).clamp_min(0).square()
    blur, noise = strength[:, :, None, None, None].unbind(1)
    binomial = torch.tensor([1.0, 2.0, 1.0])
    kernel = (binomial[:, None] * binomial / 16).expand(3, 1, 3, 3)
    blurred = functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    x = torch.lerp(x, blurred, blur)
    x = x + NOISE * noise * torch.randn(x.shape, generator=generator)
    return x.clamp(-1, 1), strength.sqrt()


def accuracy(network: ShapesNetwork, x: Tensor, label: Tensor) -> float:
    """Share of images whose label has the largest logit, in evaluation mode."""
    network.eval()
    with torch.no_grad():
        hits = [
            (network(part).logits.argmax(dim=1) == truth).sum().item()
            for part, truth in zip(x.split(500), label.split(500), strict=True)
        ]
    network.train()
    return sum(hits) / len(x)


def train(options: argparse.Namespace) -> tuple[ShapesNetwork, dict[str, str]]:
    """Train on one seed's images and measure on another's.

    The labels alone would teach the features to overlook noise and blur, and a distance with them.
    So two heads that are thrown away ask them also for the kind of ground and the spoilage.

    Returns:
        The network and what is worth knowing of its making.
    """
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    data, x, label = examples(options.count, options.seed)
    _, x_held_out, label_held_out = examples(4000, options.seed + 1)
    ground = torch.from_numpy(latents(options.seed, 0, options.count).ground)

    network = ShapesNetwork(data.classes)
    ground_head = nn.Linear(Shapes.dimension, len(GROUNDS))
    spoilage_head = nn.Linear(Shapes.dimension, 2)
    parts = nn.ModuleList([network, ground_head, spoilage_head])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=options.lr, weight_decay=1e-2)
    steps = options.count // options.batch_size  # an epoch's; a last, smaller batch is left out
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / (options.epochs * steps)))
    )
    for epoch in range(options.epochs):
        started = time.monotonic()
        order = torch.randperm(len(x), generator=generator)
        for rows in order.split(options.batch_size)[:steps]:
            seen, spoilage = spoil(mirror_and_tint(x[rows], generator), generator)
            features = network(seen)
            error = functional.mse_loss(spoilage_head(features.pooled), spoilage)
            loss = (
                functional.cross_entropy(features.logits, label[rows], label_smoothing=0.05)
                + functional.cross_entropy(ground_head(features.pooled), ground[rows])
                + 4 * error
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            cosine.step()
        held = accuracy(network, x_held_out, label_held_out)
        sys.stderr.write(
            f"epoch {epoch + 1}/{options.epochs}  loss {loss.item():.3f}  spoilage error "
            f"{error.item() ** 0.5:.3f}  held-out accuracy {held:.4f}  "
            f"{time.monotonic() - started:.0f} s\n"
        )
    return network, {
        "script": "experiments/train_shapes_extractor.py",
        "seed": str(options.seed),
        "images": str(options.count),
        "epochs": str(options.epochs),
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "held_out_accuracy": f"{held:.4f}",
    }


def main() -> None:
    """Train, write the weights, and print one JSON object."""
    parser = argparse.ArgumentParser(description="Train the embedded feature extractor.")
    parser.add_argument("--count", type=int, default=24_000, help="training images")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128, help="images per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=shapes.WEIGHTS)
    options = parser.parse_args()

    network, made = train(options)
    content = save(network.state_dict(), metadata=made)
    aside = options.output.with_suffix(f".{os.getpid()}.part")
    aside.write_bytes(content)
    os.replace(aside, options.output)
    digest = hashlib.sha256(content).hexdigest()[:12]
    result = {"output": options.output.name, "digest": digest, **made}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
