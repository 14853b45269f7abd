"""`launch`: what a job asks SLURM for, and the check that tells every fault before it waits."""

from __future__ import annotations

import collections
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from homes import experiments
from test_cli import TINY

from diffusion_pl import locks
from diffusion_pl.cli import main
from diffusion_pl.commands import parts, preflight, sbatch
from diffusion_pl.training import checkpoint as checkpoints

SHARDS = (
    TINY.replace(
        "{_target_: diffusion_pl.data.synthetic.Synthetic, count: 40, resolution: 16}",
        "{_target_: diffusion_pl.data.shards.Shards, path: data/s, resolution: 16}",
    )
    .replace("classes: 8", "classes: 0")
    .replace("label: 0.1", "label: 0.0")
)
AUTO = "trainer.accelerator=auto"
SCRIPT = Path("runs/tiny/job.sbatch")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with experiments/, where commands run; no job's variables."""
    experiments(tmp_path, TINY)
    (tmp_path / "experiments" / "shards.yaml").write_text(SHARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def launch(place, capsys):
    """Type `launch ... --dry-run`; the code, stdout and stderr."""

    def call(*words, dry="--dry-run"):
        code = main(["launch", *words, dry])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def shards(place, capsys):
    """A prepared set of 16 and 8 pixels."""
    words = ["prepare", "synthetic", "data/s", "--resolutions", "16,8", "--count", "20"]
    assert main([*words, "--workers", "1"]) == 0
    capsys.readouterr()
    return place / "data" / "s"


def asked(script=SCRIPT):
    """The options of a script."""
    lines = [line.split()[1] for line in script.read_text().splitlines() if line[:8] == "#SBATCH "]
    return dict(line.removeprefix("--").partition("=")[::2] for line in lines)


def line_of(script=SCRIPT, task=0):
    """A task's line."""
    lines = script.read_text().splitlines()
    return next(line for line in lines if line.startswith(f"  {task}) ")).split(") ", 1)[1]


def test_the_script_asks_for_what_was_asked(launch, place):
    code, out, err = launch("tiny", "--nodes", "2", "--tasks", "4", "--time", "1-12")
    assert (code, err) == (0, "")
    assert asked() == {
        "job-name": "tiny",
        "nodes": "2",
        "ntasks-per-node": "4",
        "cpus-per-task": "1",
        "time": "1-12",
        "signal": "USR1@60",
        "requeue": "",
        "open-mode": "append",
        "output": f"{place}/runs/tiny/slurm-%j.out",
    }
    assert line_of() == "RUN=runs/tiny WORDS=(tiny trainer.nodes=2 trainer.devices=4) ;;"
    assert "batch    8 images = 2 nodes x 4 x 1, each in 1 micro-batches" in out
    assert "submit it with: sbatch runs/tiny/job.sbatch" in out
    # The folder is the run's before any process starts.
    kept = Path("runs/tiny/config.yaml").read_text()
    assert "nodes: 2" in kept and "devices: 4" in kept
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_gpus_are_a_process_each_and_never_left_out(launch):
    words = ("tiny", AUTO, "data.num_workers=3", "--nodes", "2", "--gpus", "2", "--cpus", "6")
    assert launch(*words, "--sbatch=--partition=big", "--sbatch=--comment=a b")[0] == 0
    options = asked()
    assert (options["gpus-per-node"], options["ntasks-per-node"]) == ("2", "2")
    assert options["cpus-per-task"] == "6"
    assert options["partition"] == "big"
    assert '#SBATCH "--comment=a b"' in SCRIPT.read_text()
    # A node without its GPUs fails, in place of training on without.
    assert line_of().endswith("trainer.devices=2 trainer.accelerator=gpu) ;;")
    assert launch("tiny", AUTO, "--tasks", "2", "--run", "runs/cpu")[0] == 0
    assert "trainer.accelerator=cpu)" in line_of(Path("runs/cpu/job.sbatch"))


def test_each_process_has_a_core_and_one_a_worker(launch):
    assert launch("tiny", "data.num_workers=3", "--tasks", "2")[0] == 0
    assert asked()["cpus-per-task"] == "4"


def test_the_command_in_the_script_makes_the_same_script(launch):
    words = ("tiny", "seed=1", "--nodes", "2", "--tasks", "2", "--time", "20", "--margin", "90")
    words += ("--run", "runs/x y", "--sweep", "optimizer.lr=1e-3,1e-4", "--sbatch=--account=me")
    assert launch(*words, "--container", "image.sif", "--cpus", "2")[0] == 0
    script = Path("runs/x y/job.sbatch")
    text = script.read_text()
    made = next(line for line in text.splitlines() if line.startswith("# Made by: "))
    script.unlink()
    program, *again = shlex.split(made.removeprefix("# Made by: "))[2:]
    assert program == "diffusion_pl"
    assert main([*again, "--dry-run"]) == 0
    assert script.read_text() == text
    assert "#SBATCH --signal=USR1@90" in text


def test_a_container_sees_the_folder_and_the_gpus(launch, place):
    assert launch("tiny", AUTO, "--container", "my image.sif")[0] == 0
    line = f"PYTHON=(apptainer exec --nv --bind {place} --pwd {place} 'my image.sif' python)"
    assert line in SCRIPT.read_text()
    assert sbatch.python_of(place, "x", "i", False)[:3] == ["apptainer", "exec", "--bind"]


def test_an_environment_inside_the_folder_is_named_from_there():
    here = Path("/home/me/project")
    assert sbatch.python_of(here, "/home/me/project/.venv/bin/python", None, True) == [
        ".venv/bin/python"
    ]
    assert sbatch.python_of(here, "/opt/python", None, True) == ["/opt/python"]


def test_a_sweep_is_an_array_of_every_combination(launch):
    words = ("--sweep", "optimizer.lr=1e-4,3e-4", "--sweep", "seed=0,1,2")
    code, out, _ = launch("tiny", "--tasks", "2", *words)
    assert code == 0
    assert asked()["array"] == "0-5"
    assert asked()["output"].endswith("/runs/tiny/slurm-%A_%a.out")
    runs = [f"optimizer.lr={rate},seed={seed}" for rate in ("1e-4", "3e-4") for seed in range(3)]
    for number, run in enumerate(runs):
        folder = Path("runs/tiny") / run
        assert f"task {number}   {folder}" in out
        rate, seed = run.split(",")
        assert line_of(task=number).startswith(f"RUN={folder} WORDS=(tiny {rate} {seed} trainer.")
        assert f"seed: {seed[-1]}" in (folder / "config.yaml").read_text()
    assert out.count("data     ") == 1  # looked at once


def test_a_swept_value_may_be_a_list():
    tasks = sbatch.tasks_of(Path("r"), ["e"], ["optimizer.betas=[0.9,0.99],[0.9,0.999]"], ["z=1"])
    assert [task.words for task in tasks] == [
        ("e", "optimizer.betas=[0.9,0.99]", "z=1"),
        ("e", "optimizer.betas=[0.9,0.999]", "z=1"),
    ]
    assert len({task.run for task in tasks}) == 2


def test_what_the_runs_of_a_sweep_share_is_looked_at_once(launch):
    code, _, err = launch("shards", "--tasks", "1", "--sweep", "seed=0,1")
    assert code == 2
    assert [line.split(": ")[1:3] for line in err.splitlines()] == [["seed=0", "data/s"]]


@pytest.mark.parametrize("sweep", ["seed", "seed=1", "seed=1,", "=1,2", "seed=1,1"])
def test_a_sweep_of_nothing_is_refused(launch, sweep):
    code, _, err = launch("tiny", "--tasks", "2", "--sweep", sweep)
    assert code == 2
    assert err.startswith("error: --sweep: ")


# What sbatch's manual lists as acceptable.
@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 90 * 60),
        ("90:30", 90 * 60 + 30),
        ("1:30:15", 5415),
        ("24:00:00", 86400),
        ("2-3", 2 * 86400 + 3 * 3600),
        ("2-3:04", 2 * 86400 + 3 * 3600 + 240),
        ("2-3:04:05", 2 * 86400 + 3 * 3600 + 245),
    ],
)
def test_times_are_read_as_slurm_does(time, seconds):
    assert sbatch.seconds_of(time) == seconds


@pytest.mark.parametrize("time", ["", "a", "1:2:3:4", "1-", "-5", "1.5"])
def test_a_time_that_is_none_is_refused(time):
    with pytest.raises(ValueError, match="--time: must be as SLURM writes it"):
        sbatch.seconds_of(time)


def test_the_margin_is_three_saves_and_at_least_a_minute():
    # sbatch's manual: the signal may be sent up to 60 seconds early.
    assert [sbatch.stop_margin(save) for save in (0.01, 20.0, 20.1, 100.0)] == [60, 60, 61, 300]


def test_a_save_is_timed_by_a_smaller_one(monkeypatch, tmp_path):
    clock = iter([0.0, 2.0] * 3)
    monkeypatch.setattr(preflight.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(preflight, "PROBE_BYTES", 2**20)
    save, saved = checkpoints.save, []

    def noted(content, path):
        saved.append((path, len(content["content"])))
        save(content, path)

    monkeypatch.setattr(preflight.checkpoints, "save", noted)
    folder = tmp_path / "not yet" / "there"
    for size, seconds in ((preflight.PROBE_BYTES, 2), (10 * preflight.PROBE_BYTES, 20), (1000, 2)):
        assert preflight.save_seconds(folder, size) == pytest.approx(seconds)
    assert [size for _, size in saved] == [2**20, 2**20, 1000]
    assert all(path.parents[1] == tmp_path for path, _ in saved)  # the run's own disk
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_as_large_as_was_said(place, capsys):
    words = ["tiny", "ema.posthoc_every=16", "trainer.total_images=16", "trainer.loggers=[]"]
    words += ["evaluation.metrics=[]", "evaluation.count=1"]
    assert main(["train", *words, "trainer.nodes=1", "trainer.devices=1"]) == 0
    capsys.readouterr()
    loaded = checkpoints.load(checkpoints.latest(Path("runs/tiny/checkpoints")))
    tensors = list(loaded["state_dict"].values())
    for state in loaded["optimizer_states"]:
        tensors += [each for one in state["state"].values() for each in one.values()]
    real = sum(each.numel() * each.element_size() for each in tensors if torch.is_tensor(each))
    experiment = parts.read(words[0], words[1:])
    said = preflight.checkpoint_bytes(experiment, parts.meta_network(experiment))
    assert said == pytest.approx(real, rel=0.01)
    # It is finished, so there is nothing to submit.
    assert main(["launch", *words, "--tasks", "1"]) == 0
    assert "run      runs/tiny is finished: 16 images" in capsys.readouterr().out
    assert not SCRIPT.exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["optimizer.lrr=1"], "SET: optimizer.lrr: unknown argument of"),
        (["--nodes", "3"], "data.batch_size: 8 does not divide over 3 devices (remainder 2)"),
        (["trainer.devices=4"], "SET: trainer.devices: the job has 1 (got 4); remove it"),
        (["trainer.accelerator=gpu"], "SET: trainer.accelerator: the job has a cpu for each"),
        (["evaluation.reference=nope.npz"], "nope.npz"),
        (["data.dataset.resolution=4"], "synthetic data: resolution must be at least 8 (got 4)"),
        (
            ["--time", "2"],
            "--time: the last 60 s are for stopping, and SLURM may be a minute early",
        ),
        (["--time", "soon"], "--time: must be as SLURM writes it"),
        (["--nodes", "0"], "--nodes must be at least 1 (got 0)"),
        (["--tasks", "0"], "--gpus or --tasks must be at least 1 (got 0)"),
    ],
)
def test_a_fault_is_one_line_and_nothing_is_written(launch, words, line):
    tasks = [] if "--tasks" in words else ["--tasks", "1"]
    code, _, err = launch("tiny", *words, *tasks)
    assert code == 2
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert line in err
    assert not Path("runs").exists()


def test_faults_are_told_all_at_once(launch, place):
    code, _, err = launch("shards", "--nodes", "3", "--tasks", "1", "evaluation.reference=nope.npz")
    assert code == 2
    first, second, third = err.splitlines()
    assert "data.batch_size: 8 does not divide over 3 devices" in first
    assert "data/s: not prepared (no dataset.json here); run python -m diffusion_pl" in second
    assert "nope.npz" in third


def test_shards_are_looked_at_and_not_decoded(launch, shards):
    code, out, _ = launch("shards", "--tasks", "1")
    assert code == 0
    assert "data     synthetic-16: 20 images in 1 shards" in out
    assert "the statistics of 20 real images are computed when the job" in out
    tar = next((shards / "shards").iterdir())
    tar.write_bytes(tar.read_bytes()[:-512])
    code, _, err = launch("shards", "--tasks", "1")
    assert code == 2
    assert f"{tar.stat().st_size:,} bytes where" in err


def test_a_size_that_was_not_prepared_is_told(launch, shards):
    code, _, err = launch("shards", "--tasks", "1", "data.resolution_weights={4: 1, 16: 1}")
    assert code == 2
    assert "prepared at 16, 8 px (got 4)" in err


def test_a_network_of_other_classes_than_the_data_is_told(launch, shards):
    code, _, err = launch("shards", "--tasks", "1", "network.classes=3")
    assert code == 2
    assert "network.classes is 3, synthetic-16 has" in err


def test_statistics_that_are_there_are_found(launch, shards, capsys):
    assert main(["reference", "data/s", "--features", "shapes", "--moments-only"]) == 0
    capsys.readouterr()
    assert "compare  data/references/reference-" in launch("shards", "--tasks", "1")[1]


def test_statistics_of_another_extractor_are_told(launch, shards, capsys):
    words = ["--features", "pixels", "--moments-only", "--out", "other.safetensors"]
    assert main(["reference", "data/s", *words]) == 0
    capsys.readouterr()
    code, _, err = launch("shards", "--tasks", "1", "evaluation.reference=other.safetensors")
    assert code == 2
    assert "extractor is pixels" in err and "the evaluation has shapes" in err


def test_three_checkpoints_must_fit(launch, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    for share, code in ((3.001, 0), (2.999, 2)):
        experiment = parts.read("tiny")
        size = preflight.checkpoint_bytes(experiment, parts.meta_network(experiment))
        free = usage(0, 0, int(share * size))
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path, free=free: free)
        got, _, err = launch("tiny", "--tasks", "1")
        assert got == code
    assert "runs/tiny: 3 checkpoints of 755 KiB must fit (free: 2.21 MiB); free some" in err


def test_another_run_in_the_folder_is_told(launch):
    assert launch("tiny", "--tasks", "2")[0] == 0
    assert launch("tiny", "--tasks", "2", "optimizer.lr=1e-2")[0] == 0  # nothing was trained yet
    assert launch("tiny", "--tasks", "2")[0] == 0
    Path("runs/tiny/metrics.jsonl").write_text('{"images": 4, "loss": 1.0}\n')
    code, _, err = launch("tiny", "--tasks", "2", "optimizer.lr=1e-4")
    assert code == 2
    assert "runs/tiny was begun with another config" in err
    assert "optimizer.lr: 0.001 -> 0.0001" in err
    # Among the other faults, and not after them.
    err = launch("tiny", "--tasks", "2", "data.batch_size=9")[2]
    assert "9 does not divide over 2" in err and "begun with another config" in err


@pytest.fixture
def inside(launch, monkeypatch):
    """The check in a job of so many nodes and tasks."""

    def call(nodes, tasks, *words):
        monkeypatch.setenv("SLURM_NNODES", str(nodes))
        if tasks is None:
            monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
        else:
            monkeypatch.setenv("SLURM_NTASKS_PER_NODE", str(tasks))
        own = ("trainer.nodes=2", "trainer.devices=4", *words)
        return launch(own[-1] if "/" in own[-1] else "tiny", *own, "--run", "r", dry="--inside")

    return call


def test_inside_a_job_the_tasks_are_held_against_the_trainer(inside):
    assert inside(2, 4)[0] == 0
    code, _, err = inside(1, 8)
    assert code == 2
    assert err.splitlines() == [
        "error: job: #SBATCH --nodes and trainer.nodes=2 differ (got 1); "
        "make it: #SBATCH --nodes=2",
        "error: job: #SBATCH --ntasks-per-node and trainer.devices=4 differ (got 8); "
        "make it: #SBATCH --ntasks-per-node=4",
    ]
    assert "differ (got none)" in inside(2, None)[2]  # --ntasks, which Lightning refuses


def test_a_second_job_of_a_run_ends_before_it_starts_tasks(inside):
    with locks.hold(Path("r") / locks.NAME, "training") as lock:
        code, _, err = inside(2, 4)
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"error: r: {lock.holder} holds it (training); wait for it")
    assert inside(2, 4)[0] == 0


def test_inside_a_job_missing_gpus_are_told(inside):
    there = torch.cuda.device_count()
    words = (f"trainer.devices={there + 1}", f"data.batch_size={2 * there + 2}")
    code, _, err = inside(2, there + 1, "trainer.accelerator=gpu", *words)
    assert code == 2
    assert err.splitlines() == [
        f"error: job: the tasks of a node need {there + 1} GPUs (this one shows {there}); "
        f"make it: #SBATCH --gpus-per-node={there + 1}, or train on CPUs with --tasks"
    ]


def test_data_that_is_to_be_made_is_made_inside_the_job(launch, place, monkeypatch):
    made = """
    made_of:
      _target_: diffusion_pl.data.prepare.Request
      source: {_target_: diffusion_pl.data.sources.base.SourceSpec, path: synthetic, count: 20}
      recipe: {_target_: diffusion_pl.data.recipe.Recipe, resolutions: [16]}
"""
    text = SHARDS.replace(
        "  dataset: {_target_: diffusion_pl.data.shards.Shards, path: data/s, resolution: 16}\n",
        "  dataset:\n    _target_: diffusion_pl.data.shards.Shards\n    path: data/s\n"
        "    resolution: 16" + made,
    )
    Path("experiments/made.yaml").write_text(text)
    code, out, _ = launch("made", "--tasks", "1")
    assert code == 0
    assert "data     data/s is prepared when the job starts" in out
    assert not Path("data/s").exists()
    for name in ("SLURM_NNODES", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, "1")
    words = ("made", "trainer.nodes=1", "trainer.devices=1", "--run", "runs/made")
    assert launch(*words, dry="--inside")[0] == 0
    assert Path("data/s/dataset.json").exists()
    # Once it is there it is looked at as any other.
    assert "data     synthetic-16: 20 images in 1 shards" in launch("made", "--tasks", "1")[1]
    other = ("data.dataset.made_of.source.count=21", "--run", "runs/other")
    code, _, err = launch("made", "--tasks", "1", *other)
    assert code == 2
    assert err.startswith("error: data/s") and len(err.splitlines()) == 1


def test_the_check_answers_without_lightning(place):
    code = (
        "import json, sys\n"
        "from diffusion_pl.cli import main\n"
        "code = main(['launch', 'tiny', '--tasks', '2', '--dry-run'])\n"
        "loaded = sorted(name for name in sys.modules if name.split('.')[0] == 'lightning')\n"
        "print(json.dumps([code, loaded]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]


def test_without_slurm_the_script_is_written_and_named(launch, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "tiny", "--tasks", "1"]) == 2
    assert SCRIPT.exists()


def test_what_slurm_refuses_is_told_in_its_words(launch, place, monkeypatch, capsys):
    folder = place / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n"
    )
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    assert main(["launch", "tiny", "--tasks", "1"]) == 2
    err = capsys.readouterr().err
    assert "error: runs/tiny/job.sbatch: SLURM refuses it (invalid partition specified: x)" in err


def test_other_data_is_consented_to_in_the_jobs_own_command(launch):
    words = ("tiny", "--tasks", "1")
    assert launch(*words)[0] == 0
    assert "--data-changed" not in SCRIPT.read_text()
    assert launch(*words, "--data-changed")[0] == 0
    lines = [line for line in SCRIPT.read_text().splitlines() if "--data-changed" in line]
    assert len(lines) == 2  # what was typed, and what the job hands to `train`
    assert lines[0].startswith("#") and "WORDS=(tiny " in lines[1]
