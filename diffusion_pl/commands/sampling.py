"""How a run is drawn from: its own sampler, and over it what the command line says."""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import partial

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

# What an option says that `--set` could say too.
OPTION_KEYS: dict[str, str] = {
    "sampler": r"sampler(\.base)?\.integrate(\..*)?",
    "steps": r"sampler(\.base)?\.steps",
    "guidance": r"evaluation\.guidance",
    "guidance_interval": r"evaluation\.guidance_interval(\..*)?",
    "guide": r"evaluation\.guide(\..*)?",
}

# A level so much beyond those of the training is still one of them.
SLACK = 1.1


def refuse_twice(sampling: SamplerOptions, options: RunOptions) -> None:
    """See that no setting is given by an option and by `--set`: one of them would do nothing.

    Raises:
        UserError: names both.
    """
    said = vars(sampling) | vars(options)
    for name, pattern in OPTION_KEYS.items():
        value = said[name]
        for word in options.set:
            key = word.partition("=")[0].strip()
            if value is not None and re.fullmatch(pattern, key):
                option = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"--set {word}: {option} takes its place; leave one of them out")


def sampler_of(
    options: SamplerOptions, experiment: Config, objective: TrainingObjective
) -> tuple[Sampler | PyramidSampler, str | None]:
    """The run's sampler, with another integrator or other steps where the command line says so.

    Noise range, spacing, clipping and start stay the run's; of a pyramid its base is changed.

    Args:
        options: `sampler`, a name or the dotted path of a function, and `steps`; None for none.
        experiment: bound.
        objective: knows the network's levels.

    Returns:
        The sampler, and what another integrator changed and what it left, in words.

    Raises:
        UserError: no such name, or no such function.
        ConfigError: as `parts.sampler_of`.
    """
    given = None if options.sampler is None else integrator_of(options.sampler)
    said: list[str] = []

    def changed(own: Sampler) -> Sampler:
        new = own
        if given is not None:
            new = dataclasses.replace(new, integrate=with_levels(given, own.integrate))
        if options.steps is not None:
            new = dataclasses.replace(new, steps=options.steps)
        said.append(difference(own, new))
        return new

    sampler = parts.sampler_of(experiment, objective, changed)
    return sampler, None if given is None else said[0]


def untrained_levels(sampler: Visiting, objective: TrainingObjective) -> str | None:
    """Say that a sampler visits levels which training hardly ever drew; None where it does not."""
    low, high = trained_range(objective)
    visited = sampler.sigmas()[:-1]
    first, last = float(visited[0]), float(visited[-1])
    if first <= high * SLACK and last * SLACK >= low:
        return None
    return (
        f"the sampler visits noise {first:.4g} to {last:.4g}, of which training drew {high:.4g} to "
        f"{low:.4g}, but for one image in a million: the network does not know the rest"
    )


def integrator_of(name: str) -> Integrator:
    """An integrator by its name, or by the dotted path of a function of the user's own.

    Raises:
        UserError: neither, or a function that is called otherwise.
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
            f"--sampler: {name} is not called as (denoise, x, sigmas, randn_like) ({error})"
        ) from error
    return function


def with_levels(given: Integrator, own: Integrator) -> Integrator:
    """An integrator told what the run's own knows of the network: the levels of its table."""
    nearest = getattr(own, "keywords", {}).get("nearest")
    if nearest is None or "nearest" not in inspect.signature(given).parameters:
        return given
    return partial(given, nearest=nearest)  # type: ignore[call-arg]


def difference(own: Sampler, new: Sampler) -> str:
    """What differs between a run's sampler and the one that takes its place, and what does not."""
    changes = [f"{described(own.integrate)} -> {described(new.integrate)}"]
    if new.steps != own.steps:
        changes.append(f"steps {own.steps} -> {new.steps}")
    sigmas = new.sigmas()
    kept = [f"noise {float(sigmas[0]):.4g} to {float(sigmas[-2]):.4g} of {described(new.schedule)}"]
    kept += [f"{len(sigmas) - 1} steps"] if new.steps == own.steps else []
    kept += [name for name in ("clip", "unit_start") if getattr(new, name)]
    return f"sampler: {', '.join(changes)}; the run's own: {', '.join(kept)}"
