"""Classifier-free guidance: extrapolation from the model without its conditions to that with them.

| guidance | formula | source |
|---|---|---|
| of all together | D_none + w (D_all - D_none) | Ho & Salimans 2022, arXiv:2207.12598, Eq. 6 |
| of each kind | D_all + sum_k (w_k - 1) (D_all - D_without_k) | the same, one by one |

What a network says of the variance is never extrapolated: it stays the conditional model's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.diffusion.conditions import HIDEABLE, Condition, without
from diffusion_pl.diffusion.objective import Denoise
from diffusion_pl.errors import UserError

# Of all conditions together, or of each kind by its name.
Weight = float | Mapping[str, float]


def is_plain(weight: Weight) -> bool:
    """Whether a weight asks for the model as it is."""
    return all(each == 1 for each in (weight.values() if isinstance(weight, Mapping) else [weight]))


def check_guidance(
    weight: Weight,
    *,
    taken: Mapping[str, int],
    dropout: Mapping[str, float],
) -> None:
    """Refuse a guidance by the model without its conditions where it has none, or that was never
    trained.

    Args:
        weight: of the guidance; 1 needs nothing.
        taken: how much of each kind of condition the model takes, see `conditions.sizes`.
        dropout: share of the images that each kind was hidden from in training; absent: 0.

    Raises:
        UserError: says what to do.
    """
    for each in weight.values() if isinstance(weight, Mapping) else [weight]:
        if not math.isfinite(each):
            raise UserError(f"guidance must be a finite number (got {each})")
    if is_plain(weight):
        return
    known = [kind for kind, size in taken.items() if size]
    if not known:
        raise UserError(
            "guidance needs a model with classes, text or images; this one is unconditional (a "
            "weaker run can guide it: --guide RUN)"
        )
    if not isinstance(weight, Mapping):
        if not removable(known, dropout):
            _check_trained(known[0], weight, dropout.get(known[0], 0.0))
        return
    for kind, each in weight.items():
        if kind not in known:
            raise UserError(
                f"guidance.{kind}: is no condition of this model, which takes {', '.join(known)}"
            )
        if each != 1:
            _check_trained(kind, each, dropout.get(kind, 0.0))


def _check_trained(kind: str, weight: float, share: float) -> None:
    """Refuse a kind that was never hidden in training, or always."""
    if not share:
        raise UserError(
            f"guidance {weight:g} needs the model without its {kind}, which was never trained "
            f"(trainer.dropout.{kind} is 0); train or fine-tune with trainer.dropout.{kind}=0.1, "
            "or let a weaker run guide: --guide RUN"
        )
    if share >= 1:
        raise UserError(
            f"guidance {weight:g} needs the model with its {kind}, which was never trained "
            f"(trainer.dropout.{kind} is 1); train with trainer.dropout.{kind}=0.1"
        )


def removable(kinds: Iterable[str], dropout: Mapping[str, float]) -> tuple[str, ...]:
    """The kinds that a model was trained with and without."""
    return tuple(kind for kind in kinds if 0 < dropout.get(kind, 0.0) < 1)


def classifier_free(
    denoise: Denoise,
    *,
    condition: Condition,
    weight: Weight,
    kinds: Collection[str] = HIDEABLE,
) -> Denoise:
    """Classifier-free guidance, D = D_none + weight (D_all - D_none) (Ho & Salimans 2022).

    With a weight for each kind of condition, D = D_all + sum_k (w_k - 1) (D_all - D_without_k): as
    for one, each power p(c_k | x, the others)^(w_k - 1) adds its score to that of p(x | all).

    Args:
        denoise: a conditional denoiser that was trained with dropout of the conditions.
        condition: what the images are to be, a row an image.
        weight: 1 is the plain conditional model, 0 the unconditional one; in the notation of the
            paper weight = 1 + w. Each call then costs one evaluation of the network on 2 B images,
            with K weights other than 1 on (1 + K) B.
        kinds: that one weight removes together.

    Returns:
        A denoiser `(x, sigma) -> x_hat` with the condition closed in.
    """
    if isinstance(weight, Mapping):
        terms: list[tuple[Collection[str], float]] = [((kind,), w) for kind, w in weight.items()]
    else:
        terms = [(kinds, weight)]
    terms = [(hidden, w) for hidden, w in terms if w != 1]
    if not terms:
        return conditioned(denoise, **condition)
    variants = [condition, *(without(condition, hidden) for hidden, _ in terms)]
    joined = {key: torch.cat([each[key] for each in variants]) for key in condition}
    count = len(variants)

    def guide(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        levels = sigma.repeat(count) if sigma.ndim else sigma
        answers = denoise(x.repeat(count, 1, 1, 1), levels, **joined, **more)
        strong, *weak = answers.chunk(count)
        answer = strong
        for each, (_, w) in zip(weak, terms, strict=True):
            change = extrapolated(each, strong, w, x.shape[1])
            answer = change if answer is strong else answer + (change - strong)
        return answer

    return guide


def extrapolated(weak: Tensor, strong: Tensor, weight: float, channels: int) -> Tensor:
    """weak + weight (strong - weak) in the image's channels, the strong one's beyond them."""
    image, beside = strong.tensor_split([channels], dim=1)
    if beside.shape[1]:
        return torch.cat([extrapolated(weak, image, weight, channels), beside], dim=1)
    start = weak[:, :channels]
    return start + weight * (image - start)


def conditioned(denoise: Denoise, **condition: Any) -> Denoise:
    """Close a condition in, so that a sampler never sees it."""

    def with_condition(x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        return denoise(x, sigma, **condition, **more)

    return with_condition
