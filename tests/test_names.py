"""Names that are made are plain; names that are read run, steer and end nothing."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from homes import trained
from PIL import Image
from rich.console import Console
from sharded import write
from test_launch_script import job  # noqa: F401 - a fixture
from test_trust import TINY

from diffusion_pl.cli import main
from diffusion_pl.commands import hints, run_dir, sbatch, sweep
from diffusion_pl.commands.sbatch import Job, Task
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.prepare import Request
from diffusion_pl.data.recipe import Recipe
from diffusion_pl.data.shard_format import Manifest
from diffusion_pl.data.shards import Shards
from diffusion_pl.data.sources.base import SourceSpec
from diffusion_pl.metrics import published, reference
from diffusion_pl.names import plain, shown, unfit
from diffusion_pl.progress import Progress

ROOT = Path(__file__).parents[1]

# What a terminal, a shell, make, SLURM or rich would act on.
BAD = [
    "a\nb", "a\rb", "a\tb", "a\x00b", "a\x1b[31mb", "a\x07b", "a\x9bb", "a\x7fb",
    "a\u202eb", "a\u2066b", "a\u200bb", "a\u200db", "a\ufeffb", "a\u2028b", "a\u00a0b", "a\udc80b",
    "a'b", 'a"b', "a`b", "$(touch ran)", "$HOME", "a&b", "a;touch ran", "a|b", "a<b", "a>b",
    "a(b", "a)b", "a*b", "a?b", "a!b", "~a", "a#b", "a{b", "a}b", "[red]a", "[/]a", "a\\b", "a^b",
    "a%jb", "-a", "--a", ".", "..", "", " a", "a ", "a/b", "a" * 201,
]  # fmt: skip
GOOD = ["a", "cifar10_edm", "2026-01-02", "a b", "v1.2,lr=1e-3+x@y:z", "été", "лица", "顔", ".a"]
CONTROLS = [
    "a\nb",
    "a\rb",
    "a\tb",
    "a\x1b[31mb",
    "a\x7fb",
    "a\x9bb",
    "a\u202eb",
    "a\u2066b",
    "a\u2028b",
]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_others_would_act_on_is_not_plain(name):
    told = unfit(name)
    assert told
    assert told.isprintable()
    assert unfit(plain(name)) is None or len(name) > 200
    assert shown(name).isprintable()


@pytest.mark.parametrize("name", GOOD)
def test_other_names_are_plain_and_shown_as_they_are(name):
    assert unfit(name) is None
    assert plain(name) == shown(name) == name


def test_what_is_not_seen_is_written_out():
    assert shown("a\x1b[2J\u202e\u200b\udc80\n") == r"a\x1b[2J\u202e\u200b\udc80\n"
    assert shown("a\nb\x07", keep="\n") == "a\nb\\x07"
    assert shown("a[red]'$") == "a[red]'$"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("names"), TINY)


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """A folder with experiments/, where commands run."""
    shutil.copytree(home / "experiments", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words, capsys):
    """The printable line that refuses; nothing is made."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err[:-1].isprintable()
    assert sorted(Path().rglob("*")) == before
    return captured.err


# Made: refused.

FOLDERS = [name for name in BAD if name not in ("", ".", "..", "a/b") and "\x00" not in name]


@pytest.mark.parametrize("name", FOLDERS)
def test_no_run_is_called_so(name, place, capsys):
    told = refused(["train", "tiny", f"--run=runs/{name}"], capsys)
    assert "--run" in told
    refused(["launch", "tiny", "--tasks", "1", "--dry-run", f"--run=runs/{name}"], capsys)


@pytest.mark.parametrize("name", ["[red]a", "$(touch ran)", "a;b"])
def test_a_run_is_not_called_after_an_experiment_called_so(name, place, capsys):
    shutil.copy("experiments/tiny.yaml", f"experiments/{name}.yaml")
    assert "name another folder with --run" in refused(["train", name], capsys)
    shutil.copytree("experiments", "elsewhere")
    assert "--run" in refused(["train", f"elsewhere/{name}.yaml"], capsys)


def test_a_run_may_lie_in_the_present_folder(place, monkeypatch):
    """Which has a name, though "." has none."""
    Path("x").mkdir()
    monkeypatch.chdir("x")
    run_dir.check_name(Path("."))
    Path("$x").mkdir()
    monkeypatch.chdir("$x")
    with pytest.raises(ValueError, match=r"^\.: contains \$"):
        run_dir.check_name(Path("."))


def test_a_run_of_before_goes_on_whatever_its_name(home, place, capsys):
    shutil.copytree(home / "runs/tiny", "runs/old (1)'s")
    assert main(["train", "tiny", "--run", "runs/old (1)'s"]) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["[red]a", "$(touch ran)", "a'b"])
def test_no_imported_run_and_no_prepared_set_is_called_so(name, home, place, capsys):
    assert main(["export", str(home / "runs/tiny"), "x.safetensors"]) == 0
    refused(["import", "safetensors", "x.safetensors", f"runs/{name}"], capsys)
    words = ["--resolutions", "8", "--count", "4", "--workers", "1"]
    refused(["prepare", "synthetic", f"data/{name}", *words], capsys)
    assert "--name" in refused(["prepare", "synthetic", "data/x", *words, "--name", name], capsys)
    with pytest.raises(ValueError, match="^--name: "):
        Request(SourceSpec("synthetic"), Recipe((8,)), name)


def photographs(*classes, side=8):
    for number, name in enumerate(classes):
        folder = Path("photos", name)
        folder.mkdir(parents=True)
        for each in range(2):
            Image.new("RGB", (side, side), (40 * number, 90 * each, 7)).save(folder / f"{each}.png")
    return ["prepare", "photos", "data/x", "--resolutions", "8", "--workers", "1", "--labels"]


@pytest.mark.parametrize(
    "name", [name for name in FOLDERS if len(name) < 200 and not name.startswith(("~", "."))]
)
def test_no_class_is_called_so(name, place, capsys):
    words = photographs("good", name)
    told = refused(words, capsys)
    assert not Path("data").exists()
    assert "photos" in told


@pytest.mark.parametrize("name", ["jack-o'-lantern", "and/or", "crane (bird)", "tench, Tinca"])
def test_the_signs_of_words_may_stand_in_the_names_of_classes(name, place, capsys):
    from diffusion_pl.names import refuse_class_names

    refuse_class_names([name], "x", written=True)
    with pytest.raises(ValueError, match="^x: the name of a class "):
        refuse_class_names([name + "$"], "x", written=True)


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize(
    "words",
    [
        ["sample", "runs/{}"],
        ["evaluate", "runs/tiny", "--reference", "{}"],
        ["train", "tiny", "data.dataset.path={}"],
        ["check", "{}.yaml"],
        ["prepare", "{}", "data/x", "--resolutions", "8"],
        ["sample", "runs/tiny", "--no-such-{}"],
    ],
)
def test_no_word_of_a_command_ends_its_line_or_steers_the_terminal(words, name, place, capsys):
    assert "contains the control character" in refused(
        [word.format(name) for word in words], capsys
    )


# Read: written out.


def terminal():
    """A terminal, and what it was sent."""
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=200, color_system=None), stream


MARKUP = "[bold]x[/] [/nope] [link=http://x]y"


def test_progress_shows_a_name_as_it_is_and_does_not_die_of_it():
    console, stream = terminal()
    progress = Progress(100, console)
    progress.start(0)
    progress.measured(10, [{"name": f"fd@8/{MARKUP}\x1b[31m\u202e", "value": 1.0}])
    progress.say(MARKUP)
    progress.stop()
    text = stream.getvalue()
    assert f"fd@8/{MARKUP}\\x1b[31m\\u202e = 1" in text
    assert MARKUP in text.split("= 1")[1]


def test_a_table_of_a_sweep_shows_a_name_as_it_is(capsys):
    row = {"checkpoint": "runs/[/x]/a.ckpt", "weights": "ema", "sampler": None, "steps": 1}
    row |= {"guidance": None, "evaluations": 1, "seconds": 1.0, "value": 2.0, "name": MARKUP}
    rows = [row, {**row, "checkpoint": "runs/[red]\x1b[1m/b.ckpt"}]
    sweep.table(rows, {"evaluations": [0], "seconds": [1]})
    text = capsys.readouterr().err
    assert "[/nope]" in text
    assert "\\x1b[1m" in text
    assert "\x1b" not in text


def test_a_plot_of_a_sweep_reads_no_formula_in_a_name(tmp_path):
    row = {"checkpoint": "a.ckpt", "weights": "ema", "sampler": "$\\nope{$", "steps": 1}
    row |= {"guidance": None, "evaluations": 1, "seconds": 1.0, "value": 2.0, "name": "$\\x{$/$_$"}
    sweep.plot([row, {**row, "sampler": None, "steps": 2}], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_a_finished_run_of_a_stranger_tells_its_numbers_without_steering(home, place, capsys):
    shutil.copytree(home / "runs/tiny", "runs/tiny")
    rows = Path("runs/tiny/metrics.jsonl")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:
        if "name" in line:
            line["name"] = "fd\x1b]0;owned\x07\u202e"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["train", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "fd\\x1b]0;owned\\x07\\u202e" in out
    assert "\x1b" not in out


def test_a_prepared_set_of_a_stranger_is_named_plainly(tmp_path, capsys):
    folder = write(tmp_path / "noise")
    name = "a$(touch ran)\x1b[31m/[red]\u202e"
    replace(Manifest.read(folder), name=name, source={}).write(folder)
    images = Shards(str(folder), 16).open()
    assert images.name == "a__touch ran___31m__red__-16"


def test_a_folder_of_photographs_is_named_plainly(place):
    photographs("a", "b")
    Path("photos").rename("my [red] $photos' (1)")
    images = ImageFolder("my [red] $photos' (1)", 8).open()
    assert images.name == "folder-my _red_ _photos_ _1_-8"


def test_statistics_of_others_are_named_plainly(tmp_path):
    import torch

    made = reference.Reference(
        "a\x1b[31m$(x)", "0" * 64, 8, 4, "shapes", "0" * 12, "none", torch.zeros(3), torch.eye(3)
    )
    made.save(tmp_path / "x.safetensors")
    assert published.open_reference(tmp_path / "x.safetensors").name == "a__31m__x_"


@pytest.mark.parametrize("name", ["runs/a b", "runs/$(touch ran)", "runs/it's", "runs/[x]", "a;b"])
def test_what_is_printed_to_be_typed_names_the_folder_and_runs_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = hints.sample(Path(name))  # with our Makefile at hand, as the tests run
    assert "make" not in command  # which would split it or run it, however it is quoted
    done = subprocess.run(
        ["bash", "-c", command.replace(hints.command(), "printf '%s\\n' ")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["sample", name, "--count", "64"]
    assert not (tmp_path / "ran").exists()


def test_a_plain_folder_is_named_to_make(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert hints.sample(Path("runs/a,b=1e-3")) == "make sample RUN=runs/a,b=1e-3 COUNT=64"


# The job's script.


def script(tmp_path, folder="runs", words=("tiny",), command="launch", options=()):
    return Job(
        folder=Path(folder),
        tasks=(Task(Path(folder, "a"), tuple(words)),),
        nodes=1,
        ranks=1,
        on_gpu=False,
        cpus=1,
        time="10",
        margin=60,
        command=command,
        place=tmp_path,
        python=["python"],
        options=options,
    )


@pytest.mark.parametrize(
    "name", ["$(touch ran)", "`touch ran`", "it's $(touch ran)", '"; touch ran']
)
def test_no_name_in_the_jobs_script_is_run(name, tmp_path):
    made = script(tmp_path, f"runs/{name}", (f"x={name}",), f"launch\ntouch ran # {name}")
    try:
        text = sbatch.render(made)
    except ValueError as error:
        assert '"' in name
        assert "a line of the job's script cannot hold this" in str(error)
        return
    # With nothing to start, the script comes as far as its first check.
    stubs = "scontrol() { :; }\nsrun() { :; }\npython() { return 2; }\n"
    ended = {"SLURM_JOB_NODELIST": "x", "SLURM_RESTART_COUNT": "1", "PATH": os.environ["PATH"]}
    Path(tmp_path, f"runs/{name}/a").mkdir(parents=True)
    (tmp_path / f"runs/{name}/a/restarts").write_text("none 4\n")
    done = subprocess.run(
        ["bash", "-c", stubs + text], cwd=tmp_path, env=ended, capture_output=True, text=True
    )
    assert not (tmp_path / "ran").exists()
    assert done.returncode == 1
    typed = shlex.split(done.stderr.partition("then: ")[2])
    assert typed == ["sbatch", f"runs/{name}/job.sbatch"]


@pytest.mark.parametrize(
    "option", ["--comment=a\nb", '--comment=a"b', "--comment=a\x1bb", "--x=\\"]
)
def test_an_option_that_would_end_its_line_is_refused(option, tmp_path):
    with pytest.raises(ValueError, match="^#SBATCH .*cannot hold this"):
        sbatch.render(script(tmp_path, options=(option,)))


def test_a_comment_of_the_script_stays_one(tmp_path):
    text = sbatch.render(script(tmp_path, words=("a\ntouch ran",), command="a\ntouch ran\r\x1b[1m"))
    head = text.split("#SBATCH")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "\x1b" not in head


@pytest.mark.parametrize("count", ["a[$(touch ran)]", "1+1", "x", "", "09"])
def test_what_a_stranger_left_of_restarts_is_no_arithmetic(count, job):  # noqa: F811
    (job.folder / "restarts").write_text(f"none {count}\n")
    code, _, _ = job(SLURM_RESTART_COUNT="1", TRAIN="exit 1")
    assert not Path("ran").exists()
    assert not (job.folder.parents[1] / "ran").exists()
    kept = (job.folder / "restarts").read_text().split()
    # What is no number counts as none.
    assert kept == ["none", "10" if count == "09" else "0"] or code == 1


def test_what_a_run_left_for_the_log_steers_no_terminal(job):  # noqa: F811
    (job.folder / "checkpoints").mkdir()
    (job.folder / "checkpoints" / "latest").write_text("a\x1b[31m $(x)")
    code, _, said = job(TRAIN="printf 'bad \\033[31m\\007loss' > runs/a/FAILED; exit 1")
    assert code == 1
    assert "would fail again: bad [31mloss" in said
    assert "\x1b" not in said
    assert (job.folder / "restarts").read_text() == "a__31m___x_ 0\n"


def test_a_complaint_of_the_parser_writes_out_what_is_not_seen(capsys):
    assert main(["sample", "runs/tiny", "two\u200bwords"]) == 2
    said = capsys.readouterr().err
    assert "two\\u200bwords" in said and "\u200b" not in said
