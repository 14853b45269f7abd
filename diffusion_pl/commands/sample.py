"""`sample`: sample images from a run into a folder; see `sample_folder`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from diffusion_pl.commands import film as films
from diffusion_pl.commands import hints, runs, sample_ranks
from diffusion_pl.commands.labels import class_of
from diffusion_pl.commands.options import (
    ConditionOptions,
    Integer,
    RunOptions,
    RunPath,
    SamplerOptions,
    Words,
)
from diffusion_pl.commands.results import Result, line
from diffusion_pl.commands.sample_folder import OtherImages, SampleFolder
from diffusion_pl.commands.sample_packing import ARRAYS, Format
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation import ImageGenerator
from diffusion_pl.evaluation.sources import Labels
from diffusion_pl.images import grid, save_png, sheet
from diffusion_pl.progress import LINE, bar, lines

BATCH = 64
GRID = 64  # images on the grid at most
CLASSES, COLUMNS = 40, 8  # rows of a grid by class at most, and images of each


def command(
    run: RunPath,
    /,
    *,
    count: Integer = 64,
    first: Integer = 0,
    out: Path | None = None,
    format: Literal["png", "npz", "tar"] = "png",
    classes: Words | None = None,
    strip: bool = False,
    film: Literal["gif", "mp4"] | None = None,
    processes: Integer | None = None,
    conditions: ConditionOptions = ConditionOptions(),
    sampling: SamplerOptions = SamplerOptions(),
    options: RunOptions = RunOptions(),
) -> Result:
    """Sample images from a run: PNG files, a grid, an .npz.

    Image i depends on (seed, i) alone, and the same command with a larger count adds images.

    Example: diffusion_pl sample runs/mine --count 64 --sampler deis --steps 18

    Args:
        count: number of images.
        first: index of the first image.
        out: folder of the images; RUN/drawn when not given.
        format: png, and an .npz of all; npz alone; or tar: WebDataset shards of 1000 images.
        classes: in turn, names or indices, or all; the grid has a row for each.
        strip: write strip.png too: progressive denoising, an image a row, a noise level a column.
        film: write film.gif or film.mp4 (by ffmpeg) too: progressive denoising of 16 images.
        processes: of this machine, each on a GPU or a share of the cores; torchrun and srun start
            them by themselves.
    """
    if count < 1 or first < 0:
        raise UserError(f"--count must be positive, --first at least 0 (got {count}, {first})")
    if film is not None:
        films.check(film)
    rank, size = sample_ranks.this_rank(processes), options.batch_size or BATCH
    wanted = range(first, first + count)
    sample_ranks.check_count(wanted, size, rank)
    asked = Asked(run, count, classes, conditions, sampling, options)
    opened = asked.open(rank)
    folder, whole = folder_for(out, opened, wanted, format, leads=rank.leads)
    missing = folder.missing(whole)
    if not rank.leads:
        sample_missing(folder, whole, rank, size, [])
        return Result({}, [])
    arguments = {
        "asked": asked, "folder": folder.folder, "kind": format, "wanted": wanted, "size": size,
    }  # fmt: skip
    with sample_ranks.others(rank, work, arguments) as started:
        sample_missing(folder, whole, rank, size, started)
    folder.finish(whole)
    result = {
        **opened.about(folder.folder),
        "images": str(folder.images if format != "npz" else folder.folder / ARRAYS),
        "count": count,
        "drawn": len(missing),
        "total": len(whole),
        "evaluations": folder.evaluations,
    }
    said = [
        line("of", f"{opened.model.checkpoint}, {opened.model.images:,} images seen"),
        line("images", f"{result['images']}  ({len(whole):,}, of which {len(missing):,} new)"),
    ]
    for name, path in shown_beside(folder, whole, classes is not None, strip, film).items():
        result[name] = str(path)
        said.append(line(name, path))
    if conditions.label is None and classes is None and opened.model.class_names:
        said.append(line("classes", hints.classes(opened.model.class_names)))
    if (data := runs.missing_data(opened.model.config)) is None:
        after = hints.next_line("evaluate", run)
    else:
        there = hints.command("evaluate", run, "--set", "data.dataset.path=PATH")
        after = f"measure  {there}  ({data}, its data, is not here)"
    return Result(result, said, [after])


@dataclasses.dataclass(frozen=True)
class Asked:
    """What every process of the command opens alike.

    Args:
        run: the run.
        count: number of images.
        classes: names or indices, ("all",), or None for what the conditions say.
        conditions, sampling, options: of the command.
    """

    run: Path
    count: int
    classes: Sequence[str] | None
    conditions: ConditionOptions
    sampling: SamplerOptions
    options: RunOptions

    def open(self, rank: sample_ranks.Rank) -> runs.OpenedRun:
        """Open the run for its images, of classes in turn where some are named.

        Args:
            rank: of this process, which may have a device of its own.

        Raises:
            UserError: the run is unfit, a class is unknown, or there are fewer images than classes.
        """
        options = rank.options(self.options)
        opened = runs.open_run(self.run, self.sampling, options, self.conditions)
        if self.classes is None:
            return opened
        taken, names = opened.generator.taken, opened.model.class_names
        if not taken["label"] or taken["text"] or taken["image"]:
            raise UserError("--classes: is for models that take a class alone; leave it out")
        if self.conditions.label is not None:
            raise UserError("--classes and --label: name the classes by one of them")
        among = tuple(range(taken["label"]))
        if tuple(self.classes) != ("all",):
            found = [class_of(word, names, taken["label"], "--classes") for word in self.classes]
            among = tuple(label for label in found if label is not None)
        if not among or self.count < len(among):
            raise UserError(
                f"--count {self.count}: is fewer than the {len(among):,} classes; --count "
                f"{COLUMNS * max(1, len(among))} makes {COLUMNS} of each"
            )
        source = Labels(taken["label"], among=among)
        generator = dataclasses.replace(opened.generator, sources=(source,))
        return dataclasses.replace(opened, generator=generator)


def work(
    *,
    rank: sample_ranks.Rank,
    asked: Asked,
    folder: Path,
    kind: Format,
    wanted: range,
    size: int,
) -> None:
    """What another process of this machine does: sample its share into the folder."""
    own = SampleFolder(folder, asked.open(rank), kind)
    sample_missing(own, own.begin(wanted, leads=False), rank, size, [])


def sample_missing(
    folder: SampleFolder,
    whole: range,
    rank: sample_ranks.Rank,
    size: int,
    started: Sequence[SpawnProcess],
) -> None:
    """Sample this process's share of the missing images; rank 0 waits for the others' and tells.

    Args:
        folder: begun.
        whole: indices of all images.
        rank: of this process.
        size: images a batch.
        started: the other processes, where this one started them.
    """
    generator, missing = folder.opened.generator, folder.missing(whole)
    mine = rank.batches(missing, size)
    count, done, slowest = sum(map(len, mine)), 0, 0.0
    tell = lines("sample", "images", LINE)
    quiet = not rank.leads or sys.stderr.isatty()

    def look(left: int) -> None:
        if not quiet:
            tell(len(whole) - len(missing), len(missing) - left, len(whole))

    with sampling_bar(generator, count) if rank.leads else contextlib.nullcontext():
        for batch in mine:
            sample_ranks.check_running(started)
            began = time.monotonic()
            images, folder.evaluations = generator.images(batch)
            folder.add(batch, images.cpu())
            slowest = max(slowest, time.monotonic() - began)
            done += len(batch)
            if not quiet:  # listing a large folder takes time, too
                look(len(missing) - done if rank.count == 1 else len(folder.missing(whole)))
    if rank.leads and rank.count > 1:
        sample_ranks.wait_for(lambda: folder.missing(whole), started, slowest, look)
    if rank.leads and not folder.evaluations:
        folder.evaluations = sum(generator.calls().values())


def shown_beside(
    folder: SampleFolder, whole: range, by_class: bool, strip: bool, film: str | None
) -> dict[str, Path]:
    """Write the grid, and a strip and a film where they are wanted.

    Args:
        folder: finished.
        whole: indices of its images.
        by_class: a row for each class of the grid.
        strip: of the first images.
        film: gif or mp4.

    Returns:
        The files by their names.
    """
    generator, names = folder.opened.generator, folder.opened.model.class_names
    made = {"grid": folder.folder / "grid.png"}
    if by_class:
        save_png(class_sheet(folder, whole), made["grid"])
    else:
        words = generator.words(whole[:GRID], names)
        images = generator.beside_sources(whole[:GRID], folder.read(whole[:GRID]))
        save_png(grid(images, words=words), made["grid"])
    if strip:
        made["strip"] = folder.folder / "strip.png"
        films.write_strip(generator, whole[: films.ROWS], made["strip"])
    if film is not None:
        made["film"] = folder.folder / f"film.{film}"
        films.write_film(generator, whole[: films.FILMED], made["film"])
    return made


def class_sheet(folder: SampleFolder, whole: range) -> Tensor:
    """A row for each class under its name, the first 40 classes, and at most 8 images of each."""
    [source] = folder.opened.generator.sources
    assert isinstance(source, Labels)
    classes = len(source.among)
    each = max(1, min(COLUMNS, len(whole) // classes))
    rows = [whole[(place - whole.start) % classes :: classes][:each] for place in range(classes)]
    rows = rows[:CLASSES]
    names = folder.opened.generator.words([row[0] for row in rows], folder.opened.model.class_names)
    images = folder.read([index for row in rows for index in row])
    return sheet(images.unflatten(0, (len(rows), each)), rows=names or ())


def folder_for(
    out: Path | None,
    opened: runs.OpenedRun,
    wanted: range,
    kind: Format = "png",
    *,
    leads: bool = True,
) -> tuple[SampleFolder, range]:
    """The folder for the images and the range of images that it will hold.

    When not named, it is RUN/drawn, and for images of other settings RUN/drawn-2, RUN/drawn-3, ...

    Args:
        out: its path; None for one in the run's folder.
        opened: the run.
        wanted: indices of the images.
        kind: of the files.
        leads: whether this process is rank 0.

    Raises:
        UserError: the named folder holds other images.
    """
    if out is not None:
        folder = SampleFolder(out, opened, kind)
        return folder, folder.begin(wanted, leads=leads)
    for number in itertools.count(1):
        name = "drawn" if number == 1 else f"drawn-{number}"
        folder = SampleFolder(opened.folder / name, opened, kind)
        try:
            return folder, folder.begin(wanted, leads=leads)
        except OtherImages:
            continue
    raise AssertionError


@contextlib.contextmanager
def sampling_bar(generator: ImageGenerator, count: int) -> Iterator[None]:
    """A progress bar that advances with every network evaluation, as a batch may take minutes.

    Args:
        generator: samples the images.
        count: number of images.
    """
    with bar("sampling", lambda: count * sum(generator.calls().values())) as advance:
        if advance is None:
            yield
            return

        def count_images(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            advance(len(inputs[0]))

        denoisers = [
            generator.denoiser,
            *([] if generator.guide is None else [generator.guide.denoiser]),
        ]
        hooks = [each.network.register_forward_hook(count_images) for each in denoisers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
