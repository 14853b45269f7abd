"""Inverse problems: denoisers that know a linear measurement y = A x + std eps of the image.

By Tweedie's formula the denoiser of p(x | y) is D + sigma^2 grad log p(y | x_t), x_t = x + sigma z.
With x | x_t taken as a Gaussian of mean D and covariance V the gradient is

    J^T A^T w ,   (A V A^T + std^2) w = y - A D ,   J = dD / dx_t .

| V | exact where the images are | source |
|---|---|---|
| sigma^2 J (`Jacobian`) | Gaussian | Boys 2023, arXiv:2310.06721; Rozet 2024, arXiv:2405.13712 |
| r^2 I (`Isotropic`) | Gaussian, covariance sigma_data^2 I | Song 2023 (Pi-GDM), ICLR, section 3 |
| 0 (`PointEstimate`) | never: a heuristic | Chung 2023 (DPS), arXiv:2209.14687, Eq. 16 |
| known pixels set (`replaced`) | of independent pixels | Song 2021, arXiv:2011.13456, App. I.2 |

For other images all are approximations. J^T is taken through the network, so an
evaluation costs a backward pass, and with `Jacobian` one more for each iteration. Pixels of images
vary together, so A V A^T is larger than r^2 says: with `Isotropic` the guidance is too strong, and
multistep methods with few steps diverge; one iteration of `Jacobian` finds the right length of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_pl.diffusion.levels import per_image
from diffusion_pl.diffusion.measurements import Measurement
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError

Linear = Callable[[Tensor], Tensor]

# Of the residual's squared norm: an iteration of float64 beyond it changes nothing.
CONVERGED = 1e-26


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name} must be positive (got {value})")


class Covariance(Protocol):
    """V, the covariance of the clean image given the noisy one, as a product.

    Attributes:
        iterations: of conjugate gradients at most.
    """

    @property
    def iterations(self) -> int: ...

    def product(self, vector: Tensor, sigma: Tensor, pull: Linear) -> Tensor:
        """V vector.

        Args:
            vector: (B, C, H, W).
            sigma: () or (B, 1, 1, 1).
            pull: v -> J^T v.
        """


@dataclass(frozen=True)
class Isotropic:
    """V = r^2 I, r^2 = sigma^2 sigma_data^2 / (sigma^2 + sigma_data^2); Song 2023 has sigma_data 1.

    Args:
        sigma_data: standard deviation of the images in [-1, 1].
        iterations: at most; a mask and block means need one, a blur more. They cost no evaluation.
    """

    sigma_data: float = 0.5
    iterations: int = 50

    def __post_init__(self) -> None:
        _check_positive("sigma_data", self.sigma_data)
        _check_positive("iterations", self.iterations)

    def product(self, vector: Tensor, sigma: Tensor, pull: Linear) -> Tensor:
        """r^2 vector."""
        ratio = (sigma / self.sigma_data).square()
        return sigma.square() / (1 + ratio) * vector


@dataclass(frozen=True)
class Jacobian:
    """V = sigma^2 J, the covariance of the denoiser's own posterior (Tweedie, second order).

    J of an exact denoiser is symmetric, and J^T stands for it.

    Args:
        iterations: at most, a backward pass each; Rozet 2024 takes 1 to 3. As many as there are
            different eigenvalues of A J A^T make it exact for Gaussian images.
    """

    iterations: int = 1

    def __post_init__(self) -> None:
        _check_positive("iterations", self.iterations)

    def product(self, vector: Tensor, sigma: Tensor, pull: Linear) -> Tensor:
        """sigma^2 J^T vector."""
        return sigma.square() * pull(vector)


@dataclass(frozen=True)
class PointEstimate:
    """V = 0: y is taken as a measurement of D itself, the likelihood of DPS; it needs std > 0.

    It trusts D too much: the guidance is too strong by (A V A^T + std^2) / std^2, so the levels
    must lie close together, and the samples vary too little. The step of the released code, divided
    by the norm of y - A D, belongs to 1,000 steps of DDPM's chain and is not offered.
    """

    @property
    def iterations(self) -> int:
        """One: the system is a multiple of I."""
        return 1

    def product(self, vector: Tensor, sigma: Tensor, pull: Linear) -> Tensor:
        """0."""
        return torch.zeros_like(vector)


def posterior(
    denoise: Denoise,
    measurement: Measurement,
    measured: Tensor,
    *,
    std: float = 0.0,
    covariance: Covariance = Jacobian(),
) -> Denoise:
    """The denoiser of the images that agree with a measurement.

    Args:
        denoise: D, differentiable in x; guidance and labels already in it.
        measurement: A.
        measured: y, broadcast to (B, C', H', W').
        std: of the measurement's noise, at least 0.
        covariance: V; see the table above.

    Returns:
        A denoiser, also within `torch.inference_mode`; what a network says of the variance passes
        through, and no gradient flows back through it.

    Raises:
        UserError: a negative std, or 0 with a covariance of 0.
    """
    if not 0 <= std < math.inf:
        raise UserError(f"std of the measurement must be 0 or more (got {std})")
    if std == 0 and isinstance(covariance, PointEstimate):
        raise UserError("a point estimate needs the noise of the measurement: give std > 0")
    wanted = measured.to(torch.float64)

    def informed(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        channels = x.shape[1]
        level = per_image(sigma.to(torch.float64), x)
        # Tensors made in inference mode cannot be saved for a backward pass; their clones can.
        with torch.inference_mode(False), torch.enable_grad():
            noisy = x.clone().requires_grad_()
            output = denoise(noisy, sigma.clone(), **more)
            image, variance = output.tensor_split([channels], dim=1)

            def pull(vector: Tensor) -> Tensor:
                (pulled,) = torch.autograd.grad(
                    image, noisy, vector.to(image.dtype), retain_graph=True
                )
                return pulled.to(torch.float64)

            def system(vector: Tensor) -> Tensor:
                spread = covariance.product(measurement.adjoint(vector), level, pull)
                return measurement.forward(spread) + std**2 * vector

            guess = image.detach().to(torch.float64)
            residual = wanted.clone() - measurement.forward(guess)
            weight = solved(system, residual, covariance.iterations)
            moved = guess + level.square() * pull(measurement.adjoint(weight))
        return torch.cat([moved.to(image.dtype), variance.detach()], dim=1)

    return informed


def solved(system: Linear, right: Tensor, iterations: int) -> Tensor:
    """Conjugate gradients (Hestenes & Stiefel 1952): w with system(w) = right, from w = 0.

    An image ends before its iterations do when it has converged, or when the system turns out not
    to be positive there, as that of a network may.

    Args:
        system: symmetric, linear; of several images at once, which do not mix.
        right: (B, ...).
        iterations: at most.
    """
    found, left, along = torch.zeros_like(right), right, right
    size = enough = _dot(right, right)
    for _ in range(iterations):
        image = system(along)
        curvature = _dot(along, image)
        goes = (curvature > 0) & (size > CONVERGED * enough)
        if not bool(goes.any()):
            break
        step = torch.where(goes, size / curvature, 0.0)
        found, left = found + step * along, left - step * image
        before, size = size, _dot(left, left)
        along = left + torch.where(goes, size / before, 0.0) * along
    return found


def replaced(denoise: Denoise, image: Tensor, known: Tensor) -> Denoise:
    """Set the known pixels of the denoised image: inpainting by replacement.

    Every sampler then takes the known pixels from noise to the image along its own steps, and they
    end there exactly; on the way they are the known image with noise of the level. Song 2021 draws
    that noise anew at each level, here it is the sampler's own. The other pixels see only the noisy
    known ones, so they follow p(x | y) in general only roughly: `samplers.resampling`, or
    `posterior` inside it.

    Args:
        denoise: D.
        image: (B, C, H, W) in [-1, 1]; what it has at unknown pixels does not matter.
        known: bool, broadcast to the image's shape.

    Returns:
        A denoiser; what a network says of the variance passes through.
    """

    def with_known(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        found, variance = denoise(x, sigma, **more).tensor_split([x.shape[1]], dim=1)
        return torch.cat([torch.where(known, image.to(found.dtype), found), variance], dim=1)

    return with_known


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """The scalar product of each image, (B, 1, ...)."""
    return (one * other).flatten(1).sum(1).reshape(-1, *[1] * (one.ndim - 1))
