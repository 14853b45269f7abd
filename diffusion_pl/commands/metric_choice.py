"""Which metrics a command computes: those that it names, or all that can be."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping

from diffusion_pl.commands.options import MetricOptions, RunOptions
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation
from diffusion_pl.evaluation.settings import MetricSettings
from diffusion_pl.metrics.agreement import Agreement
from diffusion_pl.metrics.clip_score import ClipScore
from diffusion_pl.metrics.cmmd import CMMD
from diffusion_pl.metrics.density_coverage import DensityCoverage
from diffusion_pl.metrics.fid import Frechet
from diffusion_pl.metrics.inception_score import InceptionScore
from diffusion_pl.metrics.kid import Kernel
from diffusion_pl.metrics.precision_recall import PrecisionRecall
from diffusion_pl.names import shown

METRICS: Mapping[str, MetricSettings] = {
    "frechet": Frechet(),
    "spatial": Frechet(of="spatial"),
    "score": InceptionScore(),
    "kernel": Kernel(),
    "precision_recall": PrecisionRecall(),
    "density_coverage": DensityCoverage(),
    "cmmd": CMMD(),
    "agreement": Agreement(),
    "clip_score": ClipScore(),
}


class MetricChoice:
    """The metrics of the options; with "all", those that can be computed.

    Args:
        wanted: metrics and reference.
        options: of the run.

    Attributes:
        left_out: reason by metric, where "all" is asked for.
    """

    def __init__(self, wanted: MetricOptions, options: RunOptions) -> None:
        self.wanted = wanted
        self.options = options
        self.everything = "all" in (wanted.metrics or ())
        self.left_out: dict[str, str] = {}

    def settings(self, own: Evaluation) -> Evaluation:
        """The experiment's evaluation, overridden by the options.

        Raises:
            UserError: a metric is unknown, or cannot be computed from so many images.
        """
        wanted, metrics = self.wanted, list(own.metrics)
        if wanted.metrics:
            unknown = set(wanted.metrics) - set(METRICS) - {"all"}
            if unknown:
                raise UserError(
                    f"--metrics: there is no {', '.join(sorted(unknown))}; "
                    f"choose from {', '.join(METRICS)}, all"
                )
            metrics = [METRICS[name] for name in wanted.metrics if name != "all"]
            if self.everything:
                metrics = list(METRICS.values())
        if wanted.subset_size is not None:
            if not any(isinstance(metric, Kernel) for metric in metrics):
                raise UserError("--subset-size: is for the kernel distance; add --metrics kernel")
            metrics = [
                dataclasses.replace(metric, size=wanted.subset_size)
                if isinstance(metric, Kernel)
                else metric
                for metric in metrics
            ]
        settings = dataclasses.replace(
            own,
            count=own.count if wanted.count is None else wanted.count,
            batch_size=self.options.batch_size or own.batch_size,
            seed=self.options.seed,
            metrics=metrics,
        )
        return self.feasible(settings, lambda metric: metric.check_count(settings.count))

    def feasible(
        self, settings: Evaluation, check: Callable[[MetricSettings], object]
    ) -> Evaluation:
        """The settings with the metrics that pass a check; others are left out with "all".

        Raises:
            UserError: a metric that is asked for by name does not pass, or none is left.
        """
        kept = []
        for metric in settings.metrics:
            try:
                check(metric)
            except ValueError as error:
                if not self.everything:
                    raise
                self.left_out[_name_of(metric)] = str(error)
                print(shown(f"left out {_name_of(metric)}: {error}"), file=sys.stderr)
            else:
                kept.append(metric)
        if not kept and settings.metrics:
            raise UserError("--metrics all: none can be computed, for the reasons above")
        return dataclasses.replace(settings, metrics=kept)


def _name_of(metric: MetricSettings) -> str:
    """The metric's name on the command line, else its class."""
    for name, known in METRICS.items():
        if type(known) is type(metric) and getattr(known, "of", 0) == getattr(metric, "of", 0):
            return name
    return type(metric).__name__
