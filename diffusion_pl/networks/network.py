"""What every network takes: noisy images, their noise level, and the condition."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from diffusion_pl.errors import UserError
from diffusion_pl.networks.position import PositionEncoding


class Network(nn.Module):
    """The raw network F(c_in x; c_noise, condition); a subclass has `embed` and `denoise`.

    `embed(c_noise, **condition)` makes the embedding vector (B, length) of c_noise (B,) and those
    conditions that are given. `denoise(x, embedding)` makes the output of the image.

    Args:
        resolution: H = W of the images it is built for.
        channels: image channels.
        classes: number of labels, 0 for none.
        halvings: how often an image is halved on its way down.
        augment: length of the augmentation label, 9 for EDM's pipe, 0 for none.
        position_frequencies: L of the position encoding that joins the image at the input; 0 for
            none.
        frame: side of the full-resolution grid that positions refer to; the resolution if None.
        learned_variance: C output channels more, for the variance of the reverse steps.
        activation_checkpointing: keep only what passes between blocks in training; the backward
            pass runs every block again. Less memory for a third more time, the same numbers.

    Raises:
        UserError: a resolution that cannot be halved so often.
    """

    embed: Callable[..., Tensor]
    denoise: Callable[[Tensor, Tensor], Tensor]

    def __init__(
        self,
        resolution: int,
        channels: int,
        classes: int,
        halvings: int,
        *,
        augment: int = 0,
        position_frequencies: int = 0,
        frame: int | None = None,
        learned_variance: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.classes = classes
        self.augment = augment
        self.activation_checkpointing = activation_checkpointing
        self.divisor = 2**halvings
        self.check_resolution(resolution, resolution)
        self.position = PositionEncoding(position_frequencies, frame or resolution)
        self.in_channels = channels + self.position.channels
        self.out_channels = 2 * channels if learned_variance else channels

    def check_resolution(self, height: int, width: int) -> None:
        """Raise UserError unless the images can be halved as often as the network does."""
        if height % self.divisor or width % self.divisor:
            raise UserError(
                f"the network halves images {self.divisor.bit_length() - 1} times, so their sides "
                f"must be multiples of {self.divisor} (got {height} x {width})"
            )

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        *,
        position: Tensor | None = None,
        **condition: Tensor | None,
    ) -> Tensor:
        """Apply the raw network F.

        Args:
            x: preconditioned noisy images (B, C, H, W), sides divisible by 2^halvings.
            c_noise: (B,), the noise level in the preconditioning's own coordinate: a timestep 0 to
                T - 1 (need not be whole), log(sigma) / 4, ...
            position: where the pixels lie in the full frame, in [0, 1], (B, 2, H, W) or
                (2, H, W); None where x is the whole image.
            condition: `label`, int64 (B,), 0 .. classes - 1, -1 for no label; `augment`, float
                (B, augment), zeros for no augmentation; None is as if not given.

        Returns:
            (B, C, H, W), or (B, 2 C, H, W) with `learned_variance`.

        Raises:
            UserError: a resolution that cannot be halved so often, or a condition that the network
                does not take.
        """
        self.check_resolution(*x.shape[2:])
        given = {name: value for name, value in condition.items() if value is not None}
        if "label" in given and not self.classes:
            raise UserError("labels were given to a network without classes (classes: 0)")
        if "augment" in given and not self.augment:
            raise UserError("augmentation labels were given to a network with augment: 0")
        return self.denoise(self.position(x, position), self.embed(c_noise, **given))
