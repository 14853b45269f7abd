"""The closed list of parts that an untrusted configuration may build, by their place.

A place is a section of an experiment, or an argument of a part, such as `schedule`. An untrusted
configuration builds nothing else of this package, whose commands, downloads, readers and writers
are callables too; see docs/checkpoints.md. A new part needs a line here; tests/test_registry.py
looks for parts without one.

Paths are compared literally: a part reached through another module is not trusted.
"""

from __future__ import annotations

from collections.abc import Mapping

PACKAGE = "diffusion_pl"
OPTIMIZERS = "torch.optim"
SCHEDULERS = f"{OPTIMIZERS}.lr_scheduler"


def _of(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{PACKAGE}.{module}.{name}" for name in names)


def _lightning(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"lightning.pytorch.{module}.{name}" for name in names)


_OBJECTIVES = (
    *_of("diffusion.objective", "Objective"),
    *_of("diffusion.extra", "WithExtra"),
    *_of("diffusion.uncertainty", "LearnedUncertainty"),
    *_of("objectives.ddpm", "DDPM", "DDPMBound", "VariationalBound"),
    *_of("objectives.edm", "EDM"),
    *_of("objectives.edm2", "EDM2"),
    *_of("objectives.edm_iddpm", "IDDPM"),
    *_of("objectives.improved_ddpm", "Hybrid", "ImportanceSampled"),
    *_of("objectives.improved_ddpm", "ImprovedDDPM", "ImprovedDDPMBound", "ImprovedDDPMSimple"),
    *_of("objectives.jit", "JiT"),
    *_of("objectives.rectified_flow", "RectifiedFlow"),
    *_of("objectives.simple_diffusion", "SimpleDiffusion"),
    *_of("objectives.simpler_diffusion", "SimplerDiffusion"),
    *_of("objectives.ve", "VE"),
    *_of("objectives.vp", "VP"),
)
_TIMESTEPS = (
    *_of("diffusion.timesteps", "CosineBetas", "LinearBetas", "Timesteps"),
    *_of("diffusion.timesteps", "Betas", "LaplaceBetas", "ScaledLinearBetas", "SigmoidBetas"),
    *_of("diffusion.timesteps", "ZeroTerminal"),
)
_SAMPLERS = (*_of("samplers.sampler", "Sampler"), *_of("samplers.pyramid", "PyramidSampler"))

# Parts that are called where they stand.
MADE: Mapping[str, tuple[str, ...]] = {
    "data": _of("data.loader", "DataConfig"),
    "dataset": (
        *_of("data.cifar10", "CIFAR10"),
        *_of("data.folder", "ImageFolder"),
        *_of("data.shards", "Shards"),
        *_of("data.synthetic", "Synthetic"),
    ),
    "crop": _of("data.crops", "Crop"),
    "made_of": _of("data.prepare", "Request"),
    "source": _of("data.sources.base", "SourceSpec"),
    "recipe": _of("data.recipe", "Recipe"),
    "augment": _of("data.augment", "NonLeaky"),
    "image": _of("diffusion.degradations", "Blurred", "Boxes", "Downsampled", "Grey"),
    "network": (
        *_of("networks.adm", "ADM"),
        *_of("networks.ddpm_unet", "DDPMUNet"),
        *_of("networks.edm2_unet", "EDM2UNet"),
        *_of("networks.jit", "JiT"),
        *_of("networks.linear_unet", "LinearUNet"),
        *_of("networks.prx", "PRX"),
        *_of("networks.simple_unet", "SimpleUNet"),
        *_of("networks.song_unet", "SongUNet"),
        *_of("networks.uvit", "UViT"),
    ),
    "routing": _of("networks.routing", "Routing"),
    "objective": _OBJECTIVES,
    "extra": _of("diffusion.extra", "Alignment", "Perceptual"),
    "extractor": _of("metrics.feature_maps", "Inception", "Shapes", "Torchvision"),
    "preconditioning": (
        *_of("diffusion.preconditioning", "Karras"),
        *_of("objectives.ddpm", "PredictImage", "PredictNoise", "PredictVelocity"),
        *_of("objectives.edm_iddpm", "NoiseOnTable"),
        *_of("objectives.jit", "Interpolation"),
        *_of("objectives.rectified_flow", "PredictFlow"),
        *_of("objectives.simple_diffusion", "PredictVelocity"),
        *_of("objectives.ve", "NoiseUnscaled"),
        *_of("objectives.vp", "NoiseInTime"),
    ),
    "weight": (
        *_of("diffusion.objective", "EpsWeight", "UnitOutput"),
        *_of("diffusion.weights", "X0Weight", "MinSNR", "SoftMinSNR"),
        *_of("objectives.jit", "ClampedWeight"),
        *_of("objectives.rectified_flow", "FlowWeight"),
        *_of("objectives.simpler_diffusion", "SigmoidBound"),
    ),
    "reduce": _of("objectives.simple_diffusion", "Multiscale"),
    "chain": _of("objectives.likelihood", "ReverseChain"),
    "timesteps": _TIMESTEPS,
    "schedule": (
        *_TIMESTEPS,
        *_of("diffusion.paths", "Along"),
        *_of("diffusion.schedules", "LogNormal", "LogUniform", "Rho"),
        *_of("objectives.edm_iddpm", "Rounded", "RoundedRho"),
        *_of("objectives.shifted_cosine", "InterpolatedCosine", "ShiftedCosine"),
    ),
    "path": (
        *_of("diffusion.paths", "Linear", "VarianceExploding", "VariancePreserving"),
        *_of("diffusion.paths", "preserving_between"),
        *_of("objectives.rectified_flow", "Straight"),
    ),
    "spacing": (
        *_of("diffusion.spacings", "DDIMQuadratic", "DDIMUniform", "EqualSteps", "IDDPMSteps"),
        *_of("diffusion.spacings", "Respaced", "Trailing"),
    ),
    "velocity_clamp": _of("diffusion.guidance", "VelocityClamp"),
    "sampler": _SAMPLERS,
    "base": _of("samplers.sampler", "Sampler"),
    "optimizer": _of("training.optimizers", "Grouped"),
    "groups": _of("training.optimizers", "Group"),
    "lr_schedule": _of("training.lr_schedule", "Cosine", "WarmupDecay"),
    "ema": _of("training.ema", "EMA"),
    "features": _of("metrics.extractors", "load"),
    "evaluation": (*_of("evaluation", "Evaluation"), *_of("evaluation.settings", "Evaluation")),
    "losses": _of("evaluation.settings", "Losses"),
    "metrics": (
        *_of("metrics.agreement", "Agreement"),
        *_of("metrics.clip_score", "ClipScore"),
        *_of("metrics.cmmd", "CMMD"),
        *_of("metrics.density_coverage", "DensityCoverage"),
        *_of("metrics.fid", "Frechet"),
        *_of("metrics.inception_score", "InceptionScore"),
        *_of("metrics.kid", "Kernel"),
        *_of("metrics.precision_recall", "PrecisionRecall"),
    ),
    "guide": (*_of("commands.runs", "guide"), *_of("diffusion.guidance", "Routed")),
    "trainer": _of("training.settings", "TrainerConfig"),
    "profiler": _lightning("profilers", "AdvancedProfiler", "PyTorchProfiler", "SimpleProfiler"),
    "strategy": _lightning("strategies", "DDPStrategy", "SingleDeviceStrategy"),
}

# Parts that are passed on to be called later, by `_partial_: true`, as are torch's optimizers and
# learning-rate schedulers.
HANDED_ON: Mapping[str, tuple[str, ...]] = {
    "integrate": (
        *_of("samplers.ancestral", "ancestral"),
        *_of("samplers.deis", "deis"),
        *_of("samplers.dpm_solver", "dpmpp_2m", "dpmpp_3m"),
        *_of("samplers.euler", "euler"),
        *_of("samplers.exponential_adams", "exponential_adams"),
        *_of("samplers.generalised", "generalised"),
        *_of("samplers.heun", "heun"),
        *_of("samplers.unipc", "unipc"),
    ),
    "clip_denoised": _of("diffusion.guidance", "thresholded"),
    "nearest": _of("objectives.edm_iddpm", "nearest"),
    "reduce": _of("diffusion.objective", "pixel_mean", "pixel_sum"),
    "spacing": (
        *_of("diffusion.schedules", "uniform"),
        *_of("objectives.shifted_cosine", "above_zero"),
    ),
    "optimizer": _of("training.muon", "Muon"),
    "rest": _of("training.muon", "Muon"),
}

# Of a section, an argument beside those of its target, and the part that takes it together with
# what the target makes, under the section's name.
WRAPPERS: Mapping[str, tuple[str, str]] = {
    "objective": ("extra", f"{PACKAGE}.diffusion.extra.WithExtra"),
}

PLACES = (*MADE, *(place for place in HANDED_ON if place not in MADE))
PARTS = frozenset(part for table in (MADE, HANDED_ON) for parts in table.values() for part in parts)


def is_part(target: object) -> bool:
    """Tell whether a dotted path is on the list, or lies in torch.optim."""
    return isinstance(target, str) and (target in PARTS or place_in_torch(target) is not None)


def place_in_torch(target: object) -> str | None:
    """The place for a dotted path in torch.optim, whatever it names; None for other paths."""
    if not isinstance(target, str) or not target.startswith(f"{OPTIMIZERS}.") or "._" in target:
        return None
    return "lr_schedule" if target.startswith(f"{SCHEDULERS}.") else "optimizer"


def misplaced(target: str, place: str, partial: bool) -> str | None:
    """Why a part on the list may not stand at a place, as the end of an error line; else None.

    Args:
        target: dotted path of the part.
        place: section or argument.
        partial: whether the node has `_partial_: true`.
    """
    if place not in PLACES:
        # Where no protocol says what is taken, such as an optimizer's own arguments.
        return f"{target} may not stand here: {place} takes no part"
    made, handed_on = MADE.get(place, ()), HANDED_ON.get(place, ())
    if place_in_torch(target) == ("optimizer" if place == "rest" else place):
        return None if partial else f"{target} is handed on here; add `_partial_: true`"
    if target in made:
        return f"{target} is called here; remove `_partial_: true`" if partial else None
    if target in handed_on:
        return None
    known = [part.rpartition(".")[2] for part in (*made, *handed_on)]
    of_torch = {"optimizer": [OPTIMIZERS], "rest": [OPTIMIZERS], "lr_schedule": [SCHEDULERS]}
    fitting = ", ".join([*known, *of_torch.get(place, ())])
    return f"{target} is no {place}; take one of {fitting}, or your own"
