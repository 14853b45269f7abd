"""The options of the command line: none is lost, and each is read as it always was."""

from __future__ import annotations

import importlib
import inspect
import resource
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from diffusion_pl import cli
from diffusion_pl.commands import options, results

# Frozen: what the parser took before commands were functions.

# Words that a command needs before its options.
WORDS = {
    "prepare": "src dest --resolutions 8", "recipe": "d", "train": "x", "launch": "x", "check": "x",
    "plan": "x",
    "sample": "r", "evaluate": "r", "progressive": "r", "likelihood": "r", "losses": "r",
    "sweep": "r", "replay": "r --step 3", "enlarge": "r a.png", "invert": "r a.png",
    "inpaint": "r a.png mask.png",
    "interpolate": "r a.png b.png", "reference": "d", "import": "edm a.pkl d", "export": "r d",
    "ema": "r",
    "compare": "a b", "report": "r", "runs": "", "watch": "r", "verify": "p", "convert": "r",
    "experiments": "", "completion": "bash",
}  # fmt: skip
ASKING = "sample progressive interpolate enlarge inpaint invert"
DRAWING = "report sample evaluate progressive interpolate enlarge inpaint invert likelihood"

# What is typed, the value without it, the value with it, and the commands that take it.
OPTIONS = [
    ("--accept-differences", False, True, "train"),
    ("--all", False, True, "experiments"),
    ("--allow a=1 --allow b=2", [], ["a=1", "b=2"],
     f"{DRAWING} train launch sweep ema replay losses import export check plan"),
    ("--base-alone", False, True, "progressive interpolate inpaint invert likelihood"),
    ("--batch-size 7", None, 7, f"{DRAWING} sweep ema losses"),
    ("--blocks 7", 1, 7, "evaluate"),
    ("--blocks 7", 3, 7, "ema"),
    ("--by bound", "flow", "bound", "likelihood"),
    ("--by flow", "noise", "flow", "interpolate"),
    ("--caption word", None, "word", "prepare"),
    ("--captions", None, True, "prepare"),
    ("--no-captions", None, False, "prepare"),
    ("--channels 7", 3, 7, "prepare"),
    ("--checkpoints", False, True, "sweep"),
    ("--classes word", None, ["word"], "sample"),
    ("--consistent", True, True, "enlarge"),
    ("--no-consistent", True, False, "enlarge"),
    ("--container word", None, "word", "launch"),
    ("--count 7", 1, 7, "enlarge"),
    ("--count 7", 100, 7, "likelihood"),
    ("--count 7", 256, 7, "losses"),
    ("--count 7", 4, 7, "inpaint"),
    ("--count 7", 40, 7, "report"),
    ("--count 7", 64, 7, "sample"),
    ("--count 7", 8, 7, "progressive"),
    ("--count 7", 9, 7, "interpolate"),
    ("--count 7", None, 7, "prepare evaluate sweep ema"),
    ("--cpus 7", None, 7, "launch"),
    ("--data word", None, "word", "losses"),
    ("--data-changed", False, True, "train launch"),
    ("--device word", "auto", "word", f"{DRAWING} reference sweep ema losses"),
    ("--draw", True, True, "report"),
    ("--no-draw", True, False, "report"),
    ("--dry-run", False, True, "launch"),
    ("--efficiency 0.5", 0.35, 0.5, "plan"),
    ("--encoder word", None, "word", ASKING),
    ("--encode word", None, "word", "prepare"),
    ("--encoding word", "png", "word", "prepare"),
    ("--feature-precision bf16", "fp32", "bf16", "evaluate reference sweep ema"),
    ("--feature-weights word", None, "word", "evaluate reference sweep ema"),
    ("--features word", "auto", "word", "reference"),
    ("--features word", None, "word", "evaluate sweep ema"),
    ("--film mp4", None, "mp4", "sample"),
    ("--filter word", "lanczos", "word", "prepare"),
    ("--first 7", 0, 7, "sample"),
    ("--fit word", "crop", "word", "prepare"),
    ("--format tar", "png", "tar", "sample"),
    ("--format diffusers", "safetensors", "diffusers", "export"),
    ("--frames 7", 10, 7, "progressive"),
    ("--fresh-labels", False, True, "train"),
    ("--from word", None, "word", "train"),
    ("--gpu word", None, "word", "plan"),
    ("--gpus 7", 1, 7, "launch"),
    ("--gpus 7", None, 7, "plan"),
    ("--guidance 7", None, 7.0, DRAWING),
    ("--guidance 7", None, [7.0], "sweep"),
    ("--guidance-interval 1,2", None, [1.0, 2.0], f"{DRAWING} sweep ema losses"),
    ("--guide word", None, "word", f"{DRAWING} sweep ema losses"),
    ("--image word", None, "word", "prepare"),
    ("--image a=1 --image b=2", [], ["a=1", "b=2"], ASKING),
    ("--inside", False, True, "launch"),
    ("--json", False, True, "prepare sample evaluate import export"),
    ("--label word", None, "word",
     "prepare sample progressive interpolate enlarge inpaint invert"),
    ("--labels", None, True, "prepare"),
    ("--no-labels", None, False, "prepare"),
    ("--lengths 7", [0.05, 0.075, 0.1, 0.15, 0.2], [7.0], "ema"),
    ("--levels 7", 20, 7, "losses"),
    ("--like word", None, "word", "import"),
    ("--margin 7", None, 7, "launch"),
    ("--measure", False, True, "plan"),
    ("--method replacement", "gradient", "replacement", "inpaint"),
    ("--metrics word", None, ["word"], "evaluate sweep ema"),
    ("--moments-only", False, True, "reference"),
    ("--name word", None, "word", "prepare"),
    ("--nodes 7", 1, 7, "launch"),
    ("--nodes 7", None, 7, "plan"),
    ("--null-text word", None, "word", "import"),
    ("--out word", None, "word",
     "recipe report sample reference sweep ema replay losses progressive interpolate enlarge "
     "inpaint invert"),
    ("--probes 7", None, 7, "likelihood"),
    ("--processes 7", None, 7, "sample"),
    ("--prompt a=1 --prompt b=2", [], ["a=1", "b=2"], ASKING),
    ("--prompts word", None, "word", ASKING),
    ("--reference word", None, "word", "evaluate sweep ema"),
    ("--resample 7", 1, 7, "inpaint"),
    ("--resize", False, True, "evaluate sweep ema"),
    ("--resolution 7", None, 7, "reference"),
    ("--resolutions word", None, "word", "prepare"),
    ("--resolved", False, True, "check"),
    ("--restart 7", None, 7.0, "enlarge"),
    ("--run word", None, "word", "train launch recipe"),
    ("--hours 2.5", 1.0, 2.5, "recipe"),
    ("--probe 7", 16000, 7, "recipe"),
    ("--sampler word", None, "word", DRAWING),
    ("--samplers word", None, ["word"], "sweep"),
    ("--sbatch a=1 --sbatch b=2", [], ["a=1", "b=2"], "launch"),
    ("--seed 7", 0, 7, f"{DRAWING} sweep ema losses"),
    ("--seed 7", None, 7, "prepare"),
    ("--set a=1 --set b=2", [], ["a=1", "b=2"], f"{DRAWING} sweep ema losses import"),
    ("--shard-images 7", 1000, 7, "prepare"),
    ("--share 7", None, 7.0, "progressive"),
    ("--sigma 7", None, 7.0, "interpolate"),
    ("--skip-broken 7", 0, 7, "prepare"),
    ("--spherical", False, True, "interpolate"),
    ("--split word", None, "word", "prepare"),
    ("--step 7", None, 7, "replay"),
    ("--steps 7", None, 7, DRAWING),
    ("--steps 7", None, [7], "sweep"),
    ("--strip", False, True, "sample"),
    ("--subset-size 7", None, 7, "evaluate sweep ema"),
    ("--sweep a=1 --sweep b=2", [], ["a=1", "b=2"], "launch"),
    ("--tasks 7", None, 7, "launch"),
    ("--text-length 7", None, 7, "prepare"),
    ("--time word", "24:00:00", "word", "launch"),
    ("--to 7", None, 7, "enlarge"),
    ("--variance learned", None, "learned", "likelihood"),
    ("--weights ema:0.1", "ema", "ema:0.1", f"{DRAWING} export"),
    ("--weights ema:0.1", ["ema"], ["ema:0.1"], "sweep"),
    ("--weights raw", "ema", "raw", "import"),
    ("--workers 7", None, 7, "prepare"),

]  # fmt: skip

# Where the name in Python, or the default, is another than the parser had.

NAMES = {"from": "start"}
# The function chooses what the parser chose.
DEFAULTS = {("reference", "features"): None, ("prepare", "resolutions"): "8", ("replay", "step"): 3}


def read(command, *words):
    """Every option of a command by its name in Python, plain."""
    call = cli.parse([command, *WORDS[command].split(), *words])
    found = {"json": call.json}
    for name, value in {**defaults(command), **call.keywords}.items():
        found |= vars(value) if hasattr(value, "__dataclass_fields__") else {name: value}
    return {name: plain(value) for name, value in found.items()}


def arguments(command):
    """What cyclopts makes of a command's signature."""
    app = cli.program([command])
    found = app[command].assemble_argument_collection(
        default_parameter=app.default_parameter, parse_docstring=True
    )
    return [each for each in found if each.parse and not each.children]


def defaults(command):
    signature = inspect.signature(cli.signature_of(command))
    return {
        name: each.default
        for name, each in signature.parameters.items()
        if each.kind is each.KEYWORD_ONLY and each.default is not each.empty and name != "json"
    }


def plain(value):
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_is_read_as_it_was(command):
    """All options of a command at once, those that deny alone."""
    rows = [row for row in OPTIONS if command in row[3].split()]
    together = [word for row in rows if not row[0].startswith("--no-") for word in row[0].split()]
    without, given = read(command), read(command, *together)
    for typed, default, value, _ in rows:
        word = typed.split()[0].removeprefix("--")
        name = word.removeprefix("no-").replace("-", "_")
        name = NAMES.get(name, name)
        found = read(command, typed) if word.startswith("no-") else given
        assert found[name] == value, typed
        assert without[name] == DEFAULTS.get((command, name), default), typed


def test_no_option_came_that_is_not_frozen():
    """A new one is written into the table above, where it is seen."""
    frozen = {(command, typed.split()[0]) for typed, _, _, names in OPTIONS
              for command in names.split()}  # fmt: skip
    frozen |= {(command, "--json") for command in cli.COMMANDS}
    now = {
        (command, name)
        for command in cli.COMMANDS
        for argument in arguments(command)
        for name in argument.names
        if name.startswith("--")
    }
    assert now == frozen


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_what_help_reads_is_the_function_that_is_called(command):
    module = importlib.import_module(cli.module_of(command))
    said, called = (inspect.signature(each) for each in (cli.signature_of(command), module.command))
    kept = [each for name, each in said.parameters.items() if name != "json"]
    assert kept == list(called.parameters.values())
    hints = get_type_hints(cli.signature_of(command), include_extras=True)
    own = get_type_hints(module.command, include_extras=True)
    assert (hints.pop("json"), own.pop("return")) == (options.Json, results.Result)
    assert hints == own


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_has_a_description_an_example_and_every_option(command, capsys):
    assert cli.main([command, "--help"]) == 0
    said = capsys.readouterr().out
    example = f"Example: diffusion_pl {command}"
    assert example in said
    typed = " ".join(said[said.index(example) :].split("╭")[0].split())
    words = typed.removeprefix("Example: diffusion_pl ").split(" > ")[0].split()
    assert cli.parse(words).command == command  # the example can be typed
    for argument in arguments(command):
        assert argument.parameter.help, argument.name


def test_help_needs_no_torch_and_half_a_second():
    code = (
        "import sys\nfrom diffusion_pl.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'numpy', 'lightning', 'omegaconf'} & set(sys.modules)"
    )
    for words in (["--help"], ["train", "--help"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert took < 1.0  # 0.4 where nothing else runs


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("evaluate", "guidance-interval", "shard-images"))
    own = {"bash": "complete -F", "zsh": "#compdef", "fish": "complete -c"}
    assert [each for each in own if own[each] in script] == [shell]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "x", "--run", "s3://bucket/run"],
        ["train", "x", "--run=gs://bucket/run"],
        ["train", "x", "--from", "hf://a/b"],
        ["sample", "https://host/run"],
        ["sample", "r", "--out", "s3a://bucket/out"],
        ["import", "edm", "https://host/a.pkl", "r"],
        ["export", "r", "s3://bucket/x.safetensors"],
        ["prepare", "a", "s3://bucket/set", "--resolutions", "8"],
        ["enlarge", "r", "a.png", "https://host/b.png"],
    ],
)
def test_an_address_where_only_a_file_can_be_makes_no_folder(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert "is an address, and this must be a local file or folder" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_folder_with_a_colon_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:" / "b").mkdir(parents=True)
    (tmp_path / "run:" / "b").mkdir(parents=True)
    for word in ("a:/b", "run:/b", "C:/new", "run:1", "x/a:/b"):
        assert str(cli.parse(["sample", word]).words[0]) == word


def test_lists_of_a_sweep_are_read_whole():
    words = ["--steps", "4,8,16", "--guidance", "1,1.5,text=2+label=3", "--samplers", "ddim,,"]
    found = read("sweep", *words, "--weights", "ema,denoiser,ema:0.05")
    assert found["steps"] == [4, 8, 16]
    assert found["guidance"] == [1.0, 1.5, "text=2+label=3"]
    assert found["samplers"] == ["ddim"]
    assert found["weights"] == ["ema", "denoiser", "ema:0.05"]
    assert read("sweep")["weights"] == ["ema"]


def test_overrides_stand_before_and_after_options():
    call = cli.parse(["train", "x", "a=1", "--run", "runs/y", "b=-2", "--allow=p", "c=[1, 2]"])
    assert call.words == ("x", "a=1", "b=-2", "c=[1, 2]")
    assert call.keywords["run"] == Path("runs/y")


def test_the_last_of_two_equal_options_counts():
    assert read("sample", "--count", "3", "--count", "4")["count"] == 4


def test_a_value_may_begin_with_a_hyphen():
    assert read("launch", "--sbatch=--partition=gpu")["sbatch"] == ["--partition=gpu"]
    assert read("sample", "--seed", "-1")["seed"] == -1


def test_a_file_whose_name_looks_like_json_is_a_file():
    call = cli.parse(["enlarge", "r", '["a"].png', "[1]", '{"a": 1}'])
    assert [str(path) for path in call.words[1]] == ['["a"].png', "[1]", '{"a": 1}']


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sweep runs/a --weights raw", "ema, denoiser or ema:LENGTH (got 'raw')"),
        ("sweep runs/a --weights denoiser:0.1", "ema, denoiser or ema:LENGTH"),
        ("sweep runs/a --weights ema:long", "a length is a number (got 'long')"),
        ("sweep runs/a --steps 4,many", "whole numbers between commas (got '4,many')"),
        ("sweep runs/a --guidance weak", "KIND=NUMBER+KIND=NUMBER (got 'weak')"),
        ("sweep runs/a --guidance 1,text=x", "KIND=NUMBER+KIND=NUMBER (got 'text=x')"),
        ("sample runs/a --guidance-interval 1", "two numbers, as LOW,HIGH (got '1')"),
        ("sample runs/a --count few", "--count: a whole number (got 'few')"),
        (f"sample runs/a --count {2**63}", "a whole number below 2^63"),
        (f"sample runs/a --seed {'9' * 5000}", "a whole number below 2^63"),
        ("sample runs/a --cuont 3", "Unknown option: --cuont. Did you mean --count?"),
        ("sample", "RUN requires an argument"),
        ("sample runs/a more", "Unused Tokens: ['more']"),
        ("enlarge runs/a", "IMAGE requires"),
        ("interpolate runs/a a.png", "IMAGE requires 2"),
        ("import hub a b", 'Choose from: "edm"'),
        ("prepare a b", "name the source, the folder of the prepared data set and --resolutions"),
        ("launch x --sbatch --partition=gpu", "is joined by =, as in --sbatch=--partition=gpu."),
        ("sample x --guidance-interval -1,2", "as in --guidance-interval=-1,2."),
        ("smaple runs/a", 'Did you mean "sample"?'),
        ("", "name a command: prepare, recipe, train,"),
    ],
)
def test_words_that_do_not_fit_are_one_line_and_exit_code_2(words, message, capsys):
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("error: ") and err.count("\n") == 1 and not out
