"""What a command asks of the images that it samples: the sources of their conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from diffusion_pl import text
from diffusion_pl.commands.labels import class_of
from diffusion_pl.commands.options import ConditionOptions
from diffusion_pl.data.decode import decode, read_square
from diffusion_pl.data.loader import Degradation
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation
from diffusion_pl.evaluation.prompts import TextEncoder, encoded, located, read_prompts
from diffusion_pl.evaluation.sources import GivenImages, Source, sources_of
from diffusion_pl.images import ImageDataset
from diffusion_pl.io.files import read_named
from diffusion_pl.text.encoders import HUGGING_FACE


def sources(
    options: ConditionOptions,
    taken: Mapping[str, int],
    settings: Evaluation,
    *,
    class_names: Sequence[str],
    encoder: TextEncoder | None,
    length: int,
    open_data: Callable[[], ImageDataset],
    dropout: Mapping[str, float],
    degradation: Degradation | None = None,
    shape: tuple[int, int, int] = (0, 0, 0),
) -> tuple[Source, ...]:
    """The sources for all that a model takes; without prompts or images, those of its data.

    Args:
        options: what is asked for.
        taken: how much of each kind the model takes, see `conditions.sizes`.
        settings: of the run's evaluation, for what is not asked for.
        class_names: of the model, in order.
        encoder: of the captions that it was trained with.
        length: tokens of its texts.
        open_data: opens the run's data.
        dropout: of its conditions in training.
        degradation: what the model was given of images in training, None for nothing.
        shape: (C, H, W) of a sample.

    Raises:
        UserError: what is asked for does not fit the model, or there are no captions.
    """
    label = class_of(options.label, class_names, taken["label"])
    if label is not None and not taken["label"]:
        raise UserError(f"label {label}: the model has no classes; leave it out")
    words = _words(options)
    if words and not taken["text"]:
        raise UserError("--prompt: the model was trained without text; leave it out")
    if not words and settings.prompts is not None and taken["text"]:
        words = read_prompts(located(settings.prompts))
    if options.image and (degradation is None or not taken["image"]):
        raise UserError("--image: the model was trained without images to go by; leave it out")
    given = None
    if options.image and degradation is not None:
        given = GivenImages(read_given(options.image, degradation, shape), degradation, shape[2])
    wants_images = degradation is not None and given is None
    images = prompts = None
    if words:
        prompts = encoded(words, _encoder(encoder, options.encoder, taken["text"], length))
    if (taken["text"] and not words) or wants_images:
        images = _data(open_data, bool(words) or not taken["text"])
    return sources_of(
        taken, images, balanced=settings.labels == "balanced", label=label, prompts=prompts,
        given=given, degradation=degradation, dropout=dropout, encoder=encoder,
    )  # fmt: skip


def read_given(
    paths: Sequence[Path], degradation: Degradation, shape: tuple[int, int, int]
) -> list[torch.Tensor]:
    """Image files of the sample's size, or already degraded and smaller, each uint8 (C, H, W).

    Args:
        paths: PNG, JPEG or WebP.
        degradation: of the model's training.
        shape: (C, H, W) of a sample.

    Raises:
        UserError: a file cannot be read, or has another size.
    """
    found = []
    for path in paths:
        content = read_named(path)
        width, height = decode(content, where=str(path)).size
        fitting = [(shape[1] // times, shape[2] // times) for times in {1, degradation.times}]
        if (height, width) not in fitting:
            known = " or ".join(f"{w} x {h}" for h, w in sorted(fitting, reverse=True))
            raise UserError(f"{path}: is {width} x {height} pixels, and the model takes {known}")
        pixels = read_square(content, width, "exact", where=str(path), channels=shape[0])
        found.append(torch.from_numpy(pixels.copy()))
    return found


def require(options: ConditionOptions, taken: Mapping[str, int]) -> None:
    """Refuse to guess the conditions of images that the user has.

    Raises:
        UserError: the model takes a condition that is not given.
    """
    if taken["label"] and options.label is None:
        raise UserError(f"--label: name the images' class, 0 to {taken['label'] - 1}")
    if taken["text"] and not _words(options):
        raise UserError("--prompt: describe the images, the model was trained with captions")
    if taken["image"] and not options.image:
        raise UserError("--image: name the image to go by, the model was trained with images")


def _words(options: ConditionOptions) -> tuple[str, ...]:
    """The prompts of the options; () where there are none."""
    if options.prompt and options.prompts is not None:
        raise UserError("--prompt and --prompts: give prompts by one of them")
    return options.prompt if options.prompts is None else read_prompts(options.prompts)


def _encoder(known: TextEncoder | None, name: str | None, width: int, length: int) -> text.Encoder:
    """The encoder of the model's captions.

    Args:
        known: what the checkpoint says of it.
        name: what the user says.
        width, length: of the model's text.
    """
    if name is None and known is None:
        raise UserError(
            "--prompt: the checkpoint does not say by which encoder its captions were encoded; "
            "name it: --encoder"
        )
    if known is not None and name is None and known.name.startswith(HUGGING_FACE):
        raise UserError(
            f"--prompt: the model's captions were encoded by {known.name}, at the word of the "
            f"checkpoint; if you trust it, name it: --encoder {known.name}"
        )
    if known is not None:
        return known.load(name)
    assert name is not None
    encoder = text.encoder(name, length)
    if encoder.width != width:
        raise UserError(
            f"--encoder {name}: gives {encoder.width} numbers a token, and the model takes {width}"
        )
    return encoder


def _data(open_data: Callable[[], ImageDataset], for_images: bool) -> ImageDataset:
    """The run's data, for its captions or for its images alone."""
    what, option, drawn = "text", "--prompt", "captions"
    if for_images:
        what, option, drawn = "images", "--image", "images"
    try:
        images = open_data()
    except UserError as error:
        raise UserError(
            f"the model takes {what}; give {option}, or the data whose {drawn} to draw ({error})"
        ) from error
    if not for_images and images.texts is None:
        raise UserError(f"{images.name} has no encoded captions to draw; give --prompt")
    return images
