"""The variational bound of the discrete chain, in bits per dimension (Ho 2020, arXiv:2006.11239).

From level sigma = sigma_t to s = sigma_{t-1} both the posterior q(x_s | x, x_0) and the model are
Gaussian in the state x_0 + s eps; the posterior's variance is the small one, the model's is
small e^g, and their means differ by (1 - (s / sigma)^2) (D - x_0). So their divergence is

    KL = ( g + e^-g - 1 ) / 2 + e^-g (1 / s^2 - 1 / sigma^2) (D - x_0)^2 / 2 .

With g = 0 it is half the loss in SNR times the image's error (Kingma 2021, arXiv:2107.00630,
Eq. 13). Timesteps count from 0 (diffused one step), as in the released code.

| term | formula | where |
|---|---|---|
| L_0 | -ln of the Gaussian's share of x_0's bin, 1/255 to either side, tails open | Eq. 13 |
| L_1 .. L_T-1 | KL above, g = f ln(large / small) | Eq. 8, 12 |
| prior, Ho's L_T | KL( N(sqrt(alpha_bar) x_0, 1 - alpha_bar) , N(0, 1) ) | Eq. 5 |

f is 0 or 1 for the fixed variances and (v + 1) / 2 for learned ones (Nichol & Dhariwal 2021,
arXiv:2102.09672, Eq. 15). The first step has no small variance, it would be 0; the released code
takes the second's in its place, for both fixed choices. The normal distribution function is the
released code's approximation by a tanh, probabilities are at least 1e-12.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_pl.diffusion.guidance import Clip, clipped
from diffusion_pl.diffusion.levels import alpha_bar_from_sigma, per_image
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.diffusion.posterior import SHARES, large_variance, small_variance
from diffusion_pl.diffusion.timesteps import Timesteps
from diffusion_pl.errors import UserError

Variance = Literal["small", "large", "learned"]
HALF_BIN = 1 / 255  # of 8-bit images in [-1, 1]


@dataclass(frozen=True)
class ReverseChain:
    """The reverse steps of a table, and what each costs.

    Args:
        timesteps: the table.
        variance: "large" is beta_t, "small" beta_tilde_t, "learned" what the network says.
    """

    timesteps: Timesteps
    variance: Variance = "large"

    def __post_init__(self) -> None:
        if self.variance not in (*SHARES, "learned"):
            raise UserError(f"variance must be small, large or learned (got {self.variance!r})")

    def answer(
        self, denoise: Denoise, noisy: Tensor, t: Tensor, **condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the denoiser once.

        Args:
            denoise: D; called with `variance=True` where the variance is learned.
            noisy: x_0 + sigma eps, (B, C, H, W).
            t: timesteps, int64 (B,).
            condition: keyword tensors handed to `denoise` unseen.

        Returns:
            The denoised image (B, C, H, W), and the share f of the large variance in the logarithm:
            (B, C, H, W), or (B, 1, 1, 1) where it is fixed.
        """
        sigma = self.timesteps.sigmas(noisy.device)[t]
        if self.variance == "learned":
            both = denoise(noisy, sigma, variance=True, **condition)
            denoised, said = both.chunk(2, dim=1)
            return denoised, (said + 1) / 2
        denoised = denoise(noisy, sigma, **condition)
        share = torch.where(t > 0, SHARES[self.variance], 0.0)
        return denoised, per_image(share, noisy).to(denoised.dtype)

    def bits(self, image: Tensor, denoised: Tensor, share: Tensor, t: Tensor) -> Tensor:
        """What the step of each image costs: L_t, or L_0 where t = 0.

        Args:
            image: clean images (B, C, H, W) in [-1, 1], with 256 values a channel.
            denoised: D of the noisy images.
            share: f, as `answer` gives it.
            t: timesteps, int64 (B,).

        Returns:
            Bits per dimension, (B,).
        """
        tables = (values[t].to(image.dtype) for values in self._tables(image.device))
        log_small, log_ratio, gain = (per_image(values, image) for values in tables)
        g = share * log_ratio
        error = (denoised - image).square()
        divergence = (g + torch.expm1(-g)) / 2 + gain * torch.exp(-g) * error
        decoder = decoder_nats(image, denoised, log_small + g)
        nats = torch.where(per_image(t == 0, image), decoder, divergence)
        return nats.flatten(1).mean(dim=1) / math.log(2)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """ln small, ln(large / small) and (1 / s^2 - 1 / sigma^2) / 2 a timestep, float64 (T,)."""
        sigma = self.timesteps.sigmas(device)
        sigma_next = torch.cat([sigma.new_zeros(1), sigma[:-1]])
        small, large = small_variance(sigma, sigma_next), large_variance(sigma, sigma_next)
        # The second's in the scale of x_0, sqrt(alpha_bar) times that of the state it leads to.
        small[0] = small[1] * alpha_bar_from_sigma(sigma[0])
        gain = (sigma_next.square().reciprocal() - sigma.square().reciprocal()) / 2
        gain[0] = 0  # the decoder's step; infinity would make its other branch's gradient NaN
        return small.log(), (large / small).log(), gain


def chain_of(objective: object) -> ReverseChain | None:
    """The reverse chain that an objective trains, its own or that of the one inside of it.

    None where it trains the denoiser alone and leaves the variance open.
    """
    chain = getattr(objective, "chain", None)
    if isinstance(chain, ReverseChain):
        return chain
    inner = getattr(objective, "objective", None)
    return None if inner is None else chain_of(inner)


def decoder_nats(image: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-ln p(image) under a Gaussian discretised to 256 values, by element (Ho 2020, Eq. 13).

    Args:
        image: values k / 127.5 - 1, k = 0 .. 255.
        mean: of the Gaussian.
        log_variance: of the Gaussian.

    Returns:
        Nats, from 0 to -ln 1e-12 = 27.6.
    """
    inverse = torch.exp(-log_variance / 2)
    above = _normal_cdf((image - mean + HALF_BIN) * inverse)
    below = _normal_cdf((image - mean - HALF_BIN) * inverse)
    above = torch.where(image > 0.999, 1.0, above)
    below = torch.where(image < -0.999, 0.0, below)
    return -(above - below).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The released code's approximation of the normal distribution function, within 3e-4."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def prior_bits(image: Tensor, timesteps: Timesteps) -> Tensor:
    """What x_T ~ N(0, 1) costs, Ho's L_T: bits per dimension, (B,)."""
    signal = float(alpha_bar_from_sigma(timesteps.sigmas()[-1]))
    # Variance and logarithm nearly cancel, which log1p keeps.
    nats = (signal * image.square() - signal - math.log1p(-signal)) / 2
    return nats.flatten(1).mean(dim=1) / math.log(2)


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound of some images, term by term; every row is one image.

    Args:
        terms: L_0 .. L_T-1, bits per dimension, float64 (B, T).
        prior: L_T, bits per dimension, float64 (B,).
        image_error: mean over pixels of (D - x_0)^2 at each timestep, float64 (B, T).
        noise_error: the same of (eps_hat - eps)^2.
    """

    terms: Tensor
    prior: Tensor
    image_error: Tensor
    noise_error: Tensor

    @property
    def total(self) -> Tensor:
        """The negative log likelihood is at most this: bits per dimension, float64 (B,)."""
        return self.terms.sum(dim=1) + self.prior

    def progressive_code(self) -> tuple[Tensor, Tensor]:
        """Rate and distortion when x_T, x_T-1, ... arrive one by one (Ho 2020, section 4.3).

        Returns:
            The bits per dimension sent when the state of timestep t is there, prior and terms above
            t, and the error of its denoised image, root of the mean square in levels of 255; both
            float64 (T,), means over images (of the square), t = 0 (all but L_0 sent) first.
        """
        above = self.terms.flip(1).cumsum(dim=1).flip(1) - self.terms
        rate = (above + self.prior[:, None]).mean(dim=0)
        return rate, 127.5 * self.image_error.mean(dim=0).sqrt()


@torch.no_grad()
def variational_bound(
    denoise: Denoise,
    image: Tensor,
    timesteps: Timesteps,
    randn_like: Callable[[Tensor], Tensor],
    *,
    variance: Variance = "large",
    clip: Clip = True,
    progress: Callable[[int, int], None] | None = None,
) -> Bound:
    """The bound on the negative log likelihood of images, by one evaluation a timestep.

    An estimate: every timestep sees one draw of noise an image. Published numbers are the mean of
    `total` over all test images, from the averaged weights with dropout off.

    Args:
        denoise: D, its condition closed in; called `denoise(x, sigma)` with sigma (B,), and
            `variance=True` where the variance is learned.
        image: clean images (B, C, H, W) in [-1, 1] that came from bytes.
        timesteps: the table the network was trained on, `objective.preconditioning.timesteps` of
            DDPM and improved DDPM.
        randn_like: draws standard normal noise shaped as its argument, once a timestep; an
            `ImageNoise` makes an image's number independent of its batch.
        variance: of the model's reverse steps.
        clip: clip every denoised image to [-1, 1], as published.
        progress: called with (timesteps done, T).
    """
    chain = ReverseChain(timesteps, variance)
    denoise = clipped(denoise, clip) if clip else denoise
    sigmas = timesteps.sigmas(image.device)
    image = image.to(torch.float64)
    terms, image_error, noise_error = image.new_empty(3, len(image), timesteps.T).unbind()
    for done, step in enumerate(reversed(range(timesteps.T)), start=1):
        t = torch.full((len(image),), step, device=image.device)
        noisy = image + sigmas[step] * randn_like(image)
        denoised, share = chain.answer(denoise, noisy, t)
        terms[:, step] = chain.bits(image, denoised, share, t)
        error = (denoised - image).square().flatten(1).mean(dim=1)
        image_error[:, step], noise_error[:, step] = error, error / sigmas[step].square()
        if progress is not None:
            progress(done, timesteps.T)
    return Bound(terms, prior_bits(image, timesteps), image_error, noise_error)
