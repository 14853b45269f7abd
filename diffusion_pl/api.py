"""The Python interface: experiments, training, and runs. Defaults are those of the commands."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_pl import config
from diffusion_pl.commands.options import (
    ConditionOptions,
    FeatureOptions,
    MetricOptions,
    RunOptions,
    SamplerOptions,
    TrainOptions,
    grouped,
)
from diffusion_pl.commands.options import weights as option_weights
from diffusion_pl.config.objects import Lazy, import_path, lazy, plain
from diffusion_pl.errors import UserError
from diffusion_pl.signals import RESUMABLE, StopError, StopRequest

if TYPE_CHECKING:  # slow to import, so only where they are used
    import torch
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger

    from diffusion_pl.diffusion.preconditioning import Denoiser
    from diffusion_pl.evaluation import ImageGenerator
    from diffusion_pl.training.module import DiffusionModule
    from diffusion_pl.training.run_data import RunData

PYTHON = "Python"  # the origin of a value, for messages

Changes = Mapping[str, Any]


class Experiment:
    """What is trained and how it is evaluated: the sections of an experiment's YAML.

    Args:
        name: of the experiment; its run lies in runs/NAME.
        base: an experiment or YAML file, for the sections that are not given.
        changes: dotted key to value, over everything.
        sections: data, network, objective, ... (docs/python.md): `lazy(...)`, an instance of a
            dataclass such as `training.ema.EMA`, or a mapping that is merged into the base.

    Raises:
        UserError: everything that is wrong, a line each.
    """

    def __init__(
        self,
        name: str = "experiment",
        *,
        base: str = "base",
        changes: Changes | None = None,
        **sections: Any,
    ) -> None:
        below = config.load(base)
        named = dataclasses.replace(below, name=name)
        self.config = _checked(_changed(named, changes, sections))

    @classmethod
    def of(cls, read: config.Config) -> Experiment:
        """An experiment of a configuration.

        Raises:
            UserError: everything that is wrong, a line each.
        """
        made = cls.__new__(cls)
        made.config = _checked(read)
        return made

    @property
    def name(self) -> str:
        """Of the experiment."""
        return self.config.name

    @property
    def yaml(self) -> str:
        """The resolved experiment, as its run records it."""
        return config.dump(self.config)

    def replace(self, changes: Changes | None = None, **sections: Any) -> Experiment:
        """The experiment with other values.

        Args:
            changes: dotted key to value, such as {"optimizer.lr": 1e-4}.
            sections: as for `Experiment`; `lazy(...)` and objects replace the whole section, a
                mapping is merged into it.

        Raises:
            UserError: everything that is wrong, a line each.
        """
        return Experiment.of(_changed(self.config, changes, sections))

    def lightning(self) -> tuple[DiffusionModule, RunData]:
        """The LightningModule and LightningDataModule, for your own Trainer; see docs/python.md."""
        from diffusion_pl.commands import train as command
        from diffusion_pl.training import run, run_data

        # Nothing is evaluated, so Inception's weights are not downloaded.
        features = lazy("diffusion_pl.metrics.extractors.load", name="pixels")
        built = command.build(self.replace(features=features).config)
        data = run_data.RunData(built.data, built.settings, built.network, built.seed)
        return run.make_module(built), data

    def __repr__(self) -> str:
        return f"<Experiment {self.name}>\n{self.yaml}"


def experiment(
    name_or_yaml: str | Path, changes: Changes | None = None, *, allow: Sequence[str] = ()
) -> Experiment:
    """Read an experiment.

    Args:
        name_or_yaml: a name, such as "quickstart"; the path of a YAML file; or YAML text of more
            than a line.
        changes: dotted key to value, such as {"optimizer.lr": 1e-4}.
        allow: packages, addresses or files to trust in a file that others may have written.

    Raises:
        UserError: everything that is wrong, a line each.
    """
    text = str(name_or_yaml)
    read = config.load_text(text) if "\n" in text else config.load(text, allow=allow)
    return Experiment.of(_changed(read, changes, {}))


def _changed(
    read: config.Config, changes: Changes | None, sections: Mapping[str, Any]
) -> config.Config:
    """A configuration with replaced sections, and over them single values."""
    values = {name: plain(value, name) for name, value in {**sections, **(changes or {})}.items()}
    return config.replaced(read, values, PYTHON)


def _checked(read: config.Config) -> config.Config:
    from diffusion_pl.commands import parts

    return parts.checked(read)


def train(
    exp: Experiment | str | Path,
    run: str | Path | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    start: str | Path | Run | None = None,
    **options: Any,
) -> Run:
    """Train an experiment, or resume its run; a finished run is opened.

    A signal stops the run with a checkpoint, and the same call resumes it: Ctrl-C raises
    KeyboardInterrupt, other signals SystemExit(75). With several processes, all but the first exit
    when training ends, so the rest of a script runs once.

    Args:
        exp: an experiment, its name, or a YAML file.
        run: its folder; runs/NAME when not given.
        callbacks: of Lightning, beside the experiment's; not recorded in the run.
        loggers: of Lightning, likewise.
        start: a run (its folder, or opened) or checkpoint whose weights a new run starts from:
            fine-tuning.
        options: of the command `train`: allow, data_changed, fresh_labels, accept_differences.

    Raises:
        UserError: something does not fit; raised before the first step.
    """
    from diffusion_pl.commands import parts
    from diffusion_pl.commands import train as command

    exp = exp if isinstance(exp, Experiment) else experiment(exp)
    if run == "":
        raise UserError("run: is empty; name its folder, or leave it out for runs/NAME")
    folder = Path(run) if run is not None else parts.RUNS / exp.name
    start = start.model.checkpoint if isinstance(start, Run) else start
    given = {"start": start, **options, "allow": _names(options.get("allow", ()))}
    (chosen,) = grouped("train", given, TrainOptions)
    for name, values in {"callbacks": callbacks, "loggers": loggers}.items():
        _refuse_recipes(name, values)
    with StopRequest() as stop_request:
        try:
            result = command.train(
                exp.config, folder, stop_request, chosen, callbacks=callbacks, loggers=loggers
            )
            code = result.code
        except StopError:
            stop_request.mark_before_steps(folder)
            code = RESUMABLE
        stopped = stop_request.name
    if not command.leads_run(config.build(exp.config, "trainer")):
        raise SystemExit(code)
    if code:
        raise KeyboardInterrupt if stopped == "SIGINT" else SystemExit(code)
    return Run(folder, allow=packages_of(exp.config))


def _names(given: Sequence[str]) -> tuple[str, ...]:
    """Several names; one alone need not stand in a list."""
    return (given,) if isinstance(given, str) else tuple(given)


def _refuse_recipes(name: str, values: Sequence[Any]) -> None:
    """See that callbacks and loggers are objects.

    Raises:
        UserError: a class or `lazy(...)`.
    """
    for each in values:
        if isinstance(each, Lazy | functools.partial) or inspect.isclass(each):
            made = str(getattr(each, "target", None) or getattr(each, "__name__", repr(each)))
            raise UserError(
                f"{name}: takes objects (got {made}); make one, {made.rpartition('.')[2]}(...), or "
                f"record it in the experiment: exp.replace({name}=[dp.lazy(...)])"
            )


def _sampler_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which a sampler may be a function.

    Raises:
        UserError: it cannot be imported by its name.
    """
    sampler = given.get("sampler")
    if sampler is None or isinstance(sampler, str):
        return dict(given)
    if isinstance(sampler, Lazy):
        if sampler.arguments:
            raise UserError(
                "sampler: takes the name of a function without arguments; set them in the run's "
                'config: dp.Run(..., changes={"sampler.integrate": dp.lazy(...)})'
            )
        return {**given, "sampler": sampler.target}
    return {**given, "sampler": import_path(sampler)}


def packages_of(read: config.Config) -> tuple[str, ...]:
    """The packages other than this one and torch that a configuration's parts come from."""
    leaves = config.leaves(read.tree)
    targets = (str(value) for key, value in leaves if key.rpartition(".")[2] == "_target_")
    tops = {target.partition(".")[0] for target in targets}
    return tuple(sorted(tops - {"diffusion_pl", "torch"}))


class Run:
    """A trained run, opened at its newest checkpoint.

    Args:
        path: the run's folder, or a checkpoint file.
        weights: "ema", "denoiser" (raw), or "ema:0.1" for the average of that relative length.
        allow: packages to trust, such as your own.
        changes: dotted key to value, over the run's config.

    Raises:
        UserError: there is no run, it is unfit, or it has parts that are not trusted.
    """

    def __init__(
        self,
        path: str | Path,
        weights: str = "ema",
        allow: Sequence[str] = (),
        changes: Changes | None = None,
    ) -> None:
        from diffusion_pl.commands import runs

        try:
            weights = option_weights(weights)
        except ValueError as error:
            raise UserError(f"weights: {error}") from error
        overrides = [f"{k}={json.dumps(plain(v, k))}" for k, v in (changes or {}).items()]
        allow = _names(allow)
        self._options = {"weights": weights, "allow": allow, "set": tuple(overrides)}
        self.model = runs.open_model(Path(path), weights, allow, overrides)

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> Run:
        """Open a run; arguments as of the class."""
        return cls(path, **options)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.model.checkpoint.parent.parent

    @property
    def images_seen(self) -> int:
        """Images that the weights were trained on."""
        return self.model.images

    @property
    def class_names(self) -> tuple[str, ...]:
        """In order; () where the data had none."""
        return self.model.class_names

    @property
    def denoiser(self) -> Denoiser:
        """D(x, sigma, label=...) with x (B, C, H, W) and sigma (B,)."""
        return self.model.denoiser

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: what was logged and measured in training."""
        from diffusion_pl.training.history import History

        return History(self.folder / "metrics.jsonl").rows()

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, oldest first."""
        from diffusion_pl.training import checkpoint

        return checkpoint.found(self.folder / "checkpoints")

    def sample(
        self,
        count: int,
        *,
        label: int | str | None = None,
        prompt: str | Sequence[str] = (),
        image: str | Path | Sequence[str | Path] = (),
        first: int = 0,
        batch_size: int = 64,
        encoder: str | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Sample images; image i depends on (seed, i) alone.

        Args:
            count: number of images.
            label: the class of every image, its name or index; uniform when not given.
            prompt: what the images show, of a model that takes text; of several, image i has number
                i modulo how many there are. Captions of the run's data when not given.
            image: files to go by, of a model that takes images; of several, image i takes number i
                modulo how many there are. Images of the run's data when not given.
            first: index of the first image.
            batch_size: images per batch; changes no image.
            encoder: the model's text encoder, where it is not found by its own name.
            options: of the command `sample`: sampler, steps, seed, guidance, guidance_interval,
                guide, device.

        Returns:
            uint8 (count, C, H, W) on the CPU.

        Raises:
            UserError: a setting that does not fit the run.
        """
        import torch

        from diffusion_pl.evaluation import batches

        if count < 1 or first < 0:
            raise UserError(f"count: must be positive, first at least 0 (got {count}, {first})")
        if batch_size < 1:
            raise UserError(f"batch_size: must be at least 1 (got {batch_size})")
        files = (image,) if isinstance(image, str | Path) else image
        wanted = ConditionOptions(
            label=label, prompt=_names(prompt), encoder=encoder, image=tuple(map(Path, files))
        )
        generator = self._generator("sample", options, wanted)
        pieces = batches(range(first, first + count), batch_size)
        return torch.cat([generator.images(piece)[0].cpu() for piece in pieces])

    def evaluate(
        self,
        count: int | None = None,
        metrics: Sequence[str] | None = None,
        blocks: int = 1,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Evaluate the run; the rows are also written to its folder.

        Args:
            count: number of images; the experiment's when not given.
            metrics: frechet, spatial, score, kernel, precision_recall, density_coverage,
                cmmd, agreement, clip_score, or all; the experiment's when not given.
            blocks: number of disjoint blocks of images; gives mean, minimum and range.
            options: of the command `evaluate`: reference, features, sampler, steps, seed, guidance,
                device, ...

        Returns:
            One row for each number, with all that it depends on.

        Raises:
            UserError: a setting that does not fit the run.
        """
        from diffusion_pl.commands import evaluate, runs

        for metric in _names(metrics or ()):
            if not isinstance(metric, str):
                raise UserError(
                    f"metrics: takes names (got {metric!r}); a metric of your own is listed in the "
                    'run\'s config: dp.Run(..., changes={"evaluation.metrics": [...]})'
                )
        given = {"count": count, "metrics": metrics, **self._given(options)}
        sampling, run_options, metric_options, features = grouped(
            "evaluate", given, SamplerOptions, RunOptions, MetricOptions, FeatureOptions
        )
        generator, _ = runs.make_generator(self.model, sampling, run_options)
        opened = runs.OpenedRun(self.folder, self.model, generator)
        rows: list[dict[str, Any]] = evaluate.measured(
            opened, blocks, run_options, metric_options, features
        )["measures"]
        return rows

    def enlarge(
        self,
        images: torch.Tensor,
        to: int | None = None,
        *,
        restart: float | None = None,
        consistent: bool = True,
        label: int | str | None = None,
        prompt: str | Sequence[str] = (),
        encoder: str | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Super-resolution: sample larger images that are consistent with the given ones.

        Args:
            images: uint8 (N, 3, h, w).
            to: longer side of the result in pixels; the run's when not given.
            restart: sigma to restart from at each size; half the factor when not given.
            consistent: make the result, downsampled, equal the image.
            label: the class of every image, its name or index.
            prompt: what the images show, as for `sample`.
            encoder: as for `sample`.
            options: of the command `enlarge`: sampler, steps, seed, device, ...

        Returns:
            uint8 (N, 3, H, W) on the CPU.

        Raises:
            UserError: an image or a size that does not fit the run.
        """
        import torch

        from diffusion_pl.commands import enlarge

        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            got = f"{images.dtype} {tuple(images.shape)}"
            raise UserError(f"images: must be uint8 (N, 3, h, w) (got {got})")
        wanted = ConditionOptions(label=label, prompt=_names(prompt), encoder=encoder)
        generator = self._generator("enlarge", options, wanted, complete=True)
        side = generator.shape[1] if to is None else to
        found = []
        for number, image in enumerate(images):
            where = Path(f"images[{number}]")
            task = enlarge.make_task(image, where, generator, side, restart, consistent)
            indices = [number * enlarge.VARIATIONS]
            found.append(enlarge.enlarged(generator, task, indices, consistent)[0])
        return torch.cat(found)

    def _given(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a command with those that the run was opened with.

        Raises:
            UserError: an option that opening alone takes.
        """
        for name in {"weights", "allow", "set"} & {*options}:
            word = "changes" if name == "set" else name
            raise UserError(f"{name}: is chosen when a run is opened: dp.Run(path, {word}=...)")
        return {**self._options, **_sampler_options(options)}

    def _generator(
        self,
        command: str,
        given: Mapping[str, Any],
        wanted: ConditionOptions,
        *,
        complete: bool = False,
    ) -> ImageGenerator:
        """What samples images from the run, by the options of a command."""
        from diffusion_pl.commands import runs

        given = self._given(given)
        sampling, options = grouped(command, given, SamplerOptions, RunOptions)
        return runs.make_generator(self.model, sampling, options, wanted, complete=complete)[0]

    def __repr__(self) -> str:
        return f"<Run {self.folder}, {self.images_seen:,} images>"
