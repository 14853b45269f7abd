"""Images drawn from a trained denoiser: image i's noise and label come from (seed, i) alone.

So they depend neither on the batch size nor on the number of devices. Bytes are what is measured,
as they would be saved.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusion_pl.diffusion.guidance import (
    EVERYWHERE,
    Guide,
    check_guidance,
    check_interval,
    guided,
)
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.recording import Counted
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.images import to_bytes
from diffusion_pl.seeds import seed_of


class Sampler(Protocol):
    """Noise to images; see samplers/."""

    def __call__(
        self, denoise: Denoise, noise: Tensor, randn_like: Callable[[Tensor], Tensor]
    ) -> Tensor: ...


@dataclass(frozen=True)
class ImageGenerator:
    """How images are drawn from a trained denoiser.

    Args:
        denoiser: D.
        sampler: the algorithm with its levels.
        shape: (C, H, W) of an image.
        classes: classes of a conditional model, 0 for none.
        label_dropout: share of the labels that were hidden from it in training; with 0 it is not
            known without its label, and guides nothing.
        seed: of noise and labels.
        guidance: weight of the guidance, 1 for none.
        guidance_interval: noise levels (low, high] that are guided.
        guide: the weaker model of autoguidance; None for the model itself without its label.
        label: the class of every image, or None for a class drawn for each.
        precision: torch dtype the network computes in under autocast, None for float32.
        origin: what numbers say of the weights, such as {"weights": "ema"}.

    Raises:
        UserError: a label that is not one of the model's classes; guidance without a guide, and
            without classes or label dropout; a guide of other images or classes.
    """

    denoiser: Denoiser
    sampler: Sampler
    shape: tuple[int, int, int]
    classes: int = 0
    label_dropout: float = 0.0
    seed: int = 0
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = EVERYWHERE
    guide: Guide | None = None
    label: int | None = None
    precision: torch.dtype | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.label is not None and not 0 <= self.label < self.classes:
            known = f"0 to {self.classes - 1}" if self.classes else "none: it is unconditional"
            raise UserError(f"label {self.label} is not one of the model's classes ({known})")
        check_interval(self.guidance_interval)
        if self.guide is not None:
            self.guide.check(self.shape, self.classes, self.guidance)
        check_guidance(
            self.guidance,
            classes=self.classes,
            label_dropout=self.label_dropout,
            guide=self.guide,
        )

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """The class of each image, int64 (n,), uniform from (seed, i); None without classes."""
        if not self.classes:
            return None
        if self.label is not None:
            return torch.full((len(indices),), self.label)
        return torch.tensor([seed_of(self.seed, "label", i) % self.classes for i in indices])

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        return next(self.denoiser.parameters()).device

    @torch.inference_mode()
    def images(self, indices: Sequence[int]) -> tuple[Tensor, int]:
        """Draw the images with these indices.

        Returns:
            uint8 (n, C, H, W) on the denoiser's device, and the network's evaluations per image.
        """
        counted = Counted(self.denoiser)
        guide = None if self.guide is None else Counted(self.guide.denoiser.to(self.device))
        with self._autocast():
            drawn = self._draw(counted, guide, indices)
        if not torch.isfinite(drawn).all():
            raise UserError("the sampler gave images that are not finite; the weights are unfit")
        seen = counted.seen + (guide.seen if guide is not None else 0)
        return to_bytes(drawn), seen // len(indices)

    @torch.inference_mode()
    def calls(self) -> Counter[int]:
        """How often an image is seen, by the side at which the network sees it.

        The network is evaluated once at every side, not once a step.

        Raises:
            UserError: the network does not answer what the sampler asks of it.
        """
        counted: Counter[int] = Counter()
        guide = None
        if self.guide is not None:
            guide = _rehearsed(self.guide.denoiser.to(self.device), counted)
        with self._autocast():
            self._draw(_rehearsed(self.denoiser, counted), guide, [0])
        return counted

    def about(self) -> dict[str, Any]:
        """What a number says of how its images were drawn."""
        interval = None if self.guidance_interval == EVERYWHERE else list(self.guidance_interval)
        return {
            **self.origin,
            "sampler": described(self.sampler),
            "seed": self.seed,
            "guidance": self.guidance,
            "guidance_interval": interval,
            "guide": None if self.guide is None else self.guide.name,
            "label": self.label,
            "precision": "fp32" if self.precision is None else described(self.precision),
        }

    def _autocast(self) -> torch.autocast:
        """The precision in which the network computes."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)

    def _draw(self, denoise: Denoise, guide: Denoise | None, indices: Sequence[int]) -> Tensor:
        device = self.device
        # The first noise is drawn on the CPU, so that any hardware starts from the same state.
        source = ImageNoise(self.seed, indices, "latent")
        noise = source(torch.empty(len(indices), *self.shape)).to(device)
        labels = self.labels(indices)
        denoise = guided(
            denoise,
            label=None if labels is None else labels.to(device),
            weight=self.guidance,
            interval=self.guidance_interval,
            guide=guide,
        )
        return self.sampler(denoise, noise, ImageNoise(self.seed, indices, "sampler", device))


class Rehearsal(nn.Module):
    """A network that is asked once at each size of image; every later answer is zeros like it.

    Around it stands the denoiser itself, so whatever a sampler may ask of a denoiser it may ask of
    one whose network is only rehearsed.

    Args:
        network: the raw F.
        counted: grows by the images of every call, under their side in pixels.
    """

    def __init__(self, network: nn.Module, counted: Counter[int]) -> None:
        super().__init__()
        self.network = network
        self.counted = counted
        self.answered: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor | None) -> Tensor:
        """(B, C, H, W), (B,) -> zeros, shaped as the network's answer."""
        self.counted[x.shape[-1]] += len(x)
        size = x.shape[1:]
        if size not in self.answered:
            # `forward` itself: a compiled network would be compiled for this batch.
            self.answered[size] = self.network.forward(x, c_noise, **condition)
        like = self.answered[size]
        return like.new_zeros(len(x), *like.shape[1:])


def _rehearsed(denoiser: Denoiser, counted: Counter[int]) -> Denoiser:
    return Denoiser(Rehearsal(denoiser.network, counted), denoiser.preconditioning)


def batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Cut a sequence into pieces of at most `size`."""
    return (indices[first : first + size] for first in range(0, len(indices), size))
