"""A denoiser as a program of torch.export: one .pt2 file, run with torch alone.

`torch.export.load(path).module()(x, sigma, label=...)` is D(x; sigma) of images of one size, in
batches of any size. The graph is that of evaluation in float32.
"""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from diffusion_pl.diffusion.conditions import sizes
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import aside

SUFFIX = ".pt2"
ABOUT = "diffusion_pl.json"  # in the archive: what is known of the weights
TRACED = 2  # images of the batch that the graph is traced with
BATCHES = (1, 3, 5)  # on which the file is compared with the denoiser
LEVELS = 5  # noise levels, from the lowest trained one to the highest
TOLERANCE = 1e-4  # of |D - D'| / (1 + sigma): D is about 1, the network's share at most sigma


class Called(nn.Module):
    """A denoiser with its conditions by name: torch 2.14 writes wrong checks of `**condition`.

    Args:
        denoiser: D.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        label: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """D(x; sigma), shapes as of `inputs`."""
        given = {"label": label, "text": text, "text_mask": text_mask}
        given |= {"source": source, "source_mask": source_mask}
        condition = {key: value for key, value in given.items() if value is not None}
        found: Tensor = self.denoiser(x, sigma, **condition)
        return found


def write(
    path: Path,
    denoiser: Denoiser,
    shape: tuple[int, int, int],
    sigma_range: tuple[float, float],
    about: Mapping[str, Any],
) -> float:
    """Export a denoiser, read the file back and compare the two; it is written if they agree.

    Args:
        path: the file, ending in .pt2; written whole or not at all.
        denoiser: D on the CPU, in evaluation mode.
        shape: (C, H, W) of an image.
        sigma_range: the lowest and the highest noise level to compare at.
        about: kept in the file as JSON, beside the graph.

    Returns:
        The largest |D - D'| / (1 + sigma) over the compared batches, D' being the file's.

    Raises:
        UserError: another suffix, a network that torch.export cannot trace, a file whose program
            differs from the denoiser, or a folder that cannot be written.
    """
    if path.suffix != SUFFIX:
        raise UserError(
            f"{path}: a program of torch.export ends in {SUFFIX}; name {path.with_suffix(SUFFIX)}"
        )
    program = traced(denoiser, shape, sigma_range)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={ABOUT: json.dumps(about)})
    with aside(path) as temporary:
        temporary.write_bytes(content.getbuffer())
        with temporary.open("rb") as file:
            reloaded = torch.export.load(io.BytesIO(file.read())).module()
        return compare(denoiser, reloaded, shape, sigma_range, path)


def traced(
    denoiser: Denoiser, shape: tuple[int, int, int], sigma_range: tuple[float, float]
) -> ExportedProgram:
    """The denoiser as a graph, its batch size left open.

    Args:
        denoiser, shape, sigma_range: as for `write`.

    Raises:
        UserError: torch.export cannot trace the network, or it fixes the batch size.
    """
    x, sigma, condition = inputs(denoiser, shape, sigma_range, TRACED)
    batch = {0: Dim("batch", min=1)}
    dynamic = {"x": batch, "sigma": batch, **dict.fromkeys(condition, batch)}
    # Weights that are laid out otherwise, torch.export.save takes for slices of others.
    called = Called(copy.deepcopy(denoiser).to(memory_format=torch.contiguous_format)).eval()
    try:
        return torch.export.export(
            called, (x, sigma), condition, dynamic_shapes=dynamic, strict=False
        )
    except Exception as error:  # of many classes, of torch's tracing or of the network's code
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"torch.export cannot trace {type(denoiser.network).__name__} ({reason}); export its "
            "weights: --format safetensors"
        ) from error


def inputs(
    denoiser: Denoiser,
    shape: tuple[int, int, int],
    sigma_range: tuple[float, float],
    count: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Inputs of a denoiser: noisy images, a level of its own for each, all conditions it takes.

    Args:
        denoiser, shape, sigma_range: as for `write`.
        count: images.

    Returns:
        x float32 (count, C, H, W), sigma float32 (count,), and `label` int64 (count,), `text`
        float32 (count, L, E), `text_mask` bool (count, L), `source` float32 (count, c, H, W),
        `source_mask` bool (count, 1, H, W), those that the network takes.
    """
    generator = torch.Generator().manual_seed(count)
    network: Any = denoiser.network
    taken = sizes(network)
    low, high = sigma_range
    places = torch.linspace(0.0, 1.0, LEVELS)[torch.arange(count) * 2 % LEVELS]
    sigma = torch.exp(math.log(low) + places * (math.log(high) - math.log(low)))
    sigma = sigma.clamp(low, high)
    noise = torch.randn(count, *shape, generator=generator)
    x = torch.rand(count, *shape, generator=generator) * 2 - 1 + sigma[:, None, None, None] * noise
    condition: dict[str, Tensor] = {}
    if classes := taken["label"]:
        condition["label"] = torch.arange(count) % (classes + 1) - 1  # -1: none
    if width := taken["text"]:
        length = network.text_length
        condition["text"] = torch.randn(count, length, width, generator=generator)
        condition["text_mask"] = torch.arange(length)[None] <= torch.arange(count)[:, None]
    if channels := taken["image"]:
        sides = shape[1:]
        condition["source"] = torch.rand(count, channels, *sides, generator=generator) * 2 - 1
        condition["source_mask"] = torch.rand(count, 1, *sides, generator=generator) < 0.5
    return x, sigma, condition


@torch.no_grad()
def compare(
    denoiser: Denoiser,
    other: nn.Module,
    shape: tuple[int, int, int],
    sigma_range: tuple[float, float],
    path: Path,
) -> float:
    """The largest |D - D'| / (1 + sigma) of two denoisers, on batches of BATCHES images.

    Args:
        denoiser: D.
        other: D', called alike.
        shape, sigma_range: as for `write`.
        path: for the message.

    Raises:
        UserError: it is above TOLERANCE or not a number, or D' does not take a batch.
    """
    most = 0.0
    for count in BATCHES:
        x, sigma, condition = inputs(denoiser, shape, sigma_range, count)
        try:
            found = other(x, sigma, **condition)
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path}: takes no batch of {count}, so it is not kept ({reason})"
            ) from error
        scale = 1 + sigma[:, None, None, None]
        apart = float(((found - denoiser(x, sigma, **condition)).abs() / scale).max())
        if not apart <= TOLERANCE:
            raise UserError(
                f"{path}: the exported program differs from the denoiser by {apart:.2g} (1 + "
                f"sigma), above {TOLERANCE:g}, so it is not kept; export the weights: --format "
                "safetensors"
            )
        most = max(most, apart)
    return most
