"""EDM: Karras, Aittala, Aila & Laine, Elucidating the Design Space of Diffusion-Based Generative
Models, 2022, arXiv:2206.00364; the column "Ours" of its Table 1.

| part | formula | where |
|---|---|---|
| noise levels | ln sigma ~ N(P_mean, P_std^2) | Table 1, section 5 |
| c_skip | sigma_data^2 / (sigma^2 + sigma_data^2) | Table 1, Eq. 145 |
| c_out | sigma sigma_data / sqrt(sigma^2 + sigma_data^2) | Table 1 |
| c_in | 1 / sqrt(sigma^2 + sigma_data^2) | Table 1 |
| c_noise | ln(sigma) / 4 | Table 1 |
| weight | (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 | Table 1, Eq. 8 |
| pooling | sum over channels and pixels, mean over images | released code |
"""

from __future__ import annotations

from diffusion_pl.diffusion.objective import Objective, Reduce, UnitOutput, pixel_sum
from diffusion_pl.diffusion.preconditioning import Karras
from diffusion_pl.diffusion.schedules import LogNormal


def EDM(
    P_mean: float = -1.2,
    P_std: float = 1.2,
    sigma_data: float = 0.5,
    reduce: Reduce = pixel_sum,
) -> Objective:
    """EDM's training objective, with the paper's symbols as arguments.

    Args:
        P_mean: mean of ln sigma in training.
        P_std: standard deviation of ln sigma in training, > 0.
        sigma_data: standard deviation of the images in [-1, 1], > 0.
        reduce: pooling; the mean over pixels where images of several sizes train one network.
    """
    return Objective(
        schedule=LogNormal(P_mean, P_std),
        preconditioning=Karras(sigma_data),
        weight=UnitOutput(sigma_data),
        reduce=reduce,
    )
