"""The options that several commands share, and how they are parsed.

A command is the function `command` of its module, and its signature is its options: help, the
command line and Python read them there. Its annotations and defaults are Python's own or stand
here, so that help imports no command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from diffusion_pl.errors import UserError
from diffusion_pl.signals import StopRequest

PATHS = ("guide", "start")

__all__ = ["Annotated", "Literal", "Parameter", "Path", "StopRequest"]  # of the signatures, too


def weights(text: str) -> str:
    """Parse "ema", "denoiser" or "ema:LENGTH".

    Raises:
        ValueError: it is none of them.
    """
    kind, colon, length = text.partition(":")
    if kind not in ("ema", "denoiser") or (colon and kind != "ema"):
        raise ValueError(f"ema, denoiser or ema:LENGTH (got {text!r})")
    if colon:
        try:
            float(length)
        except ValueError as error:
            raise ValueError(f"a length is a number (got {length!r})") from error
    return text


def guidance(text: str) -> float | dict[str, float]:
    """Parse a weight, or a weight for each kind of condition, KIND=WEIGHT,...

    Raises:
        ValueError: not a number.
    """
    try:
        if "=" not in text:
            return float(text)
        pairs = [word.partition("=") for word in text.split(",")]
        found = {kind.strip(): float(weight) for kind, _, weight in pairs}
        if len(found) < len(pairs):
            raise ValueError("a kind twice")
        return found
    except ValueError as error:
        raise ValueError(f"a number, or KIND=NUMBER,... (got {text!r})") from error


def swept(text: str) -> float | str:
    """Parse a weight of several: a number, or KIND=NUMBER+KIND=NUMBER+..., which stays a text.

    Raises:
        ValueError: neither.
    """
    try:
        weight = guidance(text.replace("+", ",") if "=" in text else text)
    except ValueError as error:
        wanted = "numbers between commas, or KIND=NUMBER, of several kinds KIND=NUMBER+KIND=NUMBER"
        raise ValueError(f"{wanted} (got {text!r})") from error
    return text if isinstance(weight, dict) else weight


def interval(text: str) -> tuple[float, float]:
    """Parse two noise levels, LOW,HIGH.

    Raises:
        ValueError: not two numbers.
    """
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise ValueError(f"two numbers, as LOW,HIGH (got {text!r})") from error
    return low, high


def whole(text: str) -> int:
    """Parse a whole number; of 1.5 cyclopts would make 2.

    Raises:
        ValueError: it is none, or needs more than 64 bits.
    """
    if not re.fullmatch(r"[+-]?\d+(_\d+)*", text.strip()):
        raise ValueError(f"a whole number (got {text!r})")
    if len(text) > 30 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"a whole number below 2^63 (got {text[:30]!r})")
    return int(text)


def listed(each: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A parser of values between commas, each parsed by `each`."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(each(word) for word in text.split(",") if word)
        except ValueError as error:
            if each in (int, float):
                kind = "whole numbers" if each is int else "numbers"
                raise ValueError(f"{kind} between commas (got {text!r})") from error
            raise

    return read


def _read(by: Callable[[str], Any], shown: str) -> Parameter:
    """A parameter parsed by a function, with its placeholder in help."""

    def convert(hint: Any, tokens: Sequence[Any]) -> Any:
        return by(tokens[0].value)

    return Parameter(converter=convert, n_tokens=1, accepts_keys=False, metavar=shown)


Json = Annotated[bool, Parameter(help="the result as JSON on a terminal too, as in a pipe")]
Repeated = Annotated[tuple[str, ...], Parameter(show_default=False)]
RepeatedPaths = Annotated[tuple[Path, ...], Parameter(show_default=False)]
Allow = Annotated[
    tuple[str, ...],
    Parameter(
        show_default=False,
        help="trust a file of others with it: a package, or the address of data",
    ),
]
RunFolder = Annotated[Path, Parameter(help="a run's folder")]
RunPath = Annotated[Path, Parameter(help="a run's folder, or a checkpoint file")]
BaseAlone = Annotated[
    bool,
    Parameter(help="for a pyramid: its base at full size, which is not how the run samples"),
]
Guidance = Annotated[float | dict[str, float], _read(guidance, "WEIGHT")]
Interval = Annotated[tuple[float, float], _read(interval, "LOW,HIGH")]
Weights = Annotated[str, _read(weights, "KIND")]
Words = Annotated[tuple[str, ...], _read(listed(str), "NAME,...")]
Integer = Annotated[int, _read(whole, "INT")]
Integers = Annotated[tuple[int, ...], _read(listed(int), "N,...")]
Numbers = Annotated[tuple[float, ...], _read(listed(float), "NUMBER,...")]
SeveralGuidance = Annotated[tuple[float | str, ...], _read(listed(swept), "WEIGHT,...")]
SeveralWeights = Annotated[tuple[str, ...], _read(listed(weights), "KIND,...")]


@Parameter(name="*", group=Group("Sampling", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """How images are sampled; the run's own when not given.

    Args:
        sampler: heun, deis, ... (docs/samplers.md) or a function's path, on the run's own levels.
        steps: of the sampler.
        guidance: weight, 1 for none; or of each kind of condition: text=3,label=1.5.
        weights: ema, denoiser (raw), or ema:0.1 for the average of that length.
    """

    sampler: str | None = None
    steps: Integer | None = None
    guidance: Guidance | None = None
    weights: Weights = "ema"


@Parameter(name="*", group=Group("Conditions", sort_key=0))
@dataclass(frozen=True, kw_only=True)
class ConditionOptions:
    """What the images are to be.

    Args:
        label: class of every image, its name or index; uniform when not given.
        prompt: what the images show; of several, image i has number i modulo how many there are.
        prompts: file of prompts, a line each.
        encoder: the model's text encoder, where it is not found by its own name.
        image: file to go by, of a model that takes images; of several, image i takes number i
            modulo how many there are.
    """

    label: str | int | None = None
    prompt: Repeated = ()
    prompts: Path | None = None
    encoder: str | None = None
    image: RepeatedPaths = ()


@Parameter(name="*", group=Group("Run", sort_key=2))
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is opened, and further settings of its images.

    Args:
        seed: of noise and labels.
        guidance_interval: sigmas that are guided.
        guide: a weaker run, for autoguidance; or routed, routed:RATE: the run with routed tokens.
        batch_size: images per batch; changes no image and no number.
        device: cpu, cuda or auto.
        set: KEY=VALUE over the run's config.
    """

    seed: Integer = 0
    guidance_interval: Interval | None = None
    guide: Path | None = None
    batch_size: Integer | None = None
    device: str = "auto"
    allow: Allow = ()
    set: Repeated = ()

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1 (got {self.batch_size})")


@Parameter(name="*", group=Group("Measuring", sort_key=3))
@dataclass(frozen=True, kw_only=True)
class MetricOptions:
    """Metrics and their reference.

    Args:
        count: number of images; the experiment's, or all of the files, when not given.
        reference: statistics (.safetensors, .npz), an experiment's data, or images.
        resize: enlarge smaller images of the reference.
        subset_size: images per subset of the kernel distance; at most 1000 when not given.
        metrics: frechet, spatial, score, kernel, precision_recall, density_coverage,
            cmmd, agreement, clip_score, or all.
    """

    count: Integer | None = None
    reference: str | None = None
    resize: bool = False
    subset_size: Integer | None = None
    metrics: Words | None = None


@Parameter(name="*", group=Group("Features", sort_key=4))
@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """The feature extractor.

    Args:
        features: inception, shapes, pixels, dinov2-vit-l-14, ... or auto; the run's when not given.
        feature_weights: file of Inception's or CLIP's weights.
        feature_precision: of Inception; the error of bf16 is measured and recorded.
    """

    features: str | None = None
    feature_weights: str | None = None
    feature_precision: Literal["fp32", "bf16"] = "fp32"


@Parameter(name="*", group=Group("Training", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a run starts from, and which differences are accepted.

    Args:
        start: a run or checkpoint whose weights a new run starts from: fine-tuning.
        data_changed: resume though the data has changed.
        fresh_labels: with --from: initialise the labels' weights.
        accept_differences: with --from: though objective or network differ.
    """

    start: Annotated[Path | None, Parameter(name="--from")] = None
    data_changed: bool = False
    fresh_labels: bool = False
    accept_differences: bool = False
    allow: Allow = ()


@Parameter(name="*", group=Group("Job", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The resources of a SLURM job.

    Args:
        run: the run's folder; runs/EXPERIMENT when not given.
        data_changed: resume though the data has changed.
        nodes: number of nodes.
        gpus: per node, a process each.
        tasks: processes per node, without GPUs.
        cpus: cores per process; one, and one for each data worker, when not given.
        time: limit until the job is requeued.
        margin: seconds before the limit at which the job is signalled; three saves when not given.
        container: image to run in, by apptainer.
        sweep: KEY=V,V: a run for each value, as a job array.
        sbatch: an option of sbatch, as --sbatch=--partition=gpu.
    """

    run: Path | None = None
    data_changed: bool = False
    allow: Allow = ()
    nodes: Integer = 1
    gpus: Integer = 1
    tasks: Integer | None = None
    cpus: Integer | None = None
    time: str = "24:00:00"
    margin: Integer | None = None
    container: str | None = None
    sweep: Repeated = ()
    sbatch: Repeated = ()

    @property
    def ranks(self) -> int:
        """Processes per node."""
        return self.gpus if self.tasks is None else self.tasks


def grouped(command: str, given: Mapping[str, Any], *groups: type) -> list[Any]:
    """Options given from Python, sorted into a command's groups.

    Args:
        command: its name, for messages.
        given: option to value.
        groups: classes of this module.

    Raises:
        UserError: an option that the command does not have.
    """
    from diffusion_pl.config.words import expand_home  # help answers without it

    group_of = {field.name: group for group in groups for field in fields(group)}
    for name in given:
        if name not in group_of:
            known = ", ".join(sorted(group_of))
            raise UserError(f"{name}: is no option of {command}; there are {known}")
    values = {
        name: Path(expand_home(str(value), name)) if name in PATHS else value
        for name, value in given.items()
        if value is not None
    }
    return [
        group(**{name: value for name, value in values.items() if group_of[name] is group})
        for group in groups
    ]
