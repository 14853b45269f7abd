"""What Lightning's users bring along: profilers, strategies, a Trainer of their own."""

# ruff: noqa: F811 - the fixture `train`

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from homes import experiments
from started import train as train_ranks
from test_api import own_module
from test_lr_schedule import TINY, state, train  # noqa: F401 - a fixture
from test_run_folder import assert_equal

import diffusion_pl as dp
from diffusion_pl import config
from diffusion_pl.cli import main
from diffusion_pl.training import checkpoint as checkpoints

DDP = "lightning.pytorch.strategies.DDPStrategy"
SIMPLE = "lightning.pytorch.profilers.SimpleProfiler"


def test_a_profiler_reports_into_the_run_and_changes_no_number(train):
    assert train(run="plain")[0] == 0
    assert train("trainer.profiler=simple", run="simple")[0] == 0
    named = f"trainer.profiler={{_target_: {SIMPLE}, filename: mine}}"
    assert train(named, run="named")[0] == 0
    for run, name in {"simple": "fit-report.txt", "named": "fit-mine.txt"}.items():
        [report] = Path(f"runs/{run}/profiler").iterdir()
        assert report.name == name
        text = report.read_text()
        assert "[LightningModule]DiffusionModule.optimizer_step" in text or "run_training" in text
        assert_equal(state(run), state("plain"))
    # Free from one start to the next, and not needed to open the run.
    assert train("trainer.total_images=40", "trainer.profiler=advanced", run="simple")[0] == 0
    assert main(["sample", "runs/simple", "--count", "1"]) == 0


def test_a_profiler_of_one_s_own_is_not_needed_to_open_the_run(train, tmp_path, monkeypatch):
    text = (
        "from lightning.pytorch.profilers import SimpleProfiler\nclass Mine(SimpleProfiler): pass\n"
    )
    own_module(tmp_path, monkeypatch, "myprofiler", text)
    assert train("trainer.profiler={_target_: myprofiler.Mine}")[0] == 0
    assert "myprofiler" in Path("runs/a/config.yaml").read_text()
    Path("myprofiler.py").unlink()
    monkeypatch.delitem(sys.modules, "myprofiler")
    importlib.invalidate_caches()
    assert main(["sample", "runs/a", "--count", "1"]) == 0


def test_a_strategy_of_lightning_s_makes_the_run_of_ours(train, tmp_path):
    assert train(run="ours")[0] == 0
    shutil.copy("experiments/tiny.yaml", "experiments/tried.yaml")
    given = f"trainer.strategy={{_target_: {DDP}, find_unused_parameters: true}}"
    for run, words in {"theirs": [given], "named": ["trainer.strategy=single_device"]}.items():
        # In a process of its own: theirs makes a group of processes.
        assert train_ranks(tmp_path, run, *words).codes == [0]
        assert_equal(state(run), state("ours"))
    assert main(["sample", "runs/theirs", "--count", "1"]) == 0


def test_two_ranks_under_a_strategy_of_lightning_s(tmp_path):
    experiments(tmp_path, TINY, "tried")
    theirs = f"trainer.strategy={{_target_: {DDP}, static_graph: true}}"
    named = "trainer.strategy=ddp_find_unused_parameters_true"
    weights = []
    for run, words in {"ours": [], "theirs": [theirs], "named": [named]}.items():
        assert train_ranks(tmp_path, run, *words, ranks=2).codes == [0, 0]
        path = checkpoints.latest(tmp_path / "runs" / run / "checkpoints")
        weights.append(checkpoints.load(path)["state_dict"])
    assert_equal(weights[0], weights[1])
    assert_equal(weights[0], weights[2])


OWN = """
class Nothing:
    def __init__(self, raises: bool = False):
        if raises: raise ImportError('needs another package')
"""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["profiler=sample"], "trainer.profiler: must be one of 'simple', 'advanced', 'pytorch'"),
        (["profiler={_target_: myparts.Nothing}"],
         "trainer.profiler: must be one of Lightning's (got a Nothing)"),
        (["profiler={_target_: myparts.Nothing, raises: true}"],
         "cannot be built from these values (ImportError: needs another package)"),
        ([f"profiler={{_target_: {SIMPLE}, file: x}}"], "trainer.profiler.file: unknown argument"),
        (["strategy=dpp"], "trainer.strategy: unknown 'dpp'; did you mean 'ddp'?"),
        (["strategy={_target_: myparts.Nothing}"],
         "trainer.strategy: must be one of Lightning's (got a Nothing)"),
        (["strategy=fsdp_cpu_offload"], "FSDPStrategy shards the weights, which this"),
        (["strategy=deepspeed_stage_2"], "trainer: To use the `DeepSpeedStrategy`, you must have"),
        (["strategy={_target_: lightning.pytorch.strategies.DeepSpeedStrategy}"],
         "trainer.strategy: "),
        (["strategy=ddp_spawn"], "DDPStrategy starts its ranks in the middle of the training"),
        (["strategy=single_device", "devices=2"],
         "trainer.strategy: SingleDeviceStrategy has 1 devices, not 2"),
        (["strategy=single_xla"], "trainer.strategy: single_xla cannot be made here ("),
        (["strategy=xla"], "trainer.strategy: xla cannot be made here ("),
        ([f"strategy={{_target_: {DDP}, static_grap: true}}"],
         "trainer.strategy: DDPStrategy has no argument 'static_grap'; did you mean 'static_gra"),
        ([f"strategy={{_target_: {DDP}, device_ids: [0]}}"], "has no argument 'device_ids'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_line_before_training(
    words,
    says,
    train,
    tmp_path,
    monkeypatch,
):
    own_module(tmp_path, monkeypatch, "myparts", OWN)
    code, err = train(*(f"trainer.{word}" for word in words))
    assert code == 2 and says in err and "Traceback" not in err, err
    assert not Path("runs/a/checkpoints").exists() and not Path("runs/a/config.yaml").exists()


TIMER = "lightning.pytorch.callbacks.Timer"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("callbacks=[3]", "callbacks[0]: must be a Callback of Lightning's (got one of type int)"),
        ("callbacks=[null]", "callbacks[0]: must be a Callback of Lightning's (got one of type N"),
        (f"callbacks=[{{_target_: {TIMER}}}, {{_target_: myparts.Nothing}}]",
         "callbacks[1]: must be a Callback of Lightning's (got one of type Nothing); give a node"),
        (f"callbacks=[{{_target_: {TIMER}, _partial_: true}}]", "(got one of type partial)"),
        ("loggers=[3]", "loggers[0]: must be a Logger of Lightning's (got one of type int)"),
        (f"loggers=[{{_target_: {TIMER}}}]", "loggers[0]: must be a Logger of Lightning's"),
    ],
)  # fmt: skip
def test_what_is_no_callback_or_logger_is_a_line_before_training(
    word,
    says,
    train,
    tmp_path,
    monkeypatch,
):
    own_module(tmp_path, monkeypatch, "myparts", OWN)
    code, err = train(word)
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert not Path("runs/a/checkpoints").exists() and not Path("runs/a/config.yaml").exists()


def test_check_says_that_a_strategy_is_lightning_s(train, capsys):
    assert main(["check", "tiny", "trainer.strategy=ddp_find_unused_parameters_true"]) == 0
    assert "ddp_find_unused_parameters_true, Lightning's own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"profiler": {"_target_": SIMPLE, "dirpath": "/tmp/elsewhere"}},
         "trainer.profiler.dirpath: is written to at the word of a file that others may have made"),
        ({"profiler": {"_target_": "myparts.Nothing"}}, "trainer.profiler._target_: is outside"),
        ({"profiler": {"_target_": "lightning.pytorch.profilers.XLAProfiler"}}, "is outside"),
        ({"strategy": {"_target_": "lightning.pytorch.strategies.DeepSpeedStrategy"}},
         "trainer.strategy._target_: is outside"),
        ({"strategy": {"_target_": SIMPLE}}, "SimpleProfiler is no strategy"),
    ],
)  # fmt: skip
def test_a_stranger_s_config_names_neither_what_writes_elsewhere_nor_others(
    change,
    says,
    train,
    capsys,
):
    read = config.load("tiny")
    read.tree["trainer"].update(change)
    Path("handed").mkdir()
    file = Path("handed/config.yaml")
    file.write_text(config.dump(read))
    assert main(["train", str(file), "--run", "runs/b"]) == 2
    assert says in capsys.readouterr().err
    assert not Path("runs/b").exists()


def test_a_stranger_s_config_may_name_what_writes_into_the_run(train):
    read = config.load("tiny")
    read.tree["trainer"]["profiler"] = {"_target_": SIMPLE}
    Path("handed").mkdir()
    Path("handed/config.yaml").write_text(config.dump(read))
    assert main(["train", "handed/config.yaml", "--run", "runs/b"]) == 0
    assert list(Path("runs/b/profiler").iterdir())


def test_a_callback_that_raises_keeps_its_traceback_and_the_checkpoint(
    train,
    tmp_path,
    monkeypatch,
):
    """From the shell: code 1, the traceback of the user's own file, a run that goes on."""
    own_module(
        tmp_path, monkeypatch, "mycall",
        "from lightning.pytorch.callbacks import Callback\n"
        "class Raises(Callback):\n"
        "    def on_train_batch_end(self, trainer, pl_module, *rest):\n"
        "        if pl_module.images_seen == 24: raise ValueError('of my own')\n",
    )  # fmt: skip
    command = ["train", "tiny", "--run", "runs/a", "callbacks=[{_target_: mycall.Raises}]"]
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_pl", *command], capture_output=True, text=True,
        timeout=300, check=False, env={**__import__("os").environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "mycall.py" in done.stderr and "ValueError: of my own" in done.stderr
    assert [path.stem for path in checkpoints.found(Path("runs/a/checkpoints"))] == [f"{16:012d}"]
    assert train("callbacks=null")[0] == 0
    assert train(run="straight")[0] == 0
    assert_equal(state("a"), state("straight"))


def test_a_run_whose_classes_are_gone_is_refused_in_a_line(
    train,
    tmp_path,
    monkeypatch,
    capsys,
):
    own_module(
        tmp_path, monkeypatch, "mygone",
        "from diffusion_pl.networks.song_unet import SongUNet\nclass Net(SongUNet): pass\n",
    )  # fmt: skip
    small = ("network.resolution=8", "network.model_channels=16", "network.blocks=1")
    assert train("network._target_=mygone.Net", *small)[0] == 0
    Path("mygone.py").unlink()
    monkeypatch.delitem(sys.modules, "mygone")
    importlib.invalidate_caches()
    assert main(["sample", "runs/a", "--count", "1", "--allow", "mygone"]) == 2
    err = capsys.readouterr().err
    assert "network._target_: there is no module 'mygone'" in err and err.count("\n") == 1
    code, err = train("network._target_=mygone.Net", run="b")
    assert code == 2 and "network._target_: there is no module 'mygone'" in err
    assert not Path("runs/b").exists()
    with pytest.raises(dp.UserError, match="there is no module 'mygone'"):
        dp.Run("runs/a", allow=["mygone"])
