"""Token routing in training: Krause et al., TREAD: Token Routing for Efficient
Architecture-agnostic Diffusion Training, 2025, arXiv:2501.04765.

A random part of an image's patches skips a range of blocks and comes back unchanged after it; the
loss is over all patches, and there are no weights for it. ImageNet at 256 pixels in latents, FID
without guidance after 400,000 steps: DiT-B/2 43.47 -> 21.34, DiT-XL/2 19.47 -> 7.38 (Table 2); by
the rate, DiT-B/2: 0.25 26.50, 0.5 21.34, 0.75 49.29 (Table 5). A trained network responds weakly to
classifier-free guidance; see `diffusion.guidance.Routed`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.counted import windows

PLACES = 2**20  # where a window may begin; the most patches of an image, too


@dataclass(frozen=True)
class Routing:
    """Which blocks are skipped, and by how many patches.

    Args:
        rate: share of an image's N patches that skip the blocks, in [0, 1): floor(N rate) of them.
        first: first block that they skip, from 0.
        last: last block that they skip; None: depth - 4, which with first = 2 is better than a
            range that grows with the depth (Table 6).

    Raises:
        UserError: a rate or a block out of range.
    """

    rate: float = 0.5
    first: int = 2
    last: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UserError(f"routing: rate must be in [0, 1) (got {self.rate})")

    def blocks(self, depth: int) -> tuple[int, int]:
        """First and last of the blocks that are skipped.

        Args:
            depth: blocks of the network.

        Raises:
            UserError: there is no such range.
        """
        last = depth - 4 if self.last is None else self.last
        if not 0 <= self.first <= last < depth:
            rule = " (depth - 4)" if self.last is None else ""
            raise UserError(
                f"routing: needs 0 <= first <= last <= {depth - 1}, the network's last block (got "
                f"first: {self.first}, last: {last}{rule}); set routing.first and routing.last"
            )
        return self.first, last


class Router(nn.Module):
    """Chooses the patches of each image that do not skip the blocks.

    Until `begin` says where the windows of a batch begin it draws from torch's own generator.

    Args:
        routing: settings.
        depth: blocks of the network.
    """

    stream = "routing"

    def __init__(self, routing: Routing, depth: int) -> None:
        super().__init__()
        self.p = routing.rate
        self.first, self.last = routing.blocks(depth)
        self.length = PLACES
        self.in_evaluation = 0.0  # the rate outside training
        # Neither buffers nor in the state dict: they are made again from the seed.
        self.ranks: Tensor | None = None
        self.places: Tensor | None = None

    def row(self, source: torch.Generator) -> Tensor:
        """A random order, int32 (2 PLACES,), the second half as the first.

        The ranks within a window are in a uniformly random order too.
        """
        return torch.randperm(self.length, generator=source, dtype=torch.int32).repeat(2)

    def begin(self, row: Tensor, places: Tensor) -> None:
        """Say what is chosen in the next batch.

        Args:
            row: as `row` makes it; on the patches' device.
            places: where each image's window begins, int64 (B,), below PLACES; on their device.
        """
        self.ranks, self.places = row, places

    @contextlib.contextmanager
    def evaluated(self, rate: float, row: Tensor, places: Tensor) -> Iterator[None]:
        """Context in which patches are routed in evaluation too.

        Args:
            rate: share of an image's patches that skip the blocks, in [0, 1).
            row, places: as for `begin`.
        """
        before = self.in_evaluation, self.ranks, self.places
        self.in_evaluation, self.ranks, self.places = rate, row, places
        try:
            yield
        finally:
            self.in_evaluation, self.ranks, self.places = before

    def kept(self, patches: Tensor) -> Tensor | None:
        """The patches that do not skip the blocks, (B, N, width) -> ascending int64 (B, K).

        K is N - floor(N rate). None where that is all of them.

        Raises:
            UserError: neither as many images as `begin` was given, nor a multiple of them.
        """
        images, count, _ = patches.shape
        skipped = math.floor(count * (self.p if self.training else self.in_evaluation))
        if not skipped:
            return None
        if self.ranks is None or self.places is None:
            order = torch.rand(images, count, device=patches.device)
        else:
            order = windows(self.ranks, self.places, count, images)
        return order.argsort(dim=1)[:, : count - skipped].sort(dim=1).values


def taken(tokens: Tensor, kept: Tensor, front: int = 0) -> Tensor:
    """The tokens in front and the chosen patches.

    Args:
        tokens: (B, front + N, width).
        kept: which patches, int64 (B, K), counted from 0 behind the front.
        front: tokens before the patches, which are never routed.

    Returns:
        (B, front + K, width).
    """
    index = kept[..., None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :front], tokens[:, front:].gather(1, index)], dim=1)


def restored(tokens: Tensor, kept: Tensor, patches: Tensor, front: int = 0) -> Tensor:
    """All tokens again: those in front, and the patches, of which the skipped ones are as before.

    Args:
        tokens: (B, front + K, width), after the blocks.
        kept: as for `taken`.
        patches: all of them before the blocks, (B, N, width).
        front: tokens before the patches.

    Returns:
        (B, front + N, width).
    """
    index = kept[..., None].expand(-1, -1, tokens.shape[2])
    whole = patches.to(tokens.dtype).scatter(1, index, tokens[:, front:])
    return torch.cat([tokens[:, :front], whole], dim=1)
