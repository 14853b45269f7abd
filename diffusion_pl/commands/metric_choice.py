"""Which numbers a command measures: those that it names, or all that can be."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping

from diffusion_pl.commands.options import MetricOptions, RunOptions
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import Evaluation
from diffusion_pl.evaluation.settings import MetricSettings
from diffusion_pl.metrics.density_coverage import DensityCoverage
from diffusion_pl.metrics.frechet import Frechet
from diffusion_pl.metrics.inception_score import InceptionScore
from diffusion_pl.metrics.kernel import Kernel
from diffusion_pl.metrics.precision_recall import PrecisionRecall
from diffusion_pl.names import shown

METRICS: Mapping[str, MetricSettings] = {
    "frechet": Frechet(),
    "spatial": Frechet(of="spatial"),
    "score": InceptionScore(),
    "kernel": Kernel(),
    "precision_recall": PrecisionRecall(),
    "density_coverage": DensityCoverage(),
}


class MetricChoice:
    """What is asked for, and of "all" what had to be left out.

    Args:
        wanted: what is asked for.
        options: of the run.
    """

    def __init__(self, wanted: MetricOptions, options: RunOptions) -> None:
        self.wanted = wanted
        self.options = options
        self.everything = "all" in (wanted.metrics or ())
        self.left_out: dict[str, str] = {}

    def settings(self, own: Evaluation) -> Evaluation:
        """The experiment's evaluation, and over it what the command line says.

        Raises:
            UserError: a metric that is not known, or one that so many images cannot give.
        """
        wanted, metrics = self.wanted, list(own.metrics)
        if wanted.metrics:
            unknown = set(wanted.metrics) - set(METRICS) - {"all"}
            if unknown:
                raise UserError(
                    f"--metrics: there is no {', '.join(sorted(unknown))}; "
                    f"choose of {', '.join(METRICS)} or all"
                )
            metrics = [METRICS[name] for name in wanted.metrics if name != "all"]
            if self.everything:
                metrics = list(METRICS.values())
        if wanted.subset_size is not None:
            if not any(isinstance(metric, Kernel) for metric in metrics):
                raise UserError("--subset-size: is of the kernel distance; add --metrics kernel")
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
        self, settings: Evaluation, look: Callable[[MetricSettings], object]
    ) -> Evaluation:
        """The settings with those metrics that pass a look; of "all" the others are left out.

        Raises:
            UserError: one that was asked for by its name does not pass, or none is left.
        """
        kept = []
        for metric in settings.metrics:
            try:
                look(metric)
            except ValueError as error:
                if not self.everything:
                    raise
                self.left_out[_name_of(metric)] = str(error)
                print(shown(f"left out {_name_of(metric)}: {error}"), file=sys.stderr)
            else:
                kept.append(metric)
        if not kept and settings.metrics:
            raise UserError("--metrics all: nothing of it can be measured, for the reasons above")
        return dataclasses.replace(settings, metrics=kept)


def _name_of(metric: MetricSettings) -> str:
    """The command line's word for a metric, else its class."""
    for name, known in METRICS.items():
        if type(known) is type(metric) and getattr(known, "of", 0) == getattr(metric, "of", 0):
            return name
    return type(metric).__name__
