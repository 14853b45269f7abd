"""Losses beside an objective's own: frozen features of the denoised image, or of the clean one.

| part | formula | source |
|---|---|---|
| sum | L = L_objective + sum_k weight_k L_k, of each image | |
| perceptual | L = d(D(x + sigma eps; sigma), x), sigma_min <= sigma <= sigma_max | PixelGen |
| distance | d = sum over maps of the mean over positions of (f / norm f - g / norm g)^2 | LPIPS |
| alignment | L = - mean over tokens of cos(MLP(hidden token), feature of x there) | REPA |

PixelGen: Ma et al. 2026, arXiv:2602.02493, losses at low noise only; of the paper only the abstract
and summaries were read, so its gate and weights are not given here. LPIPS: Zhang et al. 2018,
arXiv:1801.03924, Eq. 1 with w = 1, since the learned w come with weights of their own; d is then
2 (1 - cos) summed over maps. REPA: Yu et al. 2024, arXiv:2410.06940, Section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from diffusion_pl.diffusion.objective import (
    Denoise,
    NeedsNetwork,
    ObjectiveAround,
    TrainingObjective,
)
from diffusion_pl.errors import UserError

LISTS = ("blocks", "middle")  # of a network's blocks, where a block is named by its number


class FeatureMaps(Protocol):
    """Names a frozen network from images to maps of features; see `metrics/feature_maps.py`."""

    image_channels: ClassVar[tuple[int, ...]]  # numbers of channels that its images may have

    def outline(self, channels: int, resolution: int) -> Sequence[tuple[int, ...]]:
        """The shape (C, h, w) of each map for images (channels, resolution, resolution).

        Raises:
            UserError: such images, or the chosen layers, do not fit the network.
        """

    def check_weights(self) -> None:
        """Raise UserError unless the weights are there; says where to get them."""

    def load(self) -> nn.Module:
        """The network with its weights: float32 images (B, C, H, W) in [-1, 1] to a tuple of maps.

        Raises:
            UserError: the weights are missing or unfit.
        """


@runtime_checkable
class ExtraLoss(Protocol):
    """A loss beside the objective's; an nn.Module if it has weights or is a `NeedsNetwork`."""

    weight: float

    def __call__(self, image: Tensor, denoised: Tensor, sigma: Tensor, /) -> Tensor:
        """The loss of each image, float32 (B,), without its weight.

        Args:
            image: clean images (B, C, H, W) in [-1, 1].
            denoised: D(x + sigma eps; sigma), with gradient, float32 (B, C, H, W).
            sigma: noise levels (B,).
        """


class Frozen:
    """A frozen network, held outside the modules: neither trained, averaged, nor saved.

    Args:
        extractor: names it.
    """

    def __init__(self, extractor: FeatureMaps) -> None:
        self.extractor = extractor
        self.network: nn.Module | None = None
        self.device: torch.device | None = None

    def outline(self, channels: int, resolution: int) -> Sequence[tuple[int, ...]]:
        """The shape (C, h, w) of each map; no weights are needed.

        Raises:
            UserError: images of other channels, or that do not fit.
        """
        known = self.extractor.image_channels
        if channels not in known:
            raise UserError(
                f"extractor: {type(self.extractor).__name__} takes images of "
                f"{' or '.join(map(str, known))} channels (got {channels})"
            )
        return self.extractor.outline(channels, resolution)

    def load(self) -> None:
        """Read the weights.

        Raises:
            UserError: they are missing or unfit.
        """
        self.network = self.extractor.load().eval().requires_grad_(False)
        self.device = None

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps (B, C, h, w) of float32 images in [-1, 1], in float32, on their device."""
        if self.network is None:
            raise UserError("extractor: call attach() and load() before the first loss")
        if self.device != images.device:
            self.network.to(images.device)
            self.device = images.device
        # Autocast would round the features, and with them the target.
        with torch.autocast(images.device.type, enabled=False):
            maps: tuple[Tensor, ...] = self.network(images.float())
        return maps


class WithExtra(ObjectiveAround):
    """An objective with further losses, each with a weight: `extra` of the section `objective`.

    An image's further losses are added to its own loss after all that the objective does to it, and
    see the last call of the network. Levels are those that the objective draws.

    Args:
        objective: what is trained.
        extra: the further losses.

    Raises:
        UserError: one of them is no loss with a weight.
    """

    def __init__(self, objective: TrainingObjective, extra: Sequence[ExtraLoss]) -> None:
        super().__init__(objective)
        for number, each in enumerate(extra):
            if not isinstance(each, ExtraLoss):
                raise UserError(
                    f"extra.{number}: {type(each).__name__} is no loss with a `weight`, called "
                    "with (image, denoised, sigma)"
                )
        self.losses = list(extra)
        # So that their weights are trained and saved.
        self.extra = nn.ModuleList(each for each in extra if isinstance(each, nn.Module))
        self.sums: dict[str, Tensor] = {}

    def loss(
        self, denoise: Denoise, image: Tensor, u: Tensor, noise: Tensor, **condition: Tensor | None
    ) -> Tensor:
        """The loss of each image, float32 (B,); may be negative. See `Objective.loss`."""
        seen: list[tuple[Tensor, Tensor]] = []

        def recorded(x: Tensor, sigma: Tensor, **given: Any) -> Tensor:
            output = denoise(x, sigma, **given)
            # Behind the image there may be what the network says of the variance.
            seen.append((output[:, : image.shape[1]], sigma.expand(len(image))))
            return output

        for each in self.losses:
            if isinstance(each, NeedsNetwork):
                each.begin()
        loss = self.objective.loss(recorded, image, u, noise, **condition)
        for number, each in enumerate(self.losses):
            further = each(image, *seen[-1])
            loss = loss + each.weight * further
            name = f"extra_{number}_{type(each).__name__.lower()}"
            self.sums[name] = self.sums.get(name, 0) + further.detach().sum()
        return loss

    def report(self) -> dict[str, Tensor]:
        """The further losses without their weights; see `Reports`."""
        sums, self.sums = self.sums, {}
        return sums


class Perceptual(nn.Module):
    """Distance between frozen features of the denoised and of the clean image, at low noise.

    At high noise D is a mean over many images and has no detail to compare. Images beyond the
    window have loss 0 and do not pass through the extractor.

    Args:
        extractor: names the frozen network, and its maps.
        weight: factor of the loss, at least 0.
        sigma_max: highest noise level with this loss; in JiT's t it is noise_scale (1 - t) / t.
        sigma_min: lowest.

    Raises:
        UserError: a negative weight, or an empty window.
    """

    def __init__(
        self, extractor: FeatureMaps, weight: float, sigma_max: float, sigma_min: float = 0.0
    ) -> None:
        super().__init__()
        self.weight = checked_weight(weight)
        if not 0 <= sigma_min < sigma_max:
            raise UserError(
                f"needs 0 <= sigma_min < sigma_max (got sigma_min: {sigma_min}, sigma_max: "
                f"{sigma_max})"
            )
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.features = Frozen(extractor)
        self.checkpointed = False

    def attach(self, network: nn.Module, resolution: int) -> None:
        """See `NeedsNetwork`; nothing of the network is read but the number of its channels."""
        self.features.outline(channels_of(network), resolution)

    def check_weights(self) -> None:
        """See `NeedsNetwork`."""
        self.features.extractor.check_weights()

    def load(self) -> None:
        """See `NeedsNetwork`."""
        self.features.load()

    def begin(self) -> None:
        """See `NeedsNetwork`; nothing is kept."""

    def forward(self, image: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
        """The loss of each image; see `ExtraLoss`."""
        inside = ((sigma >= self.sigma_min) & (sigma <= self.sigma_max)).nonzero()[:, 0]
        loss = torch.zeros(len(image), device=image.device)
        if not len(inside):
            return loss
        with torch.no_grad():
            target = self.features(image[inside])
        return loss.index_copy(0, inside, distance(self.features(denoised[inside]), target))


class Alignment(nn.Module):
    """Representation alignment: hidden tokens of the network predict features of the clean image.

    Hidden tokens are the output of a block: (B, tokens, width), of which those of classes in front
    are left out, or (B, width, h, w), a token a pixel. The last of the extractor's maps is resized
    to their grid. Defaults are the published ones (Section 4; the MLP's width and its initial
    weights are those of the released code); there the block is the 8th of 12 to 28.

    Args:
        extractor: names the frozen network, and its maps.
        block: number of a block from 0, of `network.blocks` or `network.middle`, or the dotted name
            of any module in the network, such as "middle.3".
        weight: factor of the loss, at least 0.
        width: hidden channels of the MLP, which has three layers and SiLU between them.

    Raises:
        UserError: a negative weight, or no width.
    """

    def __init__(
        self, extractor: FeatureMaps, block: int | str, weight: float = 0.5, width: int = 2048
    ) -> None:
        super().__init__()
        self.weight = checked_weight(weight)
        if width < 1:
            raise UserError(f"width must be at least 1 (got {width})")
        self.block, self.width = block, width
        self.features = Frozen(extractor)
        self.projection: nn.Sequential | None = None
        self.stride: int | None = None  # pixels of a token's side
        self.front = 0  # tokens before those of the image
        self.listens = False
        self.hidden: Any = None
        self.hook: Any = None
        self.checkpointed = False

    def attach(self, network: nn.Module, resolution: int) -> None:
        """Find the block and make the MLP; see `NeedsNetwork`.

        Raises:
            UserError: there is no such block, or what it gives are no tokens of the image.
        """
        name = block_name(network, self.block)
        if self.hook is not None:
            self.hook.remove()
        self.hook = network.get_submodule(name).register_forward_hook(self.keep)
        again: Any = getattr(network, "activation_checkpointing", False)
        self.checkpointed = bool(again)
        channels = channels_of(network)
        features = self.features.outline(channels, resolution)[-1][0]
        hidden = self._outline(network, name, channels, resolution)
        if hidden.dim() == 3:
            self._find_grid(network, name, hidden.shape[1], resolution)
        sizes = (hidden.shape[2 if hidden.dim() == 3 else 1], self.width, self.width, features)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        first, second, third = layers
        self.projection = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)

    def _outline(self, network: nn.Module, name: str, channels: int, resolution: int) -> Tensor:
        """The block's output in training on torch's meta device, which computes nothing."""
        named = [*network.named_parameters(), *network.named_buffers()]
        state = {key: value.detach().to("meta") for key, value in named}
        x = torch.zeros(1, channels, resolution, resolution, device="meta")
        self.begin()
        with torch.no_grad():
            functional_call(network, state, (x, torch.zeros(1, device="meta")))
        hidden = self._taken()
        if not isinstance(hidden, Tensor) or hidden.dim() not in (3, 4):
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise UserError(
                f"block: {name} gives neither (B, tokens, width) nor (B, width, h, w) (got "
                f"{'nothing: it is not called' if hidden is None else got}); take another module"
            )
        return hidden

    def _find_grid(self, network: nn.Module, name: str, tokens: int, resolution: int) -> None:
        """Which of the tokens are the image's."""
        stride: Any = getattr(network, "divisor", None)
        if stride is None:  # a network of the user's own
            stride = max(1, resolution // max(1, math.isqrt(tokens)))
        front = tokens - (resolution // stride) ** 2
        router: Any = getattr(network, "router", None)
        number = name.rpartition(".")[2]
        routed = router is not None and number.isdecimal()
        routed = routed and router.first <= int(number) <= router.last
        if routed or front not in (0, getattr(network, "class_tokens", 0)):
            raise UserError(
                f"block: {name} has {tokens} tokens in training, which are no grid of patches of "
                f"{stride} over {resolution} pixels; take a block that sees every patch, outside "
                "of those that routing skips"
            )
        self.stride, self.front = stride, front

    def check_weights(self) -> None:
        """See `NeedsNetwork`."""
        self.features.extractor.check_weights()

    def load(self) -> None:
        """See `NeedsNetwork`."""
        self.features.load()

    def begin(self) -> None:
        """Keep the block's next output; see `NeedsNetwork`."""
        self.listens = True

    def keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Keep the block's output; when activation checkpointing runs it again, nothing."""
        if self.listens:
            self.hidden = output

    def _taken(self) -> Any:
        hidden, self.hidden, self.listens = self.hidden, None, False
        return hidden

    def forward(self, image: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
        """The loss of each image, from -1 to 1; see `ExtraLoss`.

        Raises:
            UserError: not attached, or other tokens than those of the image.
        """
        hidden = self._taken()
        if self.projection is None or hidden is None:
            raise UserError(
                "block: was not called for this loss; attach() to the network that is trained"
            )
        if hidden.dim() == 4:
            rows, columns = hidden.shape[2:]
            tokens = hidden.flatten(2).transpose(1, 2)
        else:
            assert self.stride is not None
            rows, columns = (side // self.stride for side in image.shape[2:])
            tokens = hidden[:, self.front :]
            if tokens.shape[1] != rows * columns:
                raise UserError(
                    f"block: {tokens.shape[1]} tokens are not {rows} x {columns} patches"
                )
        with torch.no_grad():
            target = resized(self.features(image)[-1], rows, columns).flatten(2).transpose(1, 2)
        similarity = F.cosine_similarity(self.projection(tokens).float(), target, dim=2)
        return -similarity.mean(dim=1)


def checked_weight(weight: float) -> float:
    """A factor of a loss; UserError if it is negative."""
    if not weight >= 0:
        raise UserError(f"weight must be at least 0 (got {weight})")
    return weight


def channels_of(network: nn.Module) -> int:
    """The image channels of a network."""
    channels: Any = network.channels
    return int(channels)


def distance(found: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """The squared distance of unit features: two tuples of maps (B, C, h, w) -> (B,)."""
    total: Any = 0
    for one, other in zip(found, target, strict=True):
        apart = (F.normalize(one, dim=1) - F.normalize(other, dim=1)).square()
        total = total + apart.sum(dim=1).mean(dim=(1, 2))
    squared: Tensor = total
    return squared


def resized(features: Tensor, rows: int, columns: int) -> Tensor:
    """Bilinear, with a wider filter where it reduces: (B, C, h, w) -> (B, C, rows, columns)."""
    return F.interpolate(
        features, (rows, columns), mode="bilinear", align_corners=False, antialias=True
    )


def block_name(network: nn.Module, block: int | str) -> str:
    """The dotted name of a block in a network.

    Raises:
        UserError: there is none; names those that are.
    """
    modules = dict(network.named_modules())
    lists = {key: len(each) for key in LISTS if isinstance(each := modules.get(key), nn.ModuleList)}
    if isinstance(block, int):
        first = next(iter(lists), LISTS[0])
        block = f"{first}.{block}"
    if block in modules and block:
        return block
    there = [f"{key}.0 to {key}.{count - 1}" for key, count in lists.items() if count]
    there += [key for key, _ in network.named_children() if key not in lists]
    raise UserError(f"block: the network has no {block!r}; it has {', '.join(there)}")
