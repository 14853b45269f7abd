"""The command line: the functions of `diffusion_pl.commands`, and how errors end them.

A command's options are the signature of the function `command` of its module, its help is the
function's docstring. Help reads both in the module's source; only the module of the wanted command
is imported, so that help and listing answer without torch.
Results go to stdout, progress and errors to stderr. Exit codes: 0 finished, 1 failed, 2 bad input,
75 stopped by a signal, and the same command goes on; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations
import __future__

import ast
import dataclasses
import faulthandler
import importlib
import importlib.util
import itertools
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter

from diffusion_pl import __version__
from diffusion_pl.addresses import masked, refuse_credentials
from diffusion_pl.commands import options, results
from diffusion_pl.commands.safety import refuse_unsafe
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import machine_problem
from diffusion_pl.names import refuse_controls, shown
from diffusion_pl.signals import RESUMABLE, StopError, StopRequest, is_later_rank

COMMANDS = (
    "prepare", "recipe", "train", "launch", "sample", "evaluate", "reference", "sweep", "ema",
    "compare", "report", "runs", "watch", "replay", "losses", "progressive", "interpolate",
    "enlarge", "invert", "inpaint", "likelihood", "import", "export", "convert", "verify", "check",
    "plan", "experiments", "completion",
)  # fmt: skip

# A path joins the two slashes of an address; one letter before them is a disk.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

INTERRUPTED = 130  # the shells' code for Ctrl-C
# Commands that continue their work when they are run again; `train` says so by itself.
RESUMING = frozenset({"prepare", "sample", "sweep", "ema"})
TRAINING = frozenset({"train", "recipe"})  # with a run's folder, in which a signal leaves a mark

# Folders of installed packages, of Python's or of a distribution's, wherever they stand.
_INSTALLED = frozenset({"site-packages", "dist-packages"})

# Control characters that stay in an error's text: every problem is a line.
LINES = "\n\t"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; the process's own when not given.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        for before, word in itertools.pairwise(["", *words]):
            name = argument_name(before, word)
            if not word or re.fullmatch(r"--[\w-]+=", word):
                raise UserError(f"{name}: is empty, as an unset variable is; give it a value")
            refuse_controls(word, name)
            refuse_credentials(word, name)
        call = parse(words)
    except ValueError as error:
        return _bad_input(error)
    except OSError as error:  # help or a completion to a closed pipe or a full disk
        return _broken_output(error)
    if call is None:
        return 0
    if call.command not in TRAINING:
        try:
            return _run(call)
        except KeyboardInterrupt:
            more = "; the same command goes on" if call.command in RESUMING else ""
            print(shown(f"{call.command}: interrupted{more}"), file=sys.stderr)
            return INTERRUPTED
    faulthandler.enable(file=2)  # a crash below Python shows where it was
    # From here on a signal leaves a mark in the run's folder.
    with StopRequest() as stop_request:
        call.keywords["stop_request"] = stop_request
        try:
            return _run(call)
        except StopError:
            run = call.keywords.get("run") or _default_run(call)
            try:
                stop_request.mark_before_steps(run)
            except UserError as error:
                return _bad_input(error)
            print(
                f"{shown(str(run))}: stopped before a step; the same command goes on",
                file=sys.stderr,
            )
            return RESUMABLE


def _default_run(call: Call) -> Path:
    """The folder of a run that was not named."""
    named = Path(call.words[0])
    return Path("runs") / (
        named.stem if call.command == "train" else f"{named.resolve().name}-probe"
    )


def _run(call: Call) -> int:
    """Import the command's module and call it; errors become a line and an exit code."""
    try:
        refuse_unsafe(os.environ)
    except ValueError as error:
        return _bad_input(error)
    if sys.stderr.isatty() and not is_later_rank():  # importing libraries takes seconds
        print(f"{shown(call.command)}: starting ...", file=sys.stderr, flush=True)
    module = importlib.import_module(module_of(call.command))
    try:
        result: results.Result = module.command(*call.words, **call.keywords)
        result.tell(call.json)
    except UserError as error:
        return _bad_input(error)
    except ValueError as error:  # a library's complaint about its input, or a bug of the user's
        if _is_user_code(error):
            raise
        return _bad_input(error)
    except getattr(module, "FAILURES", ()) as error:  # failures that a run expects
        print(f"failed: {shown(masked(str(error)), keep=LINES)}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, missing permission, a missing file, a closed pipe
        return _broken_output(error)
    return result.code


def _broken_output(error: OSError) -> int:
    """End for what the machine refused; 0 where the reader of stdout left, as `| head` does."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    problem = machine_problem(error)
    if problem is None:
        raise error
    return _bad_input(UserError(problem))


def _is_user_code(error: BaseException) -> bool:
    """Whether an error passed through the user's code: neither ours nor installed."""
    known = (Path(__file__).parent, Path(sysconfig.get_path("stdlib")))
    frames = traceback.walk_tb(error.__traceback__)
    files = (Path(frame.f_code.co_filename) for frame, _ in frames)
    return any(
        file.is_file()
        and not _INSTALLED.intersection(file.parts)
        and not any(map(file.is_relative_to, known))
        for file in files
    )


def _bad_input(error: ValueError) -> int:
    """Print a user's mistake without credentials, which libraries quote with addresses."""
    print(f"error: {shown(masked(str(error)), keep=LINES)}", file=sys.stderr)
    return 2


def argument_name(before: str, word: str) -> str:
    """The option or key of a word on the command line, for messages that must not show it."""
    key, equals, _ = word.partition("=")
    if equals and "/" not in key:
        return key if key.startswith("--") else f"SET: {key}"
    return before.partition("=")[0] if before.startswith("--") else "command line"


@dataclasses.dataclass(frozen=True)
class Call:
    """A parsed command line.

    Args:
        command: its name.
        words: positional arguments of the command's function.
        keywords: its keyword arguments.
        json: print JSON on a terminal, too.
    """

    command: str
    words: tuple[Any, ...]
    keywords: dict[str, Any]
    json: bool


def parse(words: Sequence[str]) -> Call | None:
    """Parse the command line; overrides may stand before and after options.

    Returns:
        The call; None after help or the version was printed.

    Raises:
        UserError: an unknown command, option or value.
    """
    app = program(words)
    try:
        function, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        command = f"{words[0]}: " if words[0] in COMMANDS else ""
        raise UserError(f"{command}{str(error).strip()}{_joined(words, str(error))}") from error
    if not words:
        raise UserError(f"name a command: {', '.join(COMMANDS)}; or --help")
    if words[0] not in COMMANDS or function is not app[words[0]].default_command:
        try:
            function(*bound.args, **bound.kwargs)
        except SystemExit as error:  # rich's way to say that the reader left
            raise BrokenPipeError from error
        return None
    as_json = bound.arguments.pop("json", False)
    for name, value in bound.arguments.items():
        bound.arguments[name] = _expand_home(value, name)
    return Call(words[0], bound.args, bound.kwargs, as_json)


def _joined(words: Sequence[str], problem: str) -> str:
    """How to write a value that begins with a dash, if that is the problem; else ""."""
    option = re.search(r"(--[\w-]+) requires an argument", problem)
    if option is None:
        return ""
    for before, word in pairwise(words):
        if before == option[1] and word.startswith("-"):
            return f" A value that begins with - is joined by =, as in {before}={word}."
    return ""


def program(words: Sequence[str] = ()) -> App:
    """The program with its commands, or with that alone that the words begin with."""
    app = App(
        name="diffusion_pl",
        help="Train, sample, evaluate and compare image diffusion models by YAML.",
        help_format="plaintext",
        version=f"diffusion_pl {__version__}",
        # Only some options have a --no-..., the last of two equal options counts, and a file name
        # that begins with a bracket is no JSON.
        default_parameter=Parameter(
            negative=(), allow_repeating=True, json_list=False, json_dict=False
        ),
    )
    for place, name in enumerate(words[:1] if {*words[:1]} & {*COMMANDS} else COMMANDS):
        app.command(signature_of(name), name=name, sort_key=place)
    return app


def module_of(command: str) -> str:
    """The module of a command; `import` is a keyword of Python, runs.py opens a run."""
    other = {"import": "import_", "runs": "run_list"}
    return f"diffusion_pl.commands.{other.get(command, command)}"


def signature_of(command: str) -> Callable[..., None]:
    """A command's function without its body, with `--json`; parsed, as its module may import torch.

    Its annotations and defaults are from `diffusion_pl.commands.options`, or Python's own.
    """
    spec = importlib.util.find_spec(module_of(command))
    assert spec is not None and spec.origin is not None
    nodes = ast.parse(Path(spec.origin).read_bytes()).body
    node = next(n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == "command")
    document = re.sub(r"\n {12}", " ", ast.get_docstring(node, clean=False) or "")  # lines joined
    node.body, node.returns = [ast.Expr(ast.Constant(document))], None
    node.args.kwonlyargs.append(ast.arg("json", ast.Name("Json", ast.Load())))
    node.args.kw_defaults.append(ast.Constant(False))
    tree = ast.fix_missing_locations(ast.Module([node], []))
    names = dict(vars(options))
    flag = __future__.annotations.compiler_flag
    exec(compile(tree, spec.origin, "exec", flags=flag, dont_inherit=True), names)
    function: Callable[..., None] = names["command"]
    return function


def _expand_home(value: object, name: str) -> object:
    """Expand ~ in paths, which a shell does not do in --run=~/x.

    Raises:
        UserError: there is no such home; or an address, for which a folder `s3:` would be made.
    """
    if isinstance(value, tuple):
        return tuple(_expand_home(each, name) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        expanded = {field: _expand_home(each, field) for field, each in vars(value).items()}
        return dataclasses.replace(value, **expanded)
    if isinstance(value, Path) and _ADDRESS.match(str(value)) and not value.exists():
        raise UserError(
            f"{name}: {value} is an address, and this must be a local file or folder; download it "
            "first, or copy the result there"
        )
    if not isinstance(value, str | Path) or not str(value).startswith("~"):
        return value
    from diffusion_pl.config.words import expand_home  # slow to import, and not needed for help

    return type(value)(expand_home(str(value), name))
