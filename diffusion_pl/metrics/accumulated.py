"""States of the metrics as torchmetrics, which accumulate over batches and devices.

Separate from the formulas, so that binding an experiment's YAML does not import torchmetrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from diffusion_pl import ranks
from diffusion_pl.errors import UserError
from diffusion_pl.metrics.features import Features
from diffusion_pl.metrics.moments import Moments, Rows, add_, moments

Values = dict[str, float]
Notes = dict[str, Any]
Kind = Literal["pooled", "spatial", "logits"]


class Kept(Metric):
    """Keeps all features of a kind; in the images' order if each rank has consecutive images.

    Args:
        of: kind of features, or what makes numbers (B, D) of a batch.
        dimension: D.
        formula: from features (N, D) to named values, or to these and notes.
    """

    is_differentiable = False
    full_state_update = False

    features: list[Tensor]

    def __init__(
        self,
        of: Kind | Callable[[Features], Tensor],
        dimension: int,
        formula: Callable[[Tensor], Values | tuple[Values, Notes]],
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._of, self._dimension, self._formula = of, dimension, formula
        self.notes: Mapping[str, Any] = {}
        self.add_state("features", [], dist_reduce_fx="cat")

    def update(self, features: Features) -> None:
        """Add a batch, (B, D)."""
        of = self._of
        self.features.append(of(features) if callable(of) else _of_kind(features, of))

    def sync(self, *options: Any, **more: Any) -> None:
        """Gather from all ranks, also those without images."""
        _never_empty(self.features, self._dimension, self.device)
        super().sync(*options, **more)

    def compute(self) -> Values:
        """Named values; adds the formula's notes to `notes`.

        Raises:
            UserError: non-finite features.
        """
        found = self._formula(_finite(dim_zero_cat(self.features)))
        values, notes = found if isinstance(found, tuple) else (found, {})
        self.notes = {**self.notes, **notes}
        return values


class Summed(Metric):
    """Sums moments of features of a kind in float64.

    Args:
        of: kind of features.
        shift: (D,), subtracted before summing.
        formula: from moments, and all features if kept, to named values and notes.
        keep: also keep the features.
    """

    is_differentiable = False
    full_state_update = False

    first: Tensor
    second: Tensor
    count: Tensor

    def __init__(
        self,
        of: Kind,
        shift: Tensor,
        formula: Callable[[Moments, Tensor | None], tuple[Values, Notes]],
        *,
        keep: bool,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._of, self._shift, self._formula = of, shift, formula
        self._rows = Rows()
        self._kept: list[Tensor] | None = [] if keep else None
        self.notes: Mapping[str, Any] = {}
        dimension = len(shift)
        for name, shape in (("first", (dimension,)), ("second", (dimension, dimension))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Features) -> None:
        """Add a batch, (B, D)."""
        values = _of_kind(features, self._of)
        self.count += len(values)
        if self._kept is not None:
            self._kept.append(values)
        self._sum(self._rows.add(values))

    def sync(self, *options: Any, **more: Any) -> None:
        """Sum over the ranks, after the buffered rows."""
        self._sum(self._rows.rest())
        # torchmetrics would gather the sums of all ranks, 32 MiB each for Inception, and then add.
        more["dist_sync_fn"] = more.get("dist_sync_fn") or _added_up
        super().sync(*options, **more)

    def reset(self) -> None:
        self._rows.clear()
        if self._kept is not None:
            self._kept.clear()
        super().reset()

    def compute(self) -> Values:
        """Named values; sets `notes`.

        Raises:
            UserError: non-finite features.
        """
        self._sum(self._rows.rest())
        # Not in each update, which would wait for the device.
        _finite(self.second)
        seen = moments(self.first, self.second, int(self.count), self._shift)
        values, self.notes = self._formula(seen, self._all_kept())
        return values

    def _all_kept(self) -> Tensor | None:
        if self._kept is None:
            return None
        _never_empty(self._kept, len(self._shift), self.device)
        return ranks.gather(torch.cat(self._kept)).cpu()

    def _sum(self, rows: Tensor | None) -> None:
        if rows is not None:
            add_(self.first, self.second, rows, self._shift)


def _added_up(sums: Tensor, group: object = None) -> list[Tensor]:
    return [ranks.sum_over_ranks(sums)]  # torchmetrics sums a list over ranks


def _of_kind(features: Features, of: Kind) -> Tensor:
    values: Tensor | None = getattr(features, of)
    assert values is not None, f"the extractor gives no {of} features"
    return values


def _never_empty(features: list[Tensor], dimension: int, device: torch.device) -> None:
    # Gathering needs equal numbers of dimensions; torchmetrics would send (0,).
    if not features:
        features.append(torch.empty(0, dimension, device=device))


def _finite(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise UserError("evaluation: some features are not finite; look at the generated images")
    return values
