"""The model card of an export: what the weights are, how to load them, their numbers, settings.

Markdown that any viewer shows. What comes from a run or its data is text there, whatever it holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_pl import config
from diffusion_pl.commands import runs
from diffusion_pl.commands.compare import flat
from diffusion_pl.commands.report_numbers import ASKED, KINDS, answers, newest_of
from diffusion_pl.commands.report_read import Told, setting, told
from diffusion_pl.commands.report_settings import PAPER, in_words
from diffusion_pl.diffusion.objective import trained_range
from diffusion_pl.errors import UserError
from diffusion_pl.evaluation.provenance import commit, now
from diffusion_pl.io.files import write_atomically
from diffusion_pl.names import shown
from diffusion_pl.training.history import is_evaluation

_MARKS = re.compile(r"([\\`*_\[\]<>|~$#@!&])")
CLASSES = 100  # named on a card


def path_of(dest: Path, format: str) -> Path:
    """Where the card of an export lies: in its folder, or beside its file.

    Args:
        dest: what the export writes.
        format: of the weights.
    """
    return dest / "README.md" if format == "diffusers" else dest.with_name(f"{dest.name}.md")


def write(path: Path, model: runs.Model, weights: str, dest: Path, format: str) -> None:
    """Write a card.

    Args:
        path: the file.
        model: whose weights were exported.
        weights: "ema", "denoiser" or "ema:LENGTH".
        dest, format: of the export.

    Raises:
        UserError: the file cannot be written.
    """
    text = "\n".join(lines(model, weights, dest, format)) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def lines(model: runs.Model, weights: str, dest: Path, format: str) -> Iterator[str]:
    """The card's lines; arguments as for `write`."""
    run = _told(model.checkpoint.parent.parent)
    data = config.build(model.config, "data.dataset")
    network = type(model.denoiser.network).__name__
    parameters = sum(each.numel() for each in model.denoiser.parameters())
    yield f"# {escaped(dest.stem or dest.name)}"
    yield ""
    yield (
        f"A diffusion model of images of {data.resolution} x {data.resolution} pixels, "
        f"{data.channels} channels: {escaped(network)}, {parameters:,} parameters, trained and "
        "exported with diffusion_pl."
    )
    yield ""
    named = [escaped(name) for name in model.class_names[:CLASSES]]
    more = f" and {len(model.class_names) - CLASSES:,} more" * (len(model.class_names) > CLASSES)
    low, high = trained_range(model.objective)
    record = {} if run is None else run.record
    facts = {
        "weights": kind_of(weights, model.config.tree),
        "images seen in training": f"{model.images:,}",
        "data": ", ".join(
            [escaped(in_words(setting(model.config.tree, "data.dataset"))), *_data(record)]
        ),
        "classes": f"{', '.join(named)}{more}" or "no names",
        "noise levels": f"sigma {low:.4g} to {high:.4g}, relative to images in [-1, 1]",
        "checkpoint": escaped(model.checkpoint.name),
        "code of the training": escaped(str(record.get("code") or "not recorded")),
        "exported": f"{now()}, commit {escaped(str(commit() or 'not recorded'))}",
    }
    yield from table(["", ""], list(facts.items()))
    yield from ("", "## Loading", "", *loading(model, dest, format), "")
    yield from ("## Numbers", "", *_numbers(run, model, weights), "")
    yield from ("## Settings", "", *_settings(model.config.tree), "")
    yield "## Licence"
    yield ""
    yield (
        "Not stated. Whoever publishes these weights chooses their licence, which that of the "
        "training images may limit, and writes it here."
    )


def kind_of(weights: str, tree: Mapping[str, Any]) -> str:
    """Which weights, in words.

    Args:
        weights: "ema", "denoiser" or "ema:LENGTH".
        tree: the config.
    """
    length = weights.partition(":")[2]
    if length:
        return f"averaged, of relative length {length} (sigma_rel of EDM2), made of snapshots"
    averaged = f", {escaped(in_words(tree['ema']))}" if weights == "ema" else ""
    return f"{KINDS[weights]}{averaged}"


def escaped(text: str) -> str:
    r"""Text that Markdown and HTML show as it is, in one line: a<b -> a\<b."""
    plain = _MARKS.sub(r"\\\1", shown(text)).replace("\\&", "&amp;").replace("\\<", "&lt;")
    return plain.replace("://", ":\\/\\/").replace("www.", "www\\.")  # no links of strangers


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown; the cells are escaped already."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def loading(model: runs.Model, dest: Path, format: str) -> list[str]:
    """How the export is loaded, as a block of code."""
    name = shown(dest.name)
    taken = model.taken
    arguments = [
        *(["label=label"] if taken["label"] else []),
        *(["text=text", "text_mask=text_mask"] if taken["text"] else []),
        *(["source=source", "source_mask=source_mask"] if taken["image"] else []),
    ]
    given = ", ".join(["x", "sigma", *arguments])
    if format == "torch":
        return [
            *fenced("python", "import torch", "", f"program = torch.export.load({name!r})",
                    f"denoised = program.module()({given})"),
            "",
            *_arguments(model),
            "",
            "`denoised` is float32, shaped as `x`: the mean of the clean images that `x` may be. "
            "The program was compared with the denoiser before it was written. It is on the "
            "CPU; `torch.export.passes.move_to_device_pass` moves it to another device. A program "
            "is code: load none that you do not trust.",
        ]  # fmt: skip
    if format == "jit":
        return ["A checkpoint of JiT's published code, whose `main_jit.py` resumes from it."]
    kind = "diffusers" if format == "diffusers" else "safetensors"
    block = fenced(
        "console", f"$ python -m diffusion_pl import {kind} {_word(name)} runs/imported",
        "$ python -m diffusion_pl sample runs/imported --count 64",
    )  # fmt: skip
    if format == "diffusers":
        return [
            *block, "", "In diffusers:", "",
            *fenced("python", "from diffusers import DDPMPipeline", "",
                    f"images = DDPMPipeline.from_pretrained({name!r})(batch_size=4).images"),
        ]  # fmt: skip
    return [
        *block, "", "From Python:", "",
        *fenced("python", "import diffusion_pl as dp", "",
                'images = dp.Run("runs/imported").sample(16)'),
    ]  # fmt: skip


def fenced(language: str, *code: str) -> list[str]:
    """A block of code; its lines begin with words of ours, so none of them ends it."""
    return [f"```{language}", *code, "```"]


def _word(name: str) -> str:
    """A file's name as a word of a shell."""
    return name if re.fullmatch(r"[\w.,+=@:-]+", name) else "FILE"


def _arguments(model: runs.Model) -> list[str]:
    """The inputs of an exported program."""
    taken, network = model.taken, model.denoiser.network
    data = config.build(model.config, "data.dataset")
    side = data.resolution
    rows = [
        (
            "x",
            f"float32 (B, {data.channels}, {side}, {side})",
            "image in \\[-1, 1\\] + sigma noise",
        ),
        ("sigma", "float32 (B,)", "noise levels > 0"),
    ]
    if taken["label"]:
        rows.append(("label", "int64 (B,)", f"0 to {taken['label'] - 1}; -1 for none"))
    if taken["text"]:
        length = getattr(network, "text_length", 0)
        rows.append(("text", f"float32 (B, {length}, {taken['text']})", "token states"))
        rows.append(("text\\_mask", f"bool (B, {length})", "True where there is a token"))
    if taken["image"]:
        rows.append(("source", f"float32 (B, {taken['image']}, {side}, {side})", "image to go by"))
        rows.append(("source\\_mask", f"bool (B, 1, {side}, {side})", "True where it is known"))
    return table(["argument", "type", "meaning"], rows)


def _told(folder: Path) -> Told | None:
    """What a run's folder says; None for a checkpoint that lies in none."""
    try:
        return told(folder, folder.name)
    except UserError:
        return None


def _data(record: Mapping[str, Any]) -> Iterator[str]:
    """The number of training images and the beginnings of their fingerprints, where recorded."""
    said = record.get("data")
    if not isinstance(said, Mapping):
        return
    if type(said.get("count")) is int:
        yield f"{said['count']:,} images"
    prints = said.get("fingerprints")
    for side, each in prints.items() if isinstance(prints, Mapping) else ():
        yield escaped(f"sha256 {str(each)[:12]} at {side} px")


def _numbers(run: Told | None, model: runs.Model, weights: str) -> list[str]:
    """The numbers of the exported weights, each with what it depends on."""
    rows = [] if run is None else [row for row in run.all_rows if is_evaluation(row)]
    own = [r for r in rows if r.get("weights") == weights and r.get("images") == model.images]
    if not own:
        return [
            f"None of these weights ({KINDS.get(weights, escaped(weights))}, after "
            f"{model.images:,} images) has been measured; `python -m diffusion_pl evaluate RUN "
            f"--weights {weights}` does it."
        ]
    head = ["number", "value", *(each.rstrip("?") for each in ASKED), "sampled", "seed", "commit"]
    cells = [
        [
            escaped(str(row["name"])),
            _value(row),
            *map(escaped, answers(row)),
            escaped(str(row.get("seed"))),
            escaped(str(row.get("commit") or "not recorded")),
        ]
        for row in newest_of(own).values()
    ]
    note = "The number of images and the extractor belong to a number: compare like with like."
    return [*table(head, cells), "", note]


def _value(row: Mapping[str, Any]) -> str:
    blocks = row.get("blocks", ())
    said = f"{row['value']:.5g}" if math.isfinite(row["value"]) else str(row["value"])
    many = len(blocks) > 1
    return (
        f"{said} (mean of {len(blocks)}, {min(blocks):.5g} to {max(blocks):.5g})" if many else said
    )


def _settings(tree: Mapping[str, Any]) -> list[str]:
    """The settings as a paper's table, then all of them."""
    short = [
        (title, escaped(words))
        for title, key in PAPER.items()
        if (words := in_words(setting(tree, key)))
    ]
    every = [(escaped(key), escaped(value)) for key, value in flat("", tree)]
    return [
        *table(["setting", "value"], short),
        "",
        f"<details><summary>all {len(every):,} settings</summary>",
        "",
        *table(["key", "value"], every),
        "",
        "</details>",
    ]
