"""The Python interface: experiments, training, and runs. Defaults are those of the commands."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_pl import config
from diffusion_pl.commands.options import (
    TrainOptions,
    grouped,
)
from diffusion_pl.config.objects import Lazy, lazy, plain
from diffusion_pl.errors import UserError
from diffusion_pl.run import Run, names
from diffusion_pl.signals import RESUMABLE, StopError, StopRequest

if TYPE_CHECKING:  # slow to import, so only where they are used
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger

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
    given = {"start": start, **options, "allow": names(options.get("allow", ()))}
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


def packages_of(read: config.Config) -> tuple[str, ...]:
    """The packages other than this one and torch that a configuration's parts come from."""
    leaves = config.leaves(read.tree)
    targets = (str(value) for key, value in leaves if key.rpartition(".")[2] == "_target_")
    tops = {target.partition(".")[0] for target in targets}
    return tuple(sorted(tops - {"diffusion_pl", "torch"}))
