"""What a command asks of the images that it samples: the sources of their conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from diffusion_pl.commands.labels import class_of
from diffusion_pl.commands.options import ConditionOptions
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.sources import Source, sources_of
from diffusion_pl.images import ImageDataset


def sources(
    options: ConditionOptions,
    taken: Mapping[str, int],
    *,
    class_names: Sequence[str],
    balanced: bool,
    open_data: Callable[[], ImageDataset],
) -> tuple[Source, ...]:
    """The sources for all that a model takes; without prompts, captions of its data.

    Args:
        options: what is asked for.
        taken: how much of each kind the model takes, see `conditions.sizes`.
        class_names: of the model, in order.
        balanced: without a label, the classes in turn.
        open_data: opens the run's data.

    Raises:
        UserError: what is asked for does not fit the model, or there are no captions.
    """
    label = class_of(options.label, class_names, taken["label"])
    if label is not None and not taken["label"]:
        raise UserError(f"label {label}: the model has no classes; leave it out")
    images = None
    if taken["text"]:
        images = open_data()
        if images.texts is None:
            raise UserError(f"{images.name} has no encoded captions to sample by")
    return sources_of(taken, images, balanced=balanced, label=label)


def require(options: ConditionOptions, taken: Mapping[str, int]) -> None:
    """Refuse to guess the conditions of images that the user has.

    Raises:
        UserError: the model takes a condition that is not given.
    """
    if taken["label"] and options.label is None:
        raise UserError(f"--label: name the images' class, 0 to {taken['label'] - 1}")
