"""EDM2: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, 2024,
arXiv:2312.02696. EDM's objective (edm.py) with other noise levels and a weight that is learned.

| part | formula | where |
|---|---|---|
| noise levels | ln sigma ~ N(-0.8, 1.6^2) at 64 pixels, N(-0.4, 1) for latents of 512 | Table 6 |
| preconditioning, weight | EDM's | section 2 |
| learned weight | L / e^{u(sigma)} + u(sigma), see diffusion/uncertainty.py | Eq. 21 |
| pooling | mean over channels and pixels | Eq. 14 to 16, of a pixel |

The values are those of the released code; the places in the paper are in doubt.

The paper's u is a layer whose weights have norm 1; here they are free and begin at 0, the plain
loss. Both come to the logarithm of the expected loss.
"""

from __future__ import annotations

from diffusion_pl.diffusion.objective import pixel_mean
from diffusion_pl.diffusion.uncertainty import LearnedUncertainty
from diffusion_pl.objectives.edm import EDM


def EDM2(
    P_mean: float = -0.8, P_std: float = 1.6, sigma_data: float = 0.5, channels: int = 128
) -> LearnedUncertainty:
    """EDM2's training objective, with the paper's symbols as arguments.

    Args:
        P_mean: mean of ln sigma in training.
        P_std: standard deviation of ln sigma in training, > 0.
        sigma_data: standard deviation of the images in [-1, 1], > 0.
        channels: Fourier features of u.
    """
    return LearnedUncertainty(EDM(P_mean, P_std, sigma_data, reduce=pixel_mean), channels)
