"""Rectified flow: Liu, Gong & Liu, Flow Straight and Fast: Learning to Generate and Transfer Data
with Rectified Flow, 2022, arXiv:2209.03003; with logit-normal times Esser et al. 2024,
arXiv:2403.03206. How it comes to these coefficients: docs/add_an_objective.md.

| part | formula | where |
|---|---|---|
| state | x_t = (1 - t) x + t eps = (1 - t) (x + sigma eps) | Eq. 1, time reversed |
| noise level | sigma = t / (1 - t), t = sigma / (1 + sigma) | from the state |
| noise levels | t uniform; or logit t normal, which is ln sigma normal | Eq. 1; Esser, 3.1 |
| c_skip, c_out | 1 / (1 + sigma), -sigma / (1 + sigma): D = x_t - t F, F = eps - x | Eq. 1 |
| c_in | 1 / (1 + sigma): the network sees x_t | Eq. 1 |
| c_noise | 1000 t | ours: embeddings are made for 0 to 1000 |
| weight | (1 + 1 / sigma)^2 = 1 / c_out^2, the squared error of the velocity | Eq. 1 |
| pooling | mean over channels and pixels | ours |
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffusion_pl.diffusion.objective import Objective, pixel_mean
from diffusion_pl.diffusion.paths import Along
from diffusion_pl.diffusion.preconditioning import Coefficients
from diffusion_pl.diffusion.schedules import LogNormal
from diffusion_pl.errors import UserError

# Training keeps this far from t = 0 and 1: at t, D - x in float32 loses 1e-7 / t of the velocity.
EDGE = 1e-4


@dataclass(frozen=True)
class Straight:
    """sigma(t) = shift t / (1 - t), the noise level on a straight line from image to noise.

    Args:
        shift: of the times towards the noise, t to shift t / (1 + (shift - 1) t), which is a factor
            of sigma (Esser 2024, Eq. 23); 1 for none.
    """

    shift: float = 1.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 - t)

    def slope(self, t: Tensor) -> Tensor:
        return self.shift / (1 - t).square()

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / (self.shift + sigma)


@dataclass(frozen=True)
class PredictFlow:
    """The preconditioning of a network that predicts eps - x from x_t.

    Args:
        scale: c_noise is t times this.
    """

    scale: float = 1000.0

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Any positive level."""
        return 0.0, float("inf")

    def __call__(self, sigma: Tensor) -> Coefficients:
        t = Straight().time(sigma)
        return Coefficients(c_skip=1 - t, c_out=-t, c_in=1 - t, c_noise=self.scale * t)


@dataclass(frozen=True)
class FlowWeight:
    """(1 + 1 / sigma)^2: the squared error of the velocity eps - x."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return (1 + 1 / sigma).square()


def RectifiedFlow(mean: float = 0.0, std: float | None = None) -> Objective:
    """The mean squared error of the velocity.

    Args:
        mean: of logit t; 0 in the paper's best setting. Not used when t is uniform.
        std: of logit t, > 0; None for uniform t.

    Raises:
        UserError: a mean without a std.
    """
    if std is None and mean != 0:
        raise UserError(f"a mean of logit t needs a std (got mean {mean:g}); set std, or no mean")
    return Objective(
        schedule=Along(Straight(), EDGE, 1 - EDGE) if std is None else LogNormal(mean, std),
        preconditioning=PredictFlow(),
        weight=FlowWeight(),
        reduce=pixel_mean,
    )
