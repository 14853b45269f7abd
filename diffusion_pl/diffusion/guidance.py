"""Guidance and clipping: functions that turn one denoiser into another, denoise -> denoise.

Keywords that are not theirs pass through to the denoiser below. What a network says of the variance
is never extrapolated: it stays the conditional model's.

| guidance | formula | source |
|---|---|---|
| classifier-free | D_none + w (D_label - D_none) | Ho & Salimans 2022, arXiv:2207.12598, Eq. 6 |
| interval | the above at sigma in (low, high], else D_label | Kynkaanniemi 2024, arXiv:2404.07724 |
| autoguidance | D_bad + w (D_main - D_bad) | Karras 2024, arXiv:2406.02507 |
| sparse | D_routed + w (D - D_routed) | Krause 2026, arXiv:2601.01608 |
| dynamic threshold | clip to s, divide by s | Saharia 2022, arXiv:2205.11487, 2.3 |
| clamped velocity | (1 - r) t x + r D, r = min(1, (1 - t) / t_eps) | Li & He 2025, Alg. 2 |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diffusion_pl.diffusion.levels import per_image
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.preconditioning import Denoiser
from diffusion_pl.diffusion.random import generator
from diffusion_pl.errors import UserError
from diffusion_pl.seeds import seed_of

EVERYWHERE = (0.0, math.inf)


@dataclass(frozen=True)
class Guide:
    """The weaker model of autoguidance.

    Args:
        name: where it comes from, for the record of what was measured.
        denoiser: D_bad, of the same images and classes as the model it guides.
        routed: whether it takes what `by_image` hands it.
    """

    name: str
    denoiser: Denoiser
    routed: bool = False

    def check(self, shape: tuple[int, int, int], classes: int, weight: float) -> None:
        """Refuse a guide that does not fit the model it is to guide, or has nothing to do.

        Args:
            shape: (C, H, W) of the model's images.
            classes: of the model, 0 for none.
            weight: of the guidance.

        Raises:
            UserError: names what differs.
        """
        network: Any = self.denoiser.network
        if weight == 1:
            raise UserError(f"{self.name}: a guide does nothing at guidance 1; give a weight")
        if (network.channels, network.classes) != (shape[0], classes):
            raise UserError(
                f"{self.name}: is no guide for this model: it has {network.channels} channels and "
                f"{network.classes} classes, the model {shape[0]} and {classes}"
            )
        try:
            network.check_resolution(*shape[1:])
        except ValueError as error:
            raise UserError(f"{self.name}: is no guide for this model: {error}") from error


@runtime_checkable
class Router(Protocol):
    """What routes the tokens of a network; see networks/routing.py."""

    p: float  # the rate of training
    length: int  # places at which an image's window of the row may begin

    def row(self, source: torch.Generator) -> Tensor:
        """The row that decides which tokens are routed."""

    def evaluated(self, rate: float, row: Tensor, places: Tensor) -> AbstractContextManager[None]:
        """Context in which tokens are routed in evaluation."""


def router_of(network: nn.Module) -> Router:
    """What routed the tokens of a network in its training.

    Raises:
        UserError: nothing did.
    """
    for part in network.modules():
        if isinstance(part, Router) and part.p:
            return part
    raise UserError(
        "guidance by routed tokens needs a network that was trained with them; train with "
        "network.routing, or let a weaker run guide: --guide RUN"
    )


@dataclass(frozen=True)
class Routed:
    """The model as its own guide, with a part of its tokens routed; both see the label.

    Sparse guidance (Krause 2026, arXiv:2601.01608, with gamma_strong = 0), for a network that was
    trained with routing, which classifier-free guidance helps little.

    Args:
        rate: share of the tokens that skip the routed blocks, gamma_weak, in (0, 1); above the rate
            of training, or the guide is about as good as the model.
    """

    rate: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise UserError(f"the rate of a routed guide must be in (0, 1) (got {self.rate})")

    def check(self, network: nn.Module, weight: float) -> None:
        """Refuse a network that was not trained with routing, or a guide with nothing to do.

        Args:
            network: as it was trained; its weights are not looked at.
            weight: of the guidance.

        Raises:
            UserError: says what to do.
        """
        if weight == 1:
            raise UserError("a guide does nothing at guidance 1; give a weight")
        router_of(network)

    def guide(self, denoiser: Denoiser) -> Guide:
        """The guide that a denoiser is to itself; it has the same weights.

        Raises:
            UserError: the network was not trained with routing.
        """
        network = RoutedNetwork(denoiser.network, self.rate)
        return Guide(f"routed:{self.rate:g}", Denoiser(network, denoiser.preconditioning), True)


def guide_of(guide: Guide | Routed | None, denoiser: Denoiser) -> Guide | None:
    """The guide of a denoiser, which may be that denoiser itself."""
    return guide.guide(denoiser) if isinstance(guide, Routed) else guide


class RoutedNetwork(nn.Module):
    """A network, its tokens routed in evaluation too.

    Args:
        network: the raw F, trained with routing; not copied.
        rate: share of the tokens that skip the routed blocks.
    """

    row: Tensor

    def __init__(self, network: nn.Module, rate: float) -> None:
        super().__init__()
        self.network = network
        self.router = router_of(network)
        self.rate = rate
        self.register_buffer("row", self.router.row(generator(0, "routing row", 0)), False)
        self.channels, self.classes = network.channels, network.classes
        self.check_resolution = network.check_resolution

    def forward(
        self, x: Tensor, c_noise: Tensor, *, keys: Sequence[int], **condition: Tensor | None
    ) -> Tensor:
        """F with routed tokens, drawn anew at each noise level.

        Args:
            x: (B, C, H, W).
            c_noise: (B,).
            keys: a seed of each image.
        """
        drawn = [
            seed_of(key, "routing", level) % self.router.length
            for key, level in zip(keys, c_noise.tolist(), strict=True)
        ]
        places = torch.tensor(drawn, device=x.device)
        with self.router.evaluated(self.rate, self.row, places):
            # Not `network(...)`, whose hooks count the model's own evaluations.
            output: Tensor = self.network.forward(x, c_noise, **condition)
        return output


def by_image(guide: Denoise, seed: int, indices: Sequence[int] | None) -> Denoise:
    """A routed guide that draws from (seed, image index, noise level) alone.

    Args:
        indices: of the images; None: their places in the batch.
    """

    def denoise(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        own = range(len(x)) if indices is None else indices
        return guide(x, sigma, keys=[seed_of(seed, "guide", index) for index in own], **more)

    return denoise


def check_guidance(
    weight: float, *, classes: int, label_dropout: float, guide: Guide | None = None
) -> None:
    """Refuse a guidance by the model without its label where there is none, or none was trained.

    Args:
        weight: of the guidance; 1 needs nothing.
        classes: of the model, 0 for none.
        label_dropout: share of the labels that were hidden from it in training.
        guide: another model in its place, which needs neither.

    Raises:
        UserError: says what to do.
    """
    if weight == 1 or guide is not None:
        return
    if not classes:
        raise UserError(
            "guidance needs a model with classes; this one is unconditional (a weaker run can "
            "guide it: --guide RUN)"
        )
    if not label_dropout:
        raise UserError(
            f"guidance {weight:g} needs the model without its label, which was never trained "
            "(trainer.label_dropout is 0); train or fine-tune with trainer.label_dropout=0.1, or "
            "let a weaker run guide: --guide RUN"
        )
    if label_dropout >= 1:
        raise UserError(
            f"guidance {weight:g} needs the model with its label, which was never trained "
            "(trainer.label_dropout is 1); train with trainer.label_dropout=0.1"
        )


def guided(
    denoise: Denoise,
    *,
    label: Tensor | None,
    weight: float,
    interval: tuple[float, float] = EVERYWHERE,
    guide: Denoise | None = None,
) -> Denoise:
    """The guidance that a weight, an interval and perhaps a weaker model ask for.

    Args:
        denoise: the model.
        label: int64 (B,), the wanted classes; None for a model without classes.
        weight: 1 is the plain conditional model, which alone is then evaluated.
        interval: levels (low, high] that are guided.
        guide: the weaker model of autoguidance; None for the model itself without its label.
    """
    plain = denoise if label is None else conditioned(denoise, label=label)
    if weight == 1:
        return plain
    if guide is not None:
        weaker = guide if label is None else conditioned(guide, label=label)
        strong = autoguided(plain, weaker, weight=weight)
    else:
        assert label is not None
        strong = classifier_free(denoise, label=label, weight=weight)
    return strong if interval == EVERYWHERE else within(strong, plain, interval)


def classifier_free(denoise: Denoise, *, label: Tensor, weight: float) -> Denoise:
    """Classifier-free guidance, D = D_none + weight (D_label - D_none) (Ho & Salimans 2022).

    Args:
        denoise: a conditional denoiser that was trained with label dropout.
        label: int64 (B,), the wanted classes; -1 means no label.
        weight: 1 is the plain conditional model, 0 the unconditional one; in the notation of the
            paper weight = 1 + w. Each call then costs one evaluation of the network on 2 B images.

    Returns:
        A denoiser `(x, sigma) -> x_hat` with the label closed in.
    """
    if weight == 1:
        return conditioned(denoise, label=label)

    def guide(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        labels = torch.cat([label, torch.full_like(label, -1)])
        levels = sigma.repeat(2) if sigma.ndim else sigma
        with_label, without = denoise(x.repeat(2, 1, 1, 1), levels, label=labels, **more).chunk(2)
        return _extrapolated(without, with_label, weight, x.shape[1])

    return guide


def autoguided(denoise: Denoise, guide: Denoise, *, weight: float) -> Denoise:
    """Autoguidance, D = D_bad + weight (D_main - D_bad) (Karras 2024).

    Args:
        denoise: the model, its label closed in.
        guide: a weaker one of the same images and the same label: smaller or less trained.
        weight: 1 is the plain model. A call costs one evaluation of either network.
    """

    def guide_by(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        # The guide is asked for the image alone: it may say nothing of the variance.
        return _extrapolated(guide(x, sigma), denoise(x, sigma, **more), weight, x.shape[1])

    return guide_by


def within(strong: Denoise, plain: Denoise, interval: tuple[float, float]) -> Denoise:
    """Guide at sigma in (low, high] only (Kynkaanniemi 2024); elsewhere the plain model.

    Args:
        strong: the guided denoiser.
        plain: the conditional one, which costs one evaluation.
        interval: low and high.

    Raises:
        UserError: low is not below high.
    """
    low, high = interval
    check_interval(interval)

    def guide(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        inside = (sigma > low) & (sigma <= high)
        if bool(inside.all()):
            return strong(x, sigma, **more)
        if not bool(inside.any()):
            return plain(x, sigma, **more)
        # A batch of several levels, which no sampler makes.
        both = strong(x, sigma, **more), plain(x, sigma, **more)
        return torch.where(per_image(inside, x), *both)

    return guide


def check_interval(interval: tuple[float, float]) -> None:
    """Raise ValueError unless an interval of levels has its lower end below its upper one."""
    low, high = interval
    if not 0 <= low < high:
        raise UserError(
            f"a guidance interval needs 0 <= low < high (got {low:g} to {high:g}); swap them?"
        )


def _extrapolated(weak: Tensor, strong: Tensor, weight: float, channels: int) -> Tensor:
    """weak + weight (strong - weak) in the image's channels, the strong one's beyond them."""
    image, beside = strong.tensor_split([channels], dim=1)
    if beside.shape[1]:
        return torch.cat([_extrapolated(weak, image, weight, channels), beside], dim=1)
    without = weak[:, :channels]
    return without + weight * (image - without)


def conditioned(denoise: Denoise, **condition: Any) -> Denoise:
    """Close a condition in, so that a sampler never sees it."""

    def with_condition(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        return denoise(x, sigma, **condition, **more)

    return with_condition


Clip = bool | float | Callable[[Tensor], Tensor]


def clipped(denoise: Denoise, clip: Clip = True) -> Denoise:
    """Keep the denoised image within the range of images, as DDPM's sampler does (released code).

    Args:
        denoise: D.
        clip: as for `clip_of`.
    """
    limit = clip_of(clip)

    def clip_image(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        image, variance = denoise(x, sigma, **more).tensor_split([x.shape[1]], dim=1)
        return torch.cat([limit(image), variance], dim=1)

    return clip_image


def clip_of(clip: Clip) -> Callable[[Tensor], Tensor]:
    """What is done to a denoised image (B, C, H, W).

    Args:
        clip: False for nothing, True to clip it to [-1, 1], a number to clip it to that limit on
            either side, or a function of it, such as `thresholded`.
    """
    if callable(clip):
        return clip
    limit = float(clip)
    return (lambda image: image.clamp(-limit, limit)) if limit else (lambda image: image)


def thresholded(image: Tensor, share: float = 0.995, most: float = 1.0) -> Tensor:
    """Dynamic thresholding (Saharia 2022, arXiv:2205.11487, 2.3): clip to s, then divide by s.

    Args:
        image: denoised, (B, C, H, W).
        share: s is the quantile of abs(image) at this share of an image's values.
        most: the largest s; s is at least 1. By diffusers' default 1, it is plain clipping.
    """
    s = torch.quantile(image.abs().flatten(1), share, dim=1).clamp(1.0, max(1.0, most))
    s = s[:, None, None, None]
    return image.clamp(-s, s) / s


@dataclass(frozen=True)
class VelocityClamp:
    """The released sampler of JiT divides by max(1 - t, t_eps), t = s / (s + sigma), for a velocity

        v = (D - z) / max(1 - t, t_eps) ,   z = t x ,

    which moves as far as the plain velocity of (1 - r) z + r D, r = min(1, (1 - t) / t_eps), does.
    So the last steps leave noise in the image: Heun's method in 50 equal steps of t ends at 0.983
    of the image and noise of 0.017 s, two of 255 levels. Published numbers were measured with it.

    Args:
        t_eps: smallest 1 - t, in (0, 1); 0.05 as published.
        noise_scale: s of the objective.
    """

    t_eps: float = 0.05
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.t_eps < 1:
            raise UserError(f"t_eps must be in (0, 1) (got {self.t_eps})")
        if self.noise_scale <= 0:
            raise UserError(f"noise_scale must be positive (got {self.noise_scale})")

    def __call__(self, denoise: Denoise) -> Denoise:
        """The denoiser whose plain velocity is the clamped one."""

        def clamp(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
            image, variance = denoise(x, sigma, **more).tensor_split([x.shape[1]], dim=1)
            level = sigma.to(torch.float64)
            total = self.noise_scale + level
            r = (level / total / self.t_eps).clamp(max=1.0)
            kept = per_image((1 - r) * self.noise_scale / total, x)
            image = (kept * x + per_image(r, x) * image).to(image.dtype)
            return torch.cat([image, variance], dim=1)

        return clamp
