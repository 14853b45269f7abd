"""Non-leaky augmentation of training images: Karras, Aittala, Aila & Laine, Elucidating the Design
Space of Diffusion-Based Generative Models, 2022, arXiv:2206.00364, Appendix F.2 and Table 6.

The network is told what was done to each image, so that it need not draw augmented images when it
is told that nothing was. The operations, in order:

| operation | parameters | label |
|---|---|---|
| mirror left-right | a0 in {0, 1} | a0 |
| mirror top-bottom | a1 in {0, 1} | a1 |
| scale by 2^(scale a2) | a2 ~ N(0, 1) | a2 |
| rotate by a3 | a3 ~ U(-pi, pi) | cos a3 - 1, sin a3 |
| stretch by 2^(anisotropy a5) along angle a4, shrink as much across | a4, a5 | a5 cos a4, a5 sin a4 |
| translate by translation (W a6, H a7) | a6, a7 ~ N(0, 1) | a6, a7 |

Mirroring moves pixels. The others make one affine map, and the image is resampled once: reflected
at its borders, enlarged twice by a wavelet's low-pass filter, read bilinearly, reduced by the same
filter (Karras, Aittala, Hellsten, Laine, Lehtinen & Aila, Training Generative Adversarial Networks
with Limited Data, 2020, arXiv:2006.06676, Appendix B). The wavelet is orthonormal, so a map that
hits the pixels again, such as a translation by whole pixels, returns them unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

# The low-pass filter of Daubechies' least asymmetric wavelet with 6 vanishing moments (Ten Lectures
# on Wavelets, 1992, section 6.4), by spectral factorisation in 60 digits. Published tables agree to
# 1e-12. The sum is sqrt(2).
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

# torch.rand returns 0 once in 2^53 numbers (2^24 in float32); its normal would be minus infinity.
_LEAST = 2.0**-54


@dataclass(frozen=True)
class NonLeaky:
    """Draws an augmentation for each image and says which, as EDM trained (Appendix F.2).

    Args:
        probability: of each operation in [0, 1]. The mirror left-right is always in use. A mirror in
            use tosses a fair coin, so images are upside down with probability / 2.
        scale: standard deviation of log2 of the size.
        anisotropy: standard deviation of log2 of the stretch.
        translation: standard deviation of the translation relative to the side.

    Raises:
        ValueError: the probability is outside [0, 1].
    """

    probability: float = 0.12
    scale: float = 0.2
    anisotropy: float = 0.2
    translation: float = 0.125

    labels: ClassVar[int] = 9
    draws: ClassVar[int] = 13

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(
                f"augmentation: probability must be in [0, 1] (got {self.probability})"
            )

    @torch.no_grad()
    def __call__(self, image: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Augment each image by its own numbers.

        Args:
            image: float (B, C, H, W), clean, in [-1, 1].
            uniform: (B, draws) in [0, 1); an image's augmentation is a function of its row.

        Returns:
            image: float (B, C, H, W); resampling overshoots [-1, 1] by some percent at edges.
            label: float32 (B, labels), 0 where nothing was done.

        Raises:
            ValueError: the image is not floating point, or the numbers have another shape.
        """
        if not image.is_floating_point():
            raise ValueError(f"augmentation: images must be floating point (got {image.dtype})")
        if uniform.shape != (len(image), self.draws):
            raise ValueError(
                f"augmentation: uniform must be ({len(image)}, {self.draws}), {self.draws} numbers "
                f"an image (got {tuple(uniform.shape)})"
            )
        parameters = self.parameters(uniform)
        image = transform(
            image,
            parameters,
            scale=self.scale,
            anisotropy=self.anisotropy,
            translation=self.translation,
        )
        return image, label(parameters)

    def parameters(self, uniform: Tensor) -> Tensor:
        """The operations' parameters a0 .. a7, 0 for an operation that is not in use.

        Args:
            uniform: (B, draws) in [0, 1).

        Returns:
            (B, 8) in the dtype of `uniform`.
        """
        # One contiguous row a draw, so that an image's numbers do not depend on its batch.
        rows = uniform.T.contiguous()
        mirror, flip, coin = rows[:3]
        sizing, turning, stretching, tilting, moving = rows[3:8] < self.probability
        a2, a5, a6, a7 = torch.special.ndtri(rows[8:12].clamp(min=_LEAST))
        return rows
