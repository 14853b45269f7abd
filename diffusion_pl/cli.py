"""The command line: what each command takes, and how errors end it.

Only the module of the wanted command is imported: help and listing answer without torch.
Results go to stdout, progress and errors to stderr. Exit codes: 0 finished, 1 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "train": "train an experiment, or go on where it stopped",
    "sample": "draw images from a run",
    "evaluate": "measure a run; prints one JSON object",
    "check": "bind an experiment's YAML, build its network without memory, show what it means",
    "experiments": "list the experiments with their published numbers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; the process's own when not given.

    Returns:
        The exit code.
    """
    options = parse(arguments)
    command = importlib.import_module(f"diffusion_pl.commands.{options.command}")
    try:
        code: int = command.run(options)
    except ValueError as error:  # a user's mistake, and every ConfigError
        print(f"error: {error}", file=sys.stderr)
        return 2
    except command.FAILURES as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of stdout left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the words; overrides may stand before and after options."""
    everything = parser()
    options, rest = everything.parse_known_args(arguments)
    # argparse gives a positional with "*" only the words of one place.
    if rest and (options.command not in ("train", "check") or any(w[0] == "-" for w in rest)):
        everything.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides.extend(rest)
    return options


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    top = argparse.ArgumentParser(
        prog="python -m diffusion_pl",
        description="Train, sample, evaluate and compare image diffusion models by YAML.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parts = {name: commands.add_parser(name, help=text) for name, text in COMMANDS.items()}
    for name in ("train", "check"):
        parts[name].add_argument("experiment", help="a name in experiments/, or a YAML file")
        parts[name].add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="such as optimizer.lr=1e-4"
        )
    parts["train"].add_argument("--run", type=Path, help="the run's folder (runs/EXPERIMENT)")
    for name in ("sample", "evaluate"):
        _add_run(parts[name])
    sample = parts["sample"]
    sample.add_argument("--count", type=int, default=64, help="how many images (64)")
    sample.add_argument("--first", type=int, default=0, help="index of the first image (0)")
    sample.add_argument("--label", type=int, help="class of every image; drawn for each otherwise")
    sample.add_argument("--out", type=Path, help="folder of the images (RUN/drawn)")
    parts["evaluate"].add_argument("--count", type=int, help="how many images (the experiment's)")
    return top


def _add_run(part: argparse.ArgumentParser) -> None:
    """What drawing images from a run takes."""
    part.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint file")
    part.add_argument("--seed", type=int, default=0, help="of noise and labels (0)")
    part.add_argument("--sampler", help="heun, euler (DDIM) or ancestral; the run's own otherwise")
    part.add_argument("--steps", type=int, help="steps of the sampler")
    part.add_argument("--guidance", type=float, metavar="WEIGHT", help="of guidance, 1 for none")
    part.add_argument(
        "--guidance-interval", type=interval, metavar="LOW,HIGH", help="sigmas that are guided"
    )
    part.add_argument("--guide", type=Path, metavar="RUN", help="a weaker run: autoguidance by it")
    part.add_argument(
        "--weights", choices=("ema", "denoiser"), default="ema", help="averaged or raw (ema)"
    )
    part.add_argument("--batch-size", type=int, help="images drawn at a time; not the numbers")
    part.add_argument("--device", default="auto", help="cpu, cuda or auto")
    part.add_argument(
        "--allow", action="append", default=[], metavar="PACKAGE", help="import it for this run"
    )
    part.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="over the run's config"
    )


def interval(words: str) -> tuple[float, float]:
    """Two levels, as argparse wants them read."""
    low, high = map(float, words.split(","))
    return low, high
