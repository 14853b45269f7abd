"""The framework from Python: an experiment, a run of it on disk, and what a run can do.

The commands do the same; every default is theirs. `import diffusion_pl as dp` and then `dp.train`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_pl import config
from diffusion_pl.commands.options import (
    FeatureOptions,
    MetricOptions,
    RunOptions,
    SamplerOptions,
    TrainOptions,
    grouped,
)
from diffusion_pl.config.targets import locate
from diffusion_pl.errors import UserError
from diffusion_pl.signals import RESUMABLE, StopError, StopRequest

if TYPE_CHECKING:  # the heavy ones are imported where something is built
    import torch
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger

    from diffusion_pl.diffusion.preconditioning import Denoiser
    from diffusion_pl.evaluation import ImageGenerator
    from diffusion_pl.training.module import DiffusionModule
    from diffusion_pl.training.run_data import RunData

PYTHON = "Python"  # where messages say that a value comes from

Changes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A callable with its arguments, to be called when an experiment is built.

    Args:
        target: dotted path.
        arguments: plain values, further ones of these, or objects as `Experiment` takes them.
        partial: hand the callable on with these arguments instead of calling it.
    """

    target: str
    arguments: Mapping[str, Any]
    partial: bool = False


def lazy(target: Callable[..., Any] | str, /, _partial_: bool = False, **arguments: Any) -> Lazy:
    """Say what to build, for a run to keep: YAML's `_target_` with its arguments.

    Args:
        target: a class or function that can be imported, or its dotted path.
        _partial_: hand it on with these arguments instead of calling it, as optimizers are.
        arguments: of the target.

    Raises:
        UserError: it cannot be imported by its name, so a run with it could not be opened again.
    """
    return Lazy(target if isinstance(target, str) else path_of(target), arguments, _partial_)


def path_of(target: Callable[..., Any]) -> str:
    """The dotted path by which a class or function is imported.

    Raises:
        UserError: there is none.
    """
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not module or not name:
        raise UserError(f"{target!r}: is no class or function; hand one, or its dotted path")
    if module == "__main__":
        raise UserError(
            f"{name}: is defined in the script or notebook that runs, so that a run with it could "
            f"not be opened again; put it into a module of its own and import it from there"
        )
    path = f"{module}.{name}"
    try:
        found: Any = locate(path)
    except ValueError as error:
        raise UserError(
            f"{path}: cannot be imported by this name ({error}), so that a run with it could not "
            "be opened again; define it at the top of a module"
        ) from error
    if found is not target:
        raise UserError(f"{path}: is another object than the one that was handed in")
    return path


def plain(value: Any, where: str) -> Any:
    """A value as YAML holds it: what was made by code becomes the code's name and arguments.

    Args:
        value: plain, `lazy(...)`, a dataclass's object, a functools.partial, or a class or function
            that is to be handed on.
        where: it stands, for messages.

    Raises:
        UserError: an object of which nobody can tell what it was made from.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {name: plain(each, f"{where}.{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, f"{where}.{index}") for index, each in enumerate(value)]
    partial, arguments = False, dict[str, Any]()
    if isinstance(value, functools.partial) and not value.args:
        target, arguments, partial = path_of(value.func), value.keywords, True
    elif isinstance(value, Lazy):
        target, arguments, partial = value.target, dict(value.arguments), value.partial
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        target, arguments = path_of(type(value)), _fields(value)
    elif inspect.isclass(value) or inspect.isroutine(value):
        target, partial = path_of(value), True
    else:
        name = type(value).__name__
        raise UserError(
            f"{where}: a run keeps what its parts are made from, and a {name} that is made already "
            f"does not tell; hand in dp.lazy({name}, ...) with its arguments"
        )
    said = {name: plain(each, f"{where}.{name}") for name, each in arguments.items()}
    return {"_target_": target, **({"_partial_": True} if partial else {}), **said}


def _fields(value: Any) -> dict[str, Any]:
    """The arguments that a dataclass's object was made with: a run keeps its defaults, too."""
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}


class Experiment:
    """What is trained, and how it is measured: the sections of an experiment's YAML.

    Args:
        name: of the experiment; its run lies in runs/NAME.
        base: the experiment whose sections stand where none is given; one of ours, or a YAML file.
        changes: dotted key to value, over everything.
        sections: data, network, objective, ... (docs/python.md): `lazy(...)`, an object of a
            dataclass such as `training.ema.EMA`, or a mapping of what differs from the base.

    Raises:
        UserError: everything that does not fit, a line each.
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
        """An experiment that is read already.

        Raises:
            UserError: everything that does not fit, a line each.
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
        """The resolved experiment, as its run keeps it."""
        return config.dump(self.config)

    def replace(self, changes: Changes | None = None, **sections: Any) -> Experiment:
        """The experiment with other values.

        Args:
            changes: dotted key to value, such as {"optimizer.lr": 1e-4}.
            sections: as for `Experiment`; `lazy(...)` and objects take the place of the whole
                section, a mapping is merged into it.

        Raises:
            UserError: everything that does not fit, a line each.
        """
        return Experiment.of(_changed(self.config, changes, sections))

    def lightning(self) -> tuple[DiffusionModule, RunData]:
        """The LightningModule and its data, for a Trainer of one's own; see docs/python.md."""
        from diffusion_pl.commands import train as command
        from diffusion_pl.training import run, run_data

        # No weights of Inception are fetched for what is not measured.
        seen = lazy("diffusion_pl.metrics.extractors.load", name="pixels")
        built = command.build(self.replace(features=seen).config)
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
        allow: what a file that others may have made is trusted with, by name.

    Raises:
        UserError: everything that is wrong, a line each.
    """
    text = str(name_or_yaml)
    read = config.load_text(text) if "\n" in text else config.load(text, allow=allow)
    return Experiment.of(_changed(read, changes, {}))


def _changed(
    read: config.Config, changes: Changes | None, sections: Mapping[str, Any]
) -> config.Config:
    """A configuration with sections, and over them single values."""
    said = {name: plain(value, name) for name, value in {**sections, **(changes or {})}.items()}
    return config.replaced(read, said, PYTHON)


def _checked(read: config.Config) -> config.Config:
    from diffusion_pl.commands import parts

    return parts.checked(read)


def train(
    exp: Experiment | str | Path,
    run: str | Path | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    start: str | Path | None = None,
    **options: Any,
) -> Run:
    """Train an experiment, or go on where its run stopped; a finished one is opened.

    A signal stops the run with a checkpoint, and the same call goes on: Ctrl-C then ends in
    KeyboardInterrupt, any other signal in SystemExit(75). Of a run of several processes all but the
    first leave by SystemExit when it is done, so that the script goes on once.

    Args:
        exp: an experiment, its name, or a YAML file.
        run: its folder; runs/NAME when not given.
        callbacks: of Lightning, beside those that the experiment names; the run does not keep them.
        loggers: the same.
        start: a run or checkpoint from whose weights a new run starts: fine-tuning.
        options: further ones of the command `train`: allow, data_changed, fresh_labels,
            accept_differences.

    Raises:
        UserError: what does not fit, before the first step.
    """
    from diffusion_pl.commands import parts
    from diffusion_pl.commands import train as command

    what = exp if isinstance(exp, Experiment) else experiment(exp)
    folder = Path(run) if run is not None else parts.RUNS / what.name
    (chosen,) = grouped("train", {"start": start, **options}, TrainOptions)
    with StopRequest() as stop_request:
        try:
            result = command.train(
                what.config, folder, stop_request, chosen, callbacks=callbacks, loggers=loggers
            )
            code = result.code
        except StopError:
            stop_request.mark_before_steps(folder)
            code = RESUMABLE
        stopped = stop_request.name
    if not command.leads_run(config.build(what.config, "trainer")):
        raise SystemExit(code)
    if code:
        raise KeyboardInterrupt if stopped == "SIGINT" else SystemExit(code)
    return Run(folder, allow=foreign(what.config))


def foreign(read: config.Config) -> tuple[str, ...]:
    """The packages beside this one and torch that a configuration's parts come from."""
    leaves = config.leaves(read.tree)
    targets = (str(value) for key, value in leaves if key.rpartition(".")[2] == "_target_")
    tops = {target.partition(".")[0] for target in targets}
    return tuple(sorted(tops - {"diffusion_pl", "torch"}))


class Run:
    """A trained run, from its newest checkpoint.

    Args:
        path: the run's folder, or a checkpoint file.
        weights: "ema", "denoiser" (raw), or "ema:0.1" for the average of that relative length.
        allow: packages to trust beside this one: those of your own parts.
        changes: dotted key to value, over the run's config.

    Raises:
        UserError: no run there, one that is unfit, or one with parts that are not trusted.
    """

    def __init__(
        self,
        path: str | Path,
        weights: str = "ema",
        allow: Sequence[str] = (),
        changes: Changes | None = None,
    ) -> None:
        from diffusion_pl.commands import runs

        said = [f"{key}={_word(value)}" for key, value in (changes or {}).items()]
        self._asked = {"weights": weights, "allow": tuple(allow), "set": tuple(said)}
        self.model = runs.open_model(Path(path), weights, allow, said)

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> Run:
        """Open a run, as the class does."""
        return cls(path, **options)

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.model.checkpoint.parent.parent

    @property
    def images_seen(self) -> int:
        """In training, by the weights that are open."""
        return self.model.images

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes in order; () where the data had none."""
        return self.model.class_names

    @property
    def denoiser(self) -> Denoiser:
        """D(x; sigma): called (x, sigma, label=...), x of (B, C, H, W), sigma of (B,)."""
        return self.model.denoiser

    def rows(self) -> list[dict[str, Any]]:
        """What was measured in training, a row a line of metrics.jsonl."""
        from diffusion_pl.training.history import History

        return History(self.folder / "metrics.jsonl").rows()

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, the oldest first."""
        from diffusion_pl.training import checkpoint

        return checkpoint.found(self.folder / "checkpoints")

    def sample(
        self,
        count: int,
        *,
        label: int | str | None = None,
        first: int = 0,
        batch_size: int = 64,
        **options: Any,
    ) -> torch.Tensor:
        """Sample images; image i depends on (seed, i) alone.

        Args:
            count: of images.
            label: the class of every image, its name or index; drawn for each otherwise.
            first: index of the first image.
            batch_size: images at a time; changes no image.
            options: those of the command `sample`: sampler, steps, seed, guidance,
                guidance_interval, guide, device.

        Returns:
            uint8 (count, C, H, W) on the CPU.

        Raises:
            UserError: a setting that does not fit the run.
        """
        import torch

        from diffusion_pl.evaluation import batches

        if count < 1 or first < 0:
            raise UserError(f"count: must be positive, first at least 0 (got {count}, {first})")
        generator = self._generator("sample", options, label)
        pieces = batches(range(first, first + count), batch_size)
        return torch.cat([generator.images(piece)[0].cpu() for piece in pieces])

    def evaluate(
        self,
        count: int | None = None,
        metrics: Sequence[str] | None = None,
        blocks: int = 1,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Measure the run; the rows are kept in its folder too.

        Args:
            count: of images; the experiment's when not given.
            metrics: frechet, spatial, score, kernel, precision_recall, density_coverage, or all;
                the experiment's when not given.
            blocks: disjoint blocks of images: mean, least, spread.
            options: further ones of the command `evaluate`: reference, features, sampler, steps,
                seed, guidance, device, ...

        Returns:
            A row a number, with all that it depends on.

        Raises:
            UserError: a setting that does not fit the run.
        """
        from diffusion_pl.commands import evaluate, runs

        given = {**self._asked, "count": count, "metrics": metrics, **options}
        how, of_run, wanted, features = grouped(
            "evaluate", given, SamplerOptions, RunOptions, MetricOptions, FeatureOptions
        )
        generator, _ = runs.make_generator(self.model, how, of_run)
        opened = runs.OpenedRun(self.folder, self.model, generator)
        rows: list[dict[str, Any]] = evaluate.measured(opened, blocks, of_run, wanted, features)[
            "measures"
        ]
        return rows

    def enlarge(
        self,
        images: torch.Tensor,
        to: int | None = None,
        *,
        restart: float | None = None,
        consistent: bool = True,
        label: int | str | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Super-resolution: sample larger images that agree with the given ones.

        Args:
            images: uint8 (N, 3, h, w).
            to: longer side of the result in pixels; the run's when not given.
            restart: sigma to begin from; half the factor when not given.
            consistent: made smaller again, the result is the image.
            label: the class of every image, its name or index.
            options: those of the command `enlarge`: sampler, steps, seed, device, ...

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
        generator = self._generator("enlarge", options, label)
        side = generator.shape[1] if to is None else to
        found = []
        for number, image in enumerate(images):
            where = Path(f"images[{number}]")
            task = enlarge.make_task(image, where, generator, side, restart, consistent)
            indices = [number * enlarge.VARIATIONS]
            found.append(enlarge.enlarged(generator, task, indices, consistent)[0])
        return torch.cat(found)

    def _generator(
        self, command: str, given: Mapping[str, Any], label: int | str | None
    ) -> ImageGenerator:
        """What samples images from the run, by the options of a command."""
        from diffusion_pl.commands import runs

        how, options = grouped(command, {**self._asked, **given}, SamplerOptions, RunOptions)
        return runs.make_generator(self.model, how, options, label)[0]

    def __repr__(self) -> str:
        return f"<Run {self.folder}, {self.images_seen:,} images>"


def _word(value: Any) -> str:
    """A value as an override writes it."""
    return json.dumps(plain(value, "changes"))
