"""The command line: what each command takes, and how errors end it.

Only the module of the wanted command is imported: help and listing answer without torch.
Results go to stdout, progress and errors to stderr. Exit codes: 0 finished, 1 failed, 2 bad input,
75 stopped by a signal, and the same command goes on; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import itertools
import keyword
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from diffusion_pl import __version__
from diffusion_pl.addresses import masked, refuse_credentials
from diffusion_pl.commands import arguments as measuring
from diffusion_pl.commands import results
from diffusion_pl.commands.safety import refuse_unsafe
from diffusion_pl.errors import UserError
from diffusion_pl.files import of_the_machine
from diffusion_pl.names import refuse_controls, shown
from diffusion_pl.signals import RESUMABLE, Stopped, Wish, is_later_rank

COMMANDS = {
    "prepare": "make shards of a folder, archive or table of images, or go on where it stopped",
    "train": "train an experiment, or go on where it stopped",
    "launch": "train on a SLURM cluster: check, write the job's script, submit it",
    "sample": "draw images from a run",
    "evaluate": "measure a run, or images in a folder or .npz; prints one JSON object",
    "reference": "statistics of real images, to compare with",
    "sweep": "measure a run under many samplers: table, plot, what nothing beats",
    "replay": "look at one step of a run again: its images, noise levels, losses, gradient",
    "losses": "a run's error at each noise level, averaged and raw weights",
    "progressive": "draw what the network makes of the image from level to level",
    "interpolate": "draw images between two of one's own",
    "enlarge": "super-resolution: draw larger images of one's own pictures",
    "invert": "take images to noise along the flow, and back",
    "likelihood": "bits per dimension of the data under a run",
    "import": "make a run of a published checkpoint",
    "export": "write a run's weights for others",
    "convert": "write a run's checkpoints of earlier formats in today's",
    "verify": "see that prepared data or a run's checkpoints are as they were written",
    "check": "bind an experiment's YAML, build its network without memory, show what it means",
    "experiments": "list the experiments with their published numbers",
}


# A path joins the two slashes of an address; one letter before them is a disk.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

INTERRUPTED = 130  # as shells call it
# What leaves of its work what the same command finds; `train` sees to itself.
GO_ON = frozenset({"prepare", "sample", "sweep"})

# What stays of an error's text: every problem is a line.
LINES = "\n\t"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; the process's own when not given.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        for before, word in itertools.pairwise(["", *words]):
            refuse_controls(word, named(before, word))
            refuse_credentials(word, named(before, word))
    except ValueError as error:
        return _bad(error)
    options = parse(words)
    if options.command != "train":
        try:
            return _run(options)
        except KeyboardInterrupt:
            more = "; the same command goes on" if options.command in GO_ON else ""
            print(shown(f"{options.command}: interrupted{more}"), file=sys.stderr)
            return INTERRUPTED
    faulthandler.enable(file=2)  # a crash below Python shows where it was
    with Wish() as wish:  # first of all: a signal while it starts must not lose the run's place
        options.wish = wish
        try:
            return _run(options)
        except Stopped:
            run = options.run or Path("runs") / Path(options.experiment).stem
            try:
                wish.mark_before_steps(run)
            except UserError as error:
                return _bad(error)
            print(
                f"{shown(str(run))}: stopped before a step; the same command goes on",
                file=sys.stderr,
            )
            return RESUMABLE


def _run(options: argparse.Namespace) -> int:
    """Import the command's module and run it; its errors become a line and an exit code."""
    try:
        refuse_unsafe(os.environ)
    except ValueError as error:
        return _bad(error)
    if sys.stderr.isatty() and not is_later_rank():  # libraries take seconds to be read
        print(f"{shown(options.command)}: starting ...", file=sys.stderr, flush=True)
    # `import` is a word of the language, so its module is import_.
    name = options.command + "_" * keyword.iskeyword(options.command)
    command = importlib.import_module(f"diffusion_pl.commands.{name}")
    try:
        code: int = command.run(options)
    except UserError as error:
        return _bad(error)
    except ValueError as error:  # a library's word on what it was given, or a bug of the user's
        if _is_theirs(error):
            raise
        return _bad(error)
    except command.FAILURES as error:
        print(f"failed: {shown(masked(str(error)), keep=LINES)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of stdout left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be written, a file that is gone
        problem = of_the_machine(error)
        if problem is None:
            raise
        return _bad(UserError(problem))
    return code


def _is_theirs(error: BaseException) -> bool:
    """Whether an error went through code of the user's own: neither ours nor installed."""
    known = [Path(__file__).parent, *map(Path, set(sysconfig.get_paths().values()))]
    frames = traceback.walk_tb(error.__traceback__)
    files = (Path(frame.f_code.co_filename) for frame, _ in frames)
    return any(file.is_file() and not any(map(file.is_relative_to, known)) for file in files)


def _bad(error: ValueError) -> int:
    """Say a user's mistake; libraries quote addresses with all that stands in them."""
    print(f"error: {shown(masked(str(error)), keep=LINES)}", file=sys.stderr)
    return 2


def named(before: str, word: str) -> str:
    """What a word of the command line is, for messages that must not show it."""
    key, equals, _ = word.partition("=")
    if equals and "/" not in key:
        return key if key.startswith("--") else f"SET: {key}"
    return before.partition("=")[0] if before.startswith("--") else "command line"


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaints quote what was typed."""

    def error(self, message: str) -> NoReturn:
        """Leave with a complaint that holds no credentials."""
        super().error(shown(masked(message)))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the words; overrides may stand before and after options."""
    everything = parser()
    options, rest = everything.parse_known_args(arguments)
    # argparse gives a positional with "*" only the words of one place.
    if rest and (
        options.command not in ("train", "launch", "check") or any(w[0] == "-" for w in rest)
    ):
        everything.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides.extend(rest)
    if options.command == "check":  # several experiments, and overrides of all of them
        words = [options.experiment, *options.overrides]
        options.experiments = [word for word in words if "=" not in word]
        options.overrides = [word for word in words if "=" in word]
    try:
        for name, value in vars(options).items():
            setattr(options, name, _at_home(value, name))
    except ValueError as error:
        everything.error(str(error))
    return options


def _at_home(value: object, name: str) -> object:
    """A path, or a list of them, with the home folder for ~: a shell leaves that of --run=~/x.

    Raises:
        UserError: no such home, or an address, in whose stead a folder `s3:` would be made.
    """
    if isinstance(value, list):
        return [_at_home(each, name) for each in value]
    if isinstance(value, Path) and _ADDRESS.match(str(value)) and not value.exists():
        raise UserError(
            f"{name}: {value} is an address, and this is a file or folder of this machine; fetch "
            "it first, or copy what is written there"
        )
    if not isinstance(value, str | Path) or not str(value).startswith("~"):
        return value
    from diffusion_pl.config.words import at_home  # help answers without it

    return type(value)(at_home(str(value), name))


def parser() -> Parser:
    """The arguments of every command."""
    top = Parser(
        prog="python -m diffusion_pl",
        description="Train, sample, evaluate and compare image diffusion models by YAML.",
    )
    top.add_argument("--version", action="version", version=f"diffusion_pl {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parts = {name: commands.add_parser(name, help=text) for name, text in COMMANDS.items()}
    _add_prepare(parts["prepare"])
    measuring.add_upkeep(parts["verify"], parts["convert"])
    for name in ("train", "launch", "check"):
        several = ", or several" if name == "check" else ""
        parts[name].add_argument("experiment", help=f"a name, or a YAML file anywhere{several}")
        parts[name].add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="such as optimizer.lr=1e-4"
        )
        _add_trust(parts[name])
    parts["train"].add_argument("--run", type=Path, help="the run's folder (runs/EXPERIMENT)")
    parts["train"].add_argument(
        "--from", type=Path, dest="start", metavar="RUN", help="start from its weights: fine-tune"
    )
    parts["train"].add_argument(
        "--data-changed", action="store_true", help="go on with other data than until now"
    )
    parts["train"].add_argument(
        "--fresh-labels", action="store_true", help="with --from: all but what knows its classes"
    )
    parts["train"].add_argument(
        "--accept-differences",
        action="store_true",
        help="with --from: though it was trained for another objective or network",
    )
    measuring.add_check(parts["check"])
    parts["experiments"].add_argument(
        "--all", action="store_true", help="those of the package too, where there is experiments/"
    )
    measuring.add_launch(parts["launch"])
    drawing = "sample evaluate progressive interpolate enlarge invert likelihood"
    for name in drawing.split():
        _add_run(parts[name])
        _add_sampler(parts[name])
    for name in ("sweep", "losses"):
        _add_run(parts[name])
        parts[name].set_defaults(sampler=None, steps=None, guidance=None)
    parts["losses"].set_defaults(guidance=1.0)  # of the model itself
    sample = parts["sample"]
    sample.add_argument("--count", type=int, default=64, help="how many images (64)")
    sample.add_argument("--first", type=int, default=0, help="index of the first image (0)")
    sample.add_argument("--label", help="class of every image, its name or index; drawn otherwise")
    sample.add_argument("--out", type=Path, help="folder of the images (RUN/drawn)")
    _add_replay(parts["replay"])
    measuring.add_evaluate(parts["evaluate"])
    measuring.add_reference(parts["reference"])
    measuring.add_losses(parts["losses"])
    measuring.add_sweep(parts["sweep"])
    _add_enlarge(parts["enlarge"])
    _add_latents(parts)
    _add_exchange(parts)
    for name in ("prepare", "sample", "evaluate", "import", "export"):
        results.add(parts[name])
    return top


def _add_replay(part: argparse.ArgumentParser) -> None:
    """What looking at a step again takes."""
    part.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    part.add_argument("--step", type=int, required=True, metavar="N", help="steps before it")
    part.add_argument("--out", type=Path, help="folder of the picture (RUN/replay)")
    _add_trust(part)


def _add_enlarge(part: argparse.ArgumentParser) -> None:
    """What enlarging pictures takes."""
    part.add_argument("image", type=Path, nargs="+", help="PNG, JPEG or WebP files, or folders")
    part.add_argument("--to", type=int, metavar="SIDE", help="longer side, pixels (the run's)")
    part.add_argument(
        "--restart", type=float, metavar="SIGMA", help="noise to begin from (half the factor)"
    )
    part.add_argument(
        "--consistent",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="made smaller again, the result is the picture (the default)",
    )
    part.add_argument("--count", type=int, default=1, help="variations of each picture (1)")
    part.add_argument("--label", help="class of every picture, its name or index")
    part.add_argument("--out", type=Path, help="folder of the results (RUN/enlarge)")


def _add_prepare(part: argparse.ArgumentParser) -> None:
    """What making shards takes."""
    part.add_argument("source", help="folder, .zip, CIFAR-10, .tar, LSUN, .parquet, or synthetic")
    part.add_argument("dest", type=Path, help="the data set's folder to make")
    part.add_argument("--resolutions", required=True, metavar="R,...", help="such as 256,128,64")
    part.add_argument("--filter", default="lanczos", help="lanczos, box-bicubic or area (lanczos)")
    part.add_argument("--fit", default="crop", help="crop, pad (white) or exact (crop)")
    part.add_argument("--encoding", default="png", help="png, webp, raw or jpeg (png)")
    part.add_argument(
        "--channels", type=int, default=3, help="1 (grey), 3 (RGB) or 4 (RGB and a fourth) (3)"
    )
    part.add_argument("--shard-images", type=int, default=1000, help="originals a shard (1000)")
    part.add_argument(
        "--labels", action=argparse.BooleanOptionalAction, help="of folders: the first of a path"
    )
    part.add_argument("--name", help="of the data set (after its source)")
    part.add_argument("--count", type=int, help="images of the synthetic set")
    part.add_argument("--seed", type=int, help="of the synthetic set (0)")
    part.add_argument(
        "--split", metavar="NAME", help="train, val, test, or all (of CIFAR-10 train)"
    )
    part.add_argument("--image", metavar="NAME", help="column of a table, ending in a tar, or all")
    part.add_argument("--label", metavar="NAME", help="the same of the labels, or json.FIELD")
    part.add_argument("--workers", type=int, help="processes (one a core)")
    part.add_argument(
        "--skip-broken", type=int, default=0, metavar="N", help="images that may be left out (0)"
    )


def _add_latents(parts: Mapping[str, argparse.ArgumentParser]) -> None:
    """What the commands that go from images to noise, or look on the way, take."""
    for name in ("interpolate", "invert"):
        count = 2 if name == "interpolate" else "+"
        parts[name].add_argument(
            "image", type=Path, nargs=count, help="PNG files of the run's size"
        )
    for name in ("progressive", "interpolate", "invert"):
        parts[name].add_argument("--out", type=Path, help=f"folder of the pictures (RUN/{name})")
        parts[name].add_argument("--label", help="class of every image, its name or index")
    progressive = parts["progressive"]
    progressive.add_argument("--count", type=int, default=8, help="how many images (8)")
    progressive.add_argument("--frames", type=int, default=10, help="levels that are shown (10)")
    progressive.add_argument(
        "--share", type=float, metavar="SIGMA", help="one image down to this level, then COUNT"
    )
    interpolate = parts["interpolate"]
    interpolate.add_argument("--count", type=int, default=9, help="images, both ends included (9)")
    interpolate.add_argument(
        "--sigma", type=float, help="level at which they are mixed (3.42, timestep 500 of DDPM)"
    )
    interpolate.add_argument(
        "--by", choices=("noise", "flow"), default="noise", help="how images get there (noise)"
    )
    interpolate.add_argument("--spherical", action="store_true", help="along the great circle")
    for name in ("progressive", "interpolate", "invert", "likelihood"):
        parts[name].add_argument(
            "--base-alone",
            action="store_true",
            help="of a pyramid: its base at full size, which is not how it draws",
        )
    likelihood = parts["likelihood"]
    likelihood.add_argument("--count", type=int, default=100, help="images of the data (100)")
    likelihood.add_argument("--probes", type=int, help="of the trace, an image; 0: exactly (1)")
    likelihood.add_argument(
        "--variance",
        choices=("small", "large", "learned"),
        help="of the bound's reverse steps (what the objective trains; large where it trains none)",
    )
    likelihood.add_argument(
        "--by", choices=("flow", "bound"), default="flow", help="ODE, or DDPM's variational bound"
    )


def _add_exchange(parts: Mapping[str, argparse.ArgumentParser]) -> None:
    """What `import` and `export` take."""
    bring, give = parts["import"], parts["export"]
    kinds = ("edm", "diffusers", "guided", "lucidrains", "pesser", "safetensors")
    bring.add_argument("kind", choices=kinds, help="whose layout it has")
    bring.add_argument("source", type=Path, help="the file, or diffusers' folder")
    bring.add_argument("dest", type=Path, help="the run's folder to make")
    bring.add_argument(
        "--like", metavar="EXPERIMENT", help="whose data, optimizer, evaluation, trainer it takes"
    )
    bring.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what the file does not say, by its own keys, or over the run's config",
    )
    bring.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="of two in the file (ema)"
    )
    give.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint file")
    give.add_argument("dest", type=Path, help="the file, or diffusers' folder, to make")
    give.add_argument("--format", choices=("safetensors", "diffusers"), default="safetensors")
    _add_weights(give)
    _add_trust(bring)
    _add_trust(give)


def _add_run(part: argparse.ArgumentParser) -> None:
    """What drawing images from a run takes."""
    part.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint file")
    part.add_argument("--seed", type=int, default=0, help="of noise and labels (0)")
    part.add_argument(
        "--guidance-interval", type=interval, metavar="LOW,HIGH", help="sigmas that are guided"
    )
    part.add_argument("--guide", type=Path, metavar="RUN", help="a weaker run: autoguidance by it")
    part.add_argument("--batch-size", type=int, help="images drawn at a time; not the numbers")
    part.add_argument("--device", default="auto", help="cpu, cuda or auto")
    _add_trust(part)
    part.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="over the run's config"
    )


def _add_sampler(part: argparse.ArgumentParser) -> None:
    """How images are drawn, in one way."""
    part.add_argument(
        "--sampler",
        metavar="NAME",
        help="integrate by it on the run's own levels: heun, deis, ... (docs/samplers.md), or the "
        "dotted path of your function",
    )
    part.add_argument("--steps", type=int, help="steps of the sampler")
    part.add_argument("--guidance", type=float, metavar="WEIGHT", help="of guidance, 1 for none")
    _add_weights(part)


def _add_weights(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "--weights",
        type=measuring.weights,
        default="ema",
        metavar="KIND",
        help="ema, denoiser (raw), or ema:0.1 for an average of that length (ema)",
    )


def _add_trust(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="trust a file of others with it: a package, or the address of data",
    )


def interval(words: str) -> tuple[float, float]:
    """Two levels, as argparse wants them read."""
    low, high = map(float, words.split(","))
    return low, high
