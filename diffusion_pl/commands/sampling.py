"""The sampler of a run, with the options of the command line over its own settings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import partial

import torch

from diffusion_pl.commands import parts
from diffusion_pl.commands.options import RunOptions, SamplerOptions
from diffusion_pl.config import Config
from diffusion_pl.config.targets import locate
from diffusion_pl.diffusion.objective import TrainingObjective, trained_range
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.provenance import described
from diffusion_pl.samplers.named import integrator
from diffusion_pl.samplers.pyramid import PyramidSampler
from diffusion_pl.samplers.sampler import Integrator, Sampler, Visiting

# The config keys that an option sets, which `--set` could set too.
OPTION_KEYS: dict[str, str] = {
    "sampler": r"sampler(\.base)?\.integrate(\..*)?",
    "steps": r"sampler(\.base)?\.steps",
    "guidance": r"evaluation\.guidance",
    "guidance_interval": r"evaluation\.guidance_interval(\..*)?",
    "guide": r"evaluation\.guide(\..*)?",
}

# The sampler may exceed the trained range by this factor, or by this share of it as the network is
# told it (c_noise): near pure noise flow matching's time hardly changes, however large sigma gets.
# At the other end details are still drawn, so there sigma may be lower by FAR at most.
SLACK, SHARE, FAR = 1.1, 0.05, 4.0


def refuse_duplicates(sampling: SamplerOptions, options: RunOptions) -> None:
    """Refuse a setting that is given both by its option and by `--set`.

    Raises:
        UserError: names both.
    """
    given = vars(sampling) | vars(options)
    for name, pattern in OPTION_KEYS.items():
        value = given[name]
        for word in options.set:
            key = word.partition("=")[0].strip()
            if value is not None and re.fullmatch(pattern, key):
                option = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"--set {word}: {option} sets the same; leave one of them out")


def sampler_of(
    options: SamplerOptions, experiment: Config, objective: TrainingObjective
) -> tuple[Sampler | PyramidSampler, str | None]:
    """The run's sampler, with the integrator and number of steps of the options.

    Noise range, spacing, clipping and start stay the run's; for a pyramid the base is changed.

    Args:
        options: `sampler`, a name or the dotted path of a function, and `steps`.
        experiment: bound.
        objective: of the run.

    Returns:
        The sampler; and for another integrator a line that says what changed and what did not.

    Raises:
        UserError: no such integrator, or a sampler that does not fit the run.
    """
    given = None if options.sampler is None else integrator_of(options.sampler)
    differences: list[str] = []

    def changed(own: Sampler) -> Sampler:
        new = own
        if given is not None:
            new = dataclasses.replace(new, integrate=fitted(given, own.integrate, objective))
        if options.steps is not None:
            new = dataclasses.replace(new, steps=options.steps)
        differences.append(difference(own, new))
        return new

    sampler = parts.sampler_of(experiment, objective, changed)
    return sampler, None if given is None else differences[0]


def untrained_levels(sampler: Visiting, objective: TrainingObjective) -> str | None:
    """A warning that the sampler visits noise levels outside the trained range; None inside."""
    low, high = trained_range(objective)
    visited = sampler.sigmas()[:-1]
    first, last = float(visited[0]), float(visited[-1])
    told = torch.tensor([low, high, last, first], dtype=torch.float64)
    ends = objective.preconditioning(told).c_noise.to(torch.float64)
    near = (ends[2:] - ends[:2]).abs() <= SHARE * (ends[1] - ends[0]).abs()
    if (first <= high * SLACK or near[1]) and (
        last * SLACK >= low or (near[0] and last * FAR >= low)
    ):
        return None
    return (
        f"the sampler visits sigma {first:.4g} to {last:.4g}, but training sampled {high:.4g} to "
        f"{low:.4g} (all but one image in a million): the network is untrained beyond"
    )


def integrator_of(name: str) -> Integrator:
    """An integrator by its name, or by the dotted path of a user's function.

    Raises:
        UserError: there is none, or its signature is another.
    """
    if "." not in name:
        return integrator(name)
    try:
        function: Integrator = locate(name)
        inspect.signature(function).bind("denoise", "x", "sigmas", "randn_like")
    except ValueError as error:
        raise UserError(f"--sampler: {error}") from error
    except TypeError as error:
        raise UserError(
            f"--sampler: {name} cannot be called with (denoise, x, sigmas, randn_like) ({error})"
        ) from error
    return function


def fitted(given: Integrator, own: Integrator, objective: TrainingObjective) -> Integrator:
    """The integrator with the discrete levels of the network that the run's own rounds to, and in
    the time of flow matching with the objective's scale of the noise."""
    settings = getattr(own, "keywords", {})
    if isinstance(given, partial) and "noise_scale" in given.keywords:
        scale = getattr(objective.preconditioning, "noise_scale", 1.0)
        return partial(given, noise_scale=settings.get("noise_scale") or scale)
    nearest = settings.get("nearest")
    if nearest is None or "nearest" not in inspect.signature(given).parameters:
        return given
    return partial(given, nearest=nearest)  # type: ignore[call-arg]


def difference(own: Sampler, new: Sampler) -> str:
    """What differs between the run's sampler and the one in its place, and what does not."""
    changes = [f"{described(own.integrate)} -> {described(new.integrate)}"]
    if new.steps != own.steps:
        changes.append(f"steps {own.steps} -> {new.steps}")
    sigmas = new.sigmas()
    kept = [f"noise {float(sigmas[0]):.4g} to {float(sigmas[-2]):.4g} of {described(new.schedule)}"]
    kept += [f"{len(sigmas) - 1} steps"] if new.steps == own.steps else []
    kept += [
        name for name in ("clip_denoised", "unit_start", "velocity_clamp") if getattr(new, name)
    ]
    return f"sampler: {', '.join(changes)}; the run's own: {', '.join(kept)}"
