"""Non-leaky augmentation of training images: Karras, Aittala, Aila & Laine, Elucidating the Design
Space of Diffusion-Based Generative Models, 2022, arXiv:2206.00364, Appendix F.2.

The network is told what was done to each image, so that it need not draw such images when it is
told that nothing was. The operations in their order, N a standard normal number, U an angle in
(-pi, pi), angles counterclockwise:

| operation | parameters | label |
|---|---|---|
| mirror left-right | a0 in {0, 1} | a0 |
| mirror top-bottom | a1 in {0, 1} | a1 |
| enlarge by 2^(scale a2) | a2 ~ N | a2 |
| rotate by a3 | a3 ~ U | cos a3 - 1, sin a3 |
| stretch by 2^(anisotropy a5) along angle a4 | a4 ~ U or 0, a5 ~ N | a5 cos a4, a5 sin a4 |
| translate by translation (W a6, H a7), right and down | a6, a7 ~ N | a6, a7 |

A stretch shrinks by as much across its axis. Mirrors move pixels; the rest is one affine map, by
which the image is resampled once: reflected at its borders, sampled twice as finely by a wavelet's
low-pass filter, read bilinearly where the map says, and reduced by the same filter (Karras et al.,
Training Generative Adversarial Networks with Limited Data, 2020, arXiv:2006.06676, Appendix B). The
wavelet is orthonormal, so a translation by whole pixels moves them unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_pl.errors import UserError

# The low-pass filter of Daubechies' least asymmetric wavelet with 6 vanishing moments (Ten Lectures
# on Wavelets, 1992, chapter 6), by spectral factorisation in 60 digits; its sum is sqrt(2). Tables
# in circulation agree to 1e-12.
SYM6 = (
    0.015404109327044824,
    0.0034907120842221626,
    -0.11799011114852002,
    -0.04831174258569806,
    0.49105594192797375,
    0.787641141028651,
    0.3379294217281658,
    -0.07263752278637658,
    -0.02106029251237085,
    0.04472490177078139,
    0.0017677118642540077,
    -0.00780070832503238,
)

# Probability cut off at either end of a normal number: a uniform one may be 0, and 1 by rounding.
_TAIL = 1e-7


@dataclass(frozen=True)
class NonLeaky:
    """Draws an augmentation for each image and says which, as EDM trained (Appendix F.2).

    Args:
        probability: of using each operation, in [0, 1]; the mirror left-right is always in use. A
            mirror in use tosses a fair coin, so probability / 2 of the images are upside down.
        scale: standard deviation of log2 of the enlargement.
        anisotropy: standard deviation of log2 of the stretch.
        translation: standard deviation of the translation relative to the side.

    Raises:
        UserError: the probability is outside [0, 1].
    """

    probability: float = 0.12
    scale: float = 0.2
    anisotropy: float = 0.2
    translation: float = 0.125

    # Entries of the label and uniform numbers that an image takes.
    labels: ClassVar[int] = 9
    draws: ClassVar[int] = 13

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UserError(f"augmentation: probability must be in [0, 1] (got {self.probability})")

    @torch.no_grad()
    def __call__(self, image: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Augment each image by its own numbers.

        Args:
            image: floating point (B, C, H, W), clean, in [-1, 1].
            uniform: (B, draws) in [0, 1); what is done to an image depends on its row alone.

        Returns:
            image: (B, C, H, W); resampling overshoots [-1, 1] by some percent at edges.
            label: float32 (B, labels), 0 where nothing was done.

        Raises:
            UserError: the images are not floating point, or the numbers have another shape.
        """
        if not image.is_floating_point():
            raise UserError(f"augmentation: images must be floating point (got {image.dtype})")
        if uniform.shape != (len(image), self.draws):
            raise UserError(
                f"augmentation: uniform must hold {self.draws} numbers for each of {len(image)} "
                f"images (got shape {tuple(uniform.shape)})"
            )
        parameters = self.parameters(uniform)
        return self.transform(image, parameters), label_of(parameters)

    def parameters(self, uniform: Tensor) -> Tensor:
        """Turn uniform numbers into the operations' parameters, 0 where one is not in use.

        Args:
            uniform: (B, draws) in [0, 1).

        Returns:
            a0 .. a7: (B, 8) in the dtype of `uniform`.
        """
        # One contiguous row a draw: the same instructions compute it whatever the batch.
        rows = uniform.T.contiguous()
        mirror, flip, tilted, sized, turned, stretched, moved = rows[:7]
        size, turn, tilt, stretch, right, down = rows[7:]
        p = self.probability
        a0, a1 = mirror < 1 / 2, flip < p / 2
        a2 = _normal(size) * (sized < p)
        a3 = _angle(turn) * (turned < p)
        # Half of the stretches are along the width (released code).
        a4 = _angle(tilt) * (tilted < 1 / 2) * (stretched < p)
        a5 = _normal(stretch) * (stretched < p)
        a6, a7 = _normal(right) * (moved < p), _normal(down) * (moved < p)
        return torch.stack([a0.to(a2.dtype), a1.to(a2.dtype), a2, a3, a4, a5, a6, a7], dim=1)

    def transform(self, image: Tensor, parameters: Tensor) -> Tensor:
        """Apply operations of known parameters; an image that is not moved is not resampled.

        Args:
            image: floating point (B, C, H, W).
            parameters: a0 .. a7, (B, 8).
        """
        mirrored, flipped, moved = (
            (columns != 0).any(dim=1)[:, None, None, None]
            for columns in parameters.split([1, 1, 6], dim=1)
        )
        image = torch.where(mirrored, image.flip(3), image)
        image = torch.where(flipped, image.flip(2), image)
        linear, offset = self.inverse(parameters, image.shape[3], image.shape[2])
        return torch.where(moved, resample(image, linear, offset), image)

    def inverse(self, parameters: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
        """Where in the image each point of its augmentation comes from: linear @ (point - offset).

        With R(a) a rotation and s = 2^(anisotropy a5), the inverse of the operations in reverse is

            2^(-scale a2) R(-a3) R(a4) diag(1/s, s) R(-a4)
              = 2^(-scale a2) (cosh(ln s) R(-a3) - sinh(ln s) M(2 a4 - a3)),

        M(b) being the reflection across the axis at angle b / 2. Written out with y pointing down.

        Returns:
            linear: (B, 2, 2), of pixels right and down from the middle of the image.
            offset: (B, 2) in pixels.
        """
        _, _, a2, a3, a4, a5, a6, a7 = parameters.unbind(1)
        size = torch.exp2(-self.scale * a2)
        stretch = (self.anisotropy * math.log(2)) * a5
        keep, swap = size * torch.cosh(stretch), size * torch.sinh(stretch)
        cos, sin = keep * torch.cos(a3), keep * torch.sin(a3)
        cos_axis, sin_axis = swap * torch.cos(2 * a4 - a3), swap * torch.sin(2 * a4 - a3)
        entries = [cos - cos_axis, sin_axis - sin, sin + sin_axis, cos + cos_axis]
        offset = [self.translation * width * a6, self.translation * height * a7]
        return torch.stack(entries, dim=1).unflatten(1, (2, 2)), torch.stack(offset, dim=1)


def label_of(parameters: Tensor) -> Tensor:
    """What the network is told of the parameters a0 .. a7, (B, 8): float32 (B, 9).

    As published, the label does not tell (a4, a5) from (a4 + pi, -a5), which stretch the same axis
    by inverse factors; everything else can be read back from it.
    """
    a0, a1, a2, a3, a4, a5, a6, a7 = parameters.unbind(1)
    turn, axis = [a3.cos() - 1, a3.sin()], [a5 * a4.cos(), a5 * a4.sin()]
    return torch.stack([a0, a1, a2, *turn, *axis, a6, a7], dim=1).float()


def _normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers by their inverse distribution function."""
    return torch.special.ndtri(uniform.clamp(_TAIL, 1 - _TAIL))


def _angle(uniform: Tensor) -> Tensor:
    """Angles in [-pi, pi)."""
    return math.pi * (2 * uniform - 1)


def resample(image: Tensor, linear: Tensor, offset: Tensor) -> Tensor:
    """Read an image at linear @ (pixel - offset), band-limited on the way in and out.

    The reflected border is one image wide on every side and beyond it is 0, whatever the maps: no
    size waits for their values to come from the device, and an image does not depend on its batch.
    The price is 36 times the images in memory.

    Args:
        image: floating point (B, C, H, W).
        linear: (B, 2, 2), of pixels right and down from the middle of the image.
        offset: (B, 2) in pixels.
    """
    height, width = image.shape[2:]
    x = _fine_points(width, linear)[None, None, :] - offset[:, 0, None, None]
    y = _fine_points(height, linear)[None, :, None] - offset[:, 1, None, None]
    xx, xy, yx, yy = linear.flatten(1)[:, :, None, None].unbind(1)
    # Element by element, since a matrix product may be rounded to TF32 or bfloat16, which moves the
    # corners of 64 pixels by a tenth of one. grid_sample counts -1 to 1 over the fine image, two
    # samples a pixel, of which the first is the pixel's centre: 1/4 before the middle of the two.
    grid_x = (xx * x + xy * y - 1 / 4) * (2 / (3 * width - 2))
    grid_y = (yx * x + yy * y - 1 / 4) * (2 / (3 * height - 2))
    read = functional.grid_sample(
        _enlarge(_enlarge(image).mT).mT,
        torch.stack([grid_x, grid_y], dim=-1).to(image.dtype),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return _reduce(_reduce(read).mT).mT


def _fine_points(size: int, like: Tensor) -> Tensor:
    """Pixels from the middle to the 2 size + 10 fine samples from which `_reduce` makes a side.

    Sample 2 j is the centre of pixel j, since the filter's largest tap, the sixth, falls there.
    """
    reach = len(SYM6) // 2
    samples = torch.arange(1 - reach, 2 * size + reach - 1, dtype=like.dtype, device=like.device)
    return samples / 2 - (size - 1) / 2


def _enlarge(image: Tensor) -> Tensor:
    """Reflect the last axis about its end pixels and double it: W to 2 (3 W - 2).

    Pixel j spreads over samples 2 j - 5 .. 2 j + 6, a tap on each: the adjoint of `_reduce`, hence
    undone by it, as the filter is orthonormal.
    """
    border, half = image.shape[3] - 1, len(SYM6) // 2
    image = functional.pad(image, (border, border, 0, 0), mode="reflect")
    length = image.shape[3]
    image = functional.pad(image, (half // 2, half // 2))
    even = [image.narrow(3, half - 1 - k, length) for k in range(half)]
    odd = [image.narrow(3, half - k, length) for k in range(half)]
    phases = [_weighted_sum(SYM6[1::2], even), _weighted_sum(SYM6[0::2], odd)]
    return torch.stack(phases, dim=-1).flatten(3)


def _reduce(fine: Tensor) -> Tensor:
    """Halve the last axis to the pixels whose whole filter is there: 2 W + 10 to W."""
    length = fine.shape[3] - len(SYM6) + 1
    return _weighted_sum(SYM6, [fine[..., k : k + length : 2] for k in range(len(SYM6))])


def _weighted_sum(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """The sum in its order; unlike a convolution it keeps its precision on every device."""
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total.add_(term, alpha=weight)
    return total
