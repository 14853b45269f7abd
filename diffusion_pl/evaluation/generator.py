"""Images sampled from a trained denoiser: image i's noise and condition come from (seed, i) alone.

So they depend neither on the batch size nor on the number of devices. What is measured is uint8, as
images are saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from diffusion_pl.diffusion.classifier_free import Weight, check_guidance, removable
from diffusion_pl.diffusion.conditions import received, sizes
from diffusion_pl.diffusion.guidance import EVERYWHERE, Guide, by_image, check_interval, guided
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.diffusion.random import ImageNoise
from diffusion_pl.diffusion.recording import Counted
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.evaluation.sources import Source
from diffusion_pl.images import to_bytes

ROUNDING = 0.05  # of token states, of order 1, between machines


class Sampler(Protocol):
    """Noise to images; see samplers/."""

    def __call__(
        self, denoise: Denoise, noise: Tensor, randn_like: Callable[[Tensor], Tensor]
    ) -> Tensor: ...


@dataclass(frozen=True)
class ImageGenerator:
    """Samples images from a trained denoiser.

    Args:
        denoiser: D.
        sampler: the algorithm with its noise levels.
        shape: (C, H, W) of an image.
        sources: of the conditions that the model takes; of a kind without one nothing is asked.
        dropout: share of the images that each kind was hidden from in training; at 0 the model
            cannot be evaluated without it, so it cannot guide itself.
        guidance: weight, 1 for none; or a weight for each kind of condition.
        guidance_interval: noise levels (low, high] that are guided.
        guide: the weaker model of autoguidance; None for the model itself without its conditions.
        precision: autocast dtype, None for float32.
        origin: recorded with every number, such as {"weights": "ema"}.

    Raises:
        UserError: guidance without a guide, where the model takes no condition or was trained
            without dropout; the guide has another shape or takes other conditions.
    """

    denoiser: Denoiser
    sampler: Sampler
    shape: tuple[int, int, int]
    sources: Sequence[Source] = ()
    dropout: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    guidance: Weight = 1.0
    guidance_interval: tuple[float, float] = EVERYWHERE
    guide: Guide | None = None
    precision: torch.dtype | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_interval(self.guidance_interval)
        if self.guide is not None:
            self.guide.check(self.shape, self.taken, self.guidance)
            _check_same_text(self.guide, self.denoiser.network)
        else:
            check_guidance(self.guidance, taken=self.taken, dropout=self.dropout)

    @property
    def taken(self) -> dict[str, int]:
        """How much of each kind of condition the model takes, see `conditions.sizes`."""
        return sizes(self.denoiser.network)

    def condition(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What each image is to be, a row an image; on the CPU."""
        joined: dict[str, Tensor] = {}
        for source in self.sources:
            joined |= source.condition(self.seed, indices)
        return received(self.denoiser.network, joined)

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """The class of each image, int64 (n,); None without classes."""
        return self.condition(indices).get("label")

    def captions(self, indices: Sequence[int]) -> tuple[str, ...] | None:
        """The words that each image was asked for; None where the model takes no text."""
        found = (source.captions(self.seed, indices) for source in self.sources)
        return next((words for words in found if words is not None), None)

    def words(self, indices: Sequence[int], class_names: Sequence[str]) -> list[str] | None:
        """What each image was asked to be: its prompt, else its class; None for neither.

        Args:
            indices: of the images.
            class_names: in order; () where there are none.
        """
        if (found := self.captions(indices)) is not None:
            return list(found)
        labels = self.labels(indices)
        if labels is None:
            return None
        return [class_names[i] if class_names else f"class {i}" for i in labels.tolist()]

    def beside_sources(self, indices: Sequence[int], images: Tensor) -> Tensor:
        """Images for a grid: to the left of each the image that it was made from, if any.

        Args:
            indices: of the images.
            images: uint8 (n, C, H, W).

        Returns:
            uint8 (n, C, H, W), or (n, C, H, 2 W); unknown pixels are mid-grey.
        """
        condition = self.condition(indices)
        if "source" not in condition:
            return images
        known = torch.where(condition["source_mask"], condition["source"], 0)
        return torch.cat([to_bytes(known), images.cpu()], dim=3)

    @property
    def device(self) -> torch.device:
        """The denoiser's device."""
        return next(self.denoiser.parameters()).device

    def images(self, indices: Sequence[int]) -> tuple[Tensor, int]:
        """Sample the images with these indices.

        Returns:
            uint8 (n, C, H, W) on the denoiser's device, and network evaluations per image.

        Raises:
            UserError: an image is not finite.
        """
        counted = Counted(self.denoiser)
        guide = None if self.guide is None else Counted(self.guide.denoiser.to(self.device))
        found = self._sample(indices, counted, guide)
        check_finite(found)
        seen = counted.seen + (guide.seen if guide is not None else 0)
        return to_bytes(found), seen // len(indices)

    def calls(self) -> Counter[int]:
        """Network evaluations of one image, by the width in pixels of the network's input.

        The network runs once at each size, not at every step.
        """
        counted: Counter[int] = Counter()
        guide = None
        if self.guide is not None:
            guide = _rehearsed(self.guide.denoiser.to(self.device), counted)
        self._sample([0], _rehearsed(self.denoiser, counted), guide)
        return counted

    def asked(self) -> dict[str, Any]:
        """What the sources say of the conditions."""
        return {key: value for source in self.sources for key, value in source.about().items()}

    def about(self) -> dict[str, Any]:
        """How the images were sampled, as recorded with every number."""
        interval = None if self.guidance_interval == EVERYWHERE else list(self.guidance_interval)
        weight = self.guidance
        return {
            **self.origin,
            "sampler": described(self.sampler),
            "seed": self.seed,
            "guidance": dict(weight) if isinstance(weight, Mapping) else weight,
            "guidance_interval": interval,
            "guide": None if self.guide is None else self.guide.name,
            **({"label": None} | self.asked()),
            "precision": "fp32" if self.precision is None else described(self.precision),
        }

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Compute in the network's precision, without gradients."""
        autocast = torch.autocast(
            self.device.type, self.precision, enabled=self.precision is not None
        )
        with torch.inference_mode(), autocast:
            yield

    def noise(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """Standard normal start of each image, float32 (n, C, H, W), on the denoiser's device.

        Args:
            indices: of the images.
            size: height and width; those of the images when not given.
        """
        shape = self.shape if size is None else (self.shape[0], *size)
        # From the CPU, so that any hardware starts from the same noise.
        source = ImageNoise(self.seed, indices, "latent")
        return source(torch.empty(len(indices), *shape)).to(self.device)

    def step_noise(self, indices: Sequence[int]) -> ImageNoise:
        """What a stochastic sampler adds to each image."""
        return ImageNoise(self.seed, indices, "sampler", self.device)

    def guided(
        self,
        condition: Mapping[str, Tensor],
        *,
        indices: Sequence[int] | None = None,
        denoise: Denoise | None = None,
        guide: Denoise | None = None,
    ) -> Denoise:
        """The denoiser with a condition and guidance applied.

        Args:
            condition: a row an image; {} for an unconditional model.
            indices: of the images, for a guide that draws; their places in the batch when None.
            denoise: stands in for the denoiser, such as one that counts its evaluations.
            guide: the same for the guide.
        """
        if guide is None and self.guide is not None:
            guide = self.guide.denoiser.to(self.device)
        if self.guide is not None and self.guide.routed:
            assert guide is not None
            guide = by_image(guide, self.seed, indices)
        return guided(
            self.denoiser if denoise is None else denoise,
            condition={key: value.to(self.device) for key, value in condition.items()},
            weight=self.guidance,
            kinds=removable(self.taken, self.dropout),
            interval=self.guidance_interval,
            guide=guide,
        )

    def _sample(self, indices: Sequence[int], denoise: Denoise, guide: Denoise | None) -> Tensor:
        with self.inference():
            condition = self.condition(indices)
            denoise = self.guided(condition, indices=indices, denoise=denoise, guide=guide)
            return self.sampler(denoise, self.noise(indices), self.step_noise(indices))


def _check_same_text(guide: Guide, network: Any) -> None:
    """Refuse a guide that reads the captions of another encoder, by its encoding of ""."""
    null = getattr(network, "null_text", None)
    other = getattr(guide.denoiser.network, "null_text", None)
    if null is None or other is None or not network.null_text_known:
        return
    pairs = zip(null.cpu(), cast(Tensor, other).cpu(), strict=False)
    if not all(torch.allclose(own, its, atol=ROUNDING) for own, its in pairs):
        raise UserError(
            f"{guide.name}: is no guide for this model: its captions were encoded by another "
            "encoder"
        )


def check_finite(images: Tensor) -> None:
    """Raise UserError unless all values of sampled images are finite."""
    if not torch.isfinite(images).all():
        raise UserError("the sampler gave images that are not finite; the weights are unfit")


class Rehearsal(nn.Module):
    """Counts the calls of a network, which it evaluates once at each size and then replaces by 0.

    Args:
        network: the raw F.
        counted: images of all calls by their width in pixels; updated in place.
    """

    def __init__(self, network: nn.Module, counted: Counter[int]) -> None:
        super().__init__()
        self.network = network
        self.counted = counted
        self.outputs: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor | None) -> Tensor:
        """(B, C, H, W), (B,) -> zeros, shaped as the network's output."""
        self.counted[x.shape[-1]] += len(x)
        size = x.shape[1:]
        if size not in self.outputs:
            # Not `network(...)`: a compiled network would be compiled again for this batch size.
            self.outputs[size] = self.network.forward(x, c_noise, **condition)
        like = self.outputs[size]
        return like.new_zeros(len(x), *like.shape[1:])


def _rehearsed(denoiser: Denoiser, counted: Counter[int]) -> Denoiser:
    return Denoiser(Rehearsal(denoiser.network, counted), denoiser.preconditioning)


def batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Cut a sequence into pieces of at most `size`."""
    return (indices[first : first + size] for first in range(0, len(indices), size))
