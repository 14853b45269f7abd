"""The framework from Python: docs/python.md as it stands, what is refused, what importing costs."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import diffusion_pl as dp
from diffusion_pl import config
from diffusion_pl.cli import main
from diffusion_pl.config.objects import plain
from diffusion_pl.data.dataset import load
from diffusion_pl.data.folder import ImageFolder
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.preconditioning import Denoiser, Karras
from diffusion_pl.images import from_bytes
from diffusion_pl.samplers.heun import heun
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.history import is_evaluation

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

TINY = {
    "trainer.total_images": 64,
    "trainer.checkpoint_every": 32,
    "trainer.log_every": 32,
    "lr_schedule.warmup": 0,
    "lr_schedule.cooldown": 0,
    "trainer.devices": 1,
    "data.dataset.count": 64,
    "evaluation.every": 64,
    "evaluation.count": 8,
    "evaluation.grid": 4,
    "evaluation.metrics": [],
    "network.model_channels": 32,
    "network.transformers": 1,
    "network.heads": 2,
    "network.embedding_channels": 32,
    "sampler.steps": 3,
}


def own_module(folder, monkeypatch, name, text):
    """A module of the user's own, beside the run."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, name, None)  # so that it is gone after the test
    del sys.modules[name]


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / "docs" / "python.md").read_text())
    names = {}
    for name, code in blocks:
        if name:
            own_module(tmp_path, monkeypatch, name.removesuffix(".py"), code)
        else:
            with warnings.catch_warnings():  # a plain Trainer has hints for everybody
                warnings.simplefilter("ignore")
                exec(compile(code, "docs/python.md", "exec"), names)
    assert names["means"]["loss"] > 0 and names["denoised"].shape == (2, 3, 16, 16)
    images, larger = names["images"], names["larger"]
    assert images.shape == (16, 3, 16, 16) and images.dtype == torch.uint8
    assert larger.shape == (2, 3, 32, 32)
    # Enlarged images agree with what they were made from: block means, rounded to bytes.
    means = larger.double().unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean(dim=(3, 5))
    assert (means - images[:2]).abs().max() <= 1
    # Restored images agree with what was measured better than others, even of such a network.
    pictures = from_bytes(torch.cat([names["restored"], images[4:8]]))
    error = (names["halves"].forward(pictures) - names["small"]).flatten(1).std(dim=1)
    assert names["restored"].shape == (4, 3, 16, 16) and error[:4].mean() < 0.8 * error[4:].mean()
    assert {row["name"].partition("@")[0] for row in names["rows"]} >= {"fd", "kd"}
    assert {row["n"] for row in names["rows"]} == {50}
    assert (tmp_path / "runs" / "mine" / "lightning_logs").is_dir()
    measured = [row for row in names["run"].rows() if is_evaluation(row)]
    assert [row["name"].partition("@")[0] for row in measured] == ["mean_feature"]
    # The same from the shell, where the parts of others are asked for.
    assert main(["sample", "runs/mine", "--count", "2", "--allow", "mine"]) == 0
    assert main(["sample", "runs/mine", "--count", "2"]) == 2
    # One package need not stand in a list.
    assert dp.Run("runs/mine", allow="mine").images_seen == names["run"].images_seen
    with pytest.raises(dp.UserError, match="--allow mine"):
        dp.Run("runs/mine", allow="min")


def test_the_readme_s_python_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, code in BLOCK.findall((ROOT / "README.md").read_text()):
        assert not name
        shorter = code.replace("SongUNet(32,", "SongUNet(32, model_channels=16,")
        shorter = shorter.replace('dp.experiment("quickstart"', 'dp.experiment("quickstart", TINY')
        names = {"TINY": TINY}
        exec(compile(shorter, "README.md", "exec"), names)


def test_a_run_by_name_is_the_command_s(tmp_path, monkeypatch, capsys):
    """Same config, same bits: the function and the command are one."""
    monkeypatch.chdir(tmp_path)
    run = dp.train(dp.experiment("quickstart", TINY), "runs/a")
    words = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
    assert main(["train", "quickstart", *words, "--run", "runs/b"]) == 0
    other = dp.Run("runs/b")
    assert run.images_seen == other.images_seen == 64
    ours, theirs = run.denoiser.state_dict(), other.denoiser.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (tmp_path / "runs/a/config.yaml").read_text() == (
        tmp_path / "runs/b/config.yaml"
    ).read_text()
    assert torch.equal(run.sample(3, seed=4), other.sample(5, seed=4, batch_size=2)[:3])
    assert torch.equal(run.sample(2, first=1), run.sample(3)[1:])
    assert not torch.equal(run.sample(2), run.sample(2, seed=1))
    assert [path.stem for path in run.checkpoints()] == ["000000000032", "000000000064"]
    # A finished run is opened, one with a larger budget goes on.
    assert dp.train(dp.experiment("quickstart", TINY), "runs/a").images_seen == 64
    longer = dp.train(dp.experiment("quickstart", {**TINY, "trainer.total_images": 96}), "runs/a")
    assert longer.images_seen == 96


def test_a_callback_that_raises_keeps_its_traceback_and_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Raises(Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            if pl_module.images_seen == 48:
                raise LookupError("of the user's own")

    exp = dp.experiment("quickstart", TINY)
    with pytest.raises(LookupError, match="of the user's own"):
        dp.train(exp, "runs/a", callbacks=[Raises()])
    assert dp.Run("runs/a").images_seen == 32
    whole = dp.train(exp, "runs/a")
    straight = dp.train(exp, "runs/b")
    ours, theirs = whole.denoiser.state_dict(), straight.denoiser.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_mistake_of_the_user_s_own_class_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    """As any bug: a line would hide where it is. What the class refuses of its settings is told."""
    own_module(
        tmp_path,
        monkeypatch,
        "mynets",
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    channels, classes = 3, 4\n"
        "    def __init__(self, width: int = 4):\n"
        "        super().__init__()\n"
        "        if width < 1: raise ValueError('width must be positive')\n"
        "        self.weight = nn.Conv2d(3, 3, 1)\n"
        "    def check_resolution(self, height, width): pass\n"
        "    def forward(self, x, c_noise, **condition):\n"
        "        raise ValueError('of the user')\n",
    )
    monkeypatch.chdir(tmp_path)
    small = {key: value for key, value in TINY.items() if not key.startswith("network")}
    words = [f"{key}={json.dumps(value)}" for key, value in small.items()]
    net = ["network._target_=mynets.Net"]
    with pytest.raises(ValueError, match="of the user") as caught:
        main(["train", "quickstart", *words, *net])
    assert not isinstance(caught.value, dp.UserError)
    assert main(["train", "quickstart", *words, *net, "network.width=0"]) == 2
    assert "network: width must be positive" in capsys.readouterr().err


def test_what_a_library_refuses_is_a_line_without_traceback(tmp_path, monkeypatch, capsys):
    """Nothing of the user's own code stands in it."""
    monkeypatch.chdir(tmp_path)
    words = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
    assert main(["train", "quickstart", *words, "trainer.accelerator=abacus"]) == 2
    assert "error: You selected an invalid accelerator name" in capsys.readouterr().err


def test_callbacks_and_loggers_stand_in_yaml_and_are_not_needed_to_open(tmp_path, monkeypatch):
    own_module(
        tmp_path,
        monkeypatch,
        "mycallbacks",
        "from pathlib import Path\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Notes(Callback):\n"
        "    def __init__(self, path: str): self.path = path\n"
        "    def on_train_start(self, trainer, pl_module):\n"
        "        Path(self.path).write_text(str(pl_module.images_seen))\n",
    )
    monkeypatch.chdir(tmp_path)
    exp = dp.experiment("quickstart", TINY).replace(
        callbacks=[dp.lazy("mycallbacks.Notes", path="noted")],
        loggers=[dp.lazy("lightning.pytorch.loggers.CSVLogger", save_dir="csv")],
    )
    dp.train(exp, "runs/a")
    assert (tmp_path / "noted").read_text() == "0"
    assert list((tmp_path / "csv").rglob("metrics.csv"))
    assert "mycallbacks.Notes" in (tmp_path / "runs/a/config.yaml").read_text()
    assert dp.Run("runs/a").sample(1).shape == (1, 3, 16, 16)
    # Who trains by it again is asked, as of any part of others.
    with pytest.raises(dp.UserError, match="--allow mycallbacks"):
        dp.experiment("runs/a/config.yaml")


class Here(nn.Module):
    """A network of this module."""


class Same:
    """Looks like a class of this module, and is not the one that its name finds."""


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (nn.Conv2d(3, 3, 1), "dp.lazy(Conv2d"),
        (type("Local", (nn.Module,), {"__qualname__": "f.<locals>.Local"}), "cannot be imported"),
        (type("Main", (nn.Module,), {"__module__": "__main__"}), "move it to a module"),
        (type("Same", (nn.Module,), {}), "another object"),
        (lambda: None, "cannot be imported"),
        (functools.partial(heun, 1), "dp.lazy(partial"),
    ],
)
def test_what_could_not_be_opened_again_is_refused_before_training(value, word):
    with pytest.raises(dp.UserError) as caught:
        dp.experiment("quickstart").replace(network=value)
    assert word in str(caught.value)


def test_objects_are_kept_by_what_they_are_made_from():
    folder = ImageFolder("photographs", 64, labels=True)
    node = plain(folder, "data.dataset")
    loader = plain(DataConfig(folder, batch_size=4), "data")
    assert loader["dataset"] == node
    assert node["_target_"] == "diffusion_pl.data.folder.ImageFolder"
    assert node["path"] == "photographs" and node["channels"] == 3  # a default is kept, too
    read = config.Config("x", "x", {"data": {**loader, "dataset": node}})
    assert config.build(read, "data").dataset == folder
    assert plain(functools.partial(heun, S_churn=40), "x") == {
        "_target_": "diffusion_pl.samplers.heun.heun", "_partial_": True, "S_churn": 40,
    }  # fmt: skip
    assert plain(heun, "x") == {
        "_target_": "diffusion_pl.samplers.heun.heun", "_partial_": True,
    }  # fmt: skip
    nested = dp.lazy(Here, inner=EMA(half_life=5), path=Path("a"), pair=(1, 2))
    assert plain(nested, "x") == {
        "_target_": "test_api.Here",
        "inner": {
            "_target_": "diffusion_pl.training.ema.EMA",
            "half_life": 5,
            "ramp_up": EMA(5).ramp_up,
            "posthoc_every": EMA(5).posthoc_every,
        },
        "path": "a",
        "pair": [1, 2],
    }


def test_replacing_takes_whole_sections_and_merges_dictionaries():
    exp = dp.experiment("quickstart")
    merged = exp.replace({"optimizer.lr": 1e-4}, trainer={"total_images": 5})
    assert merged.config.get("optimizer.lr") == 1e-4
    assert merged.config.get("optimizer.betas") == [0.9, 0.95]
    assert merged.config.get("trainer.total_images") == 5
    assert merged.config.get("lr_schedule.warmup") == 2_000
    assert exp.config.get("trainer.total_images") == 56_000  # the first one is as it was
    # The same target again is a whole node, too: nothing of the one before it stays.
    lazy = dp.lazy(EMA, half_life=9)
    node = exp.replace(ema=lazy).config.tree["ema"]
    assert node == {"_target_": "diffusion_pl.training.ema.EMA", "half_life": 9}
    dataset = {"data.dataset": dp.lazy(Synthetic, resolution=16, count=3)}
    replaced = exp.replace(dataset).config.tree["data"]["dataset"]
    assert replaced.keys() == {"_target_", "resolution", "count"}
    assert exp.config.tree["data"]["dataset"].keys() > replaced.keys()
    whole = exp.replace(ema=EMA(half_life=9))
    assert whole.config.get("ema.half_life") == 9
    assert whole.config.get("ema.ramp_up") == EMA(9).ramp_up != exp.config.get("ema.ramp_up")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: dp.experiment("quickstrat"), "quickstart"),
        (lambda: dp.experiment("quickstart", {"optimizer.rl": 1}), "optimizer.rl"),
        (lambda: dp.experiment("quickstart", {"optimiser.lr": 1}), "optimiser"),
        (lambda: dp.experiment("quickstart").replace(sampelr={}), "did you mean 'sampler'"),
        (lambda: dp.experiment("quickstart").replace(seed=object()), "seed"),
        (lambda: dp.experiment("defaults: nothing\nseed: 1\n"), "no such experiment"),
        (lambda: dp.Experiment(), "network: missing section"),
        (lambda: dp.Run("runs/none"), "no such run"),
        (lambda: dp.train("quickstart", stat="x"), "is no option of train"),
    ],
)
def test_mistakes_are_user_errors_of_one_line(make, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dp.UserError) as caught:
        make()
    assert word in str(caught.value)


def test_importing_costs_nothing_and_names_are_listed():
    code = (
        "import sys, diffusion_pl as dp\n"
        "print('torch' in sys.modules, sorted(n for n in dir(dp) if n[0] != '_'))\n"
        "dp.experiment\n"
        "print('torch' in sys.modules, 'lightning' in sys.modules)\n"
        "dp.experiment('quickstart')\n"
        "print('lightning' in sys.modules, dp.experiment.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, third = done.stdout.splitlines()
    assert first == f"False {sorted(dp.__all__)}"
    assert second == "False False"
    assert third == "False experiment"
    with pytest.raises(AttributeError, match="nothing"):
        _ = dp.nothing


class Signals(Callback):
    """Sends this process a signal after so many images."""

    def __init__(self, number, images):
        self.number, self.images = number, images

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if pl_module.images_seen == self.images:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_the_call_and_the_same_call_goes_on(number, ends, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exp = dp.experiment("quickstart", TINY)
    with pytest.raises(ends) as caught:
        dp.train(exp, "runs/a", callbacks=[Signals(number, 48)])
    assert getattr(caught.value, "code", 75) == 75
    assert dp.Run("runs/a").images_seen == 48
    assert (tmp_path / "runs/a/REQUEUE").exists()
    whole, straight = dp.train(exp, "runs/a"), dp.train(exp, "runs/b")
    ours, theirs = whole.denoiser.state_dict(), straight.denoiser.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_of_one_process_returns_whatever_an_allocation_has_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert dp.train(dp.experiment("quickstart", TINY), "runs/a").images_seen == 64


def test_what_is_sampled_and_enlarged_is_as_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = dp.train(dp.experiment("quickstart", TINY), "runs/a")
    assert not torch.equal(run.sample(2, label=0), run.sample(2, label=1))
    assert torch.equal(run.sample(2, label="disc"), run.sample(2, label=0))
    images = run.sample(2)
    agree = run.enlarge(images, to=32, label=0)
    free = run.enlarge(images, to=32, label=0, consistent=False)
    pairs = agree.double().unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean(dim=(3, 5))
    assert (pairs - images).abs().max() <= 1 and not torch.equal(agree, free)
    for wrong in (images.float(), images[0], images[:, :1]):
        with pytest.raises(dp.UserError, match="images: must be uint8"):
            run.enlarge(wrong, to=32, label=0)
    with pytest.raises(dp.UserError, match="count"):
        run.sample(0)
    with pytest.raises(dp.UserError, match="stepps: is no option of sample"):
        run.sample(1, stepps=3)


SCRIPT = """
import json
import diffusion_pl as dp
from test_api import TINY

if __name__ == "__main__":
    exp = dp.experiment("quickstart", {**TINY, "trainer.devices": 2})
    run = dp.train(exp, "runs/two")
    print(json.dumps({"images": run.images_seen, "sampled": len(run.sample(2))}))
"""


@pytest.mark.slow
def test_a_script_on_two_devices_goes_on_once(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('{"images": 64, "sampled": 2}') == 1


def test_what_does_not_fit_is_told_in_words_of_python(tmp_path, monkeypatch, capsys):
    """Classes for objects, one name for a list of names, a metric of one's own."""
    monkeypatch.chdir(tmp_path)
    run = dp.train(dp.experiment("quickstart", TINY), tmp_path / "run")
    for given in (Callback, dp.lazy(Callback)):
        with pytest.raises(dp.UserError, match=r"callbacks: takes objects .* make one, Callback\("):
            dp.train("quickstart", tmp_path / "other", callbacks=[given])
    with pytest.raises(dp.UserError, match=r"metrics: takes names .* changes="):
        run.evaluate(count=10, metrics=[object()])
    with pytest.raises(dp.UserError, match="sampler: takes the name of a function without"):
        run.sample(1, sampler=dp.lazy("diffusion_pl.samplers.heun.heun", churn=1.0))
    for name in ("weights", "allow", "set"):  # silently those of opening, once
        for ask in (run.sample, run.evaluate):
            with pytest.raises(dp.UserError, match=f"{name}: is chosen when a run is opened"):
                ask(1, **{name: "denoiser"})
    for weights in ("emaa", "denoiser:0.1", "ema:"):
        with pytest.raises(dp.UserError, match="weights: "):
            dp.Run(run.folder, weights=weights)
    with pytest.raises(dp.UserError, match="run: is empty"):
        dp.train("quickstart", "")
    with pytest.raises(dp.UserError, match="--batch-size must be at least 1"):
        run.evaluate(count=10, batch_size=0)
    with pytest.raises(dp.UserError, match="device 'nowhere': cannot be used here"):
        run.sample(1, device="nowhere")
    assert main(["replay", str(run.folder), "--step", "4"]) == 2  # of the steps 0 to 3
    assert "--step must be below the run's" in capsys.readouterr().err
    assert dp.Run(run.folder, allow="mine").images_seen == run.images_seen
    assert torch.equal(
        run.sample(2, sampler=heun, steps=3, seed=1),
        run.sample(2, sampler="diffusion_pl.samplers.heun.heun", steps=3, seed=1),
    )


@pytest.mark.parametrize(
    ("images", "more", "told"),
    [
        (torch.zeros(3, 8, 8, 3), {}, r"images must be \(N, C, R, R\) \(got \(3, 8, 8, 3\)\)"),
        (torch.zeros(3, 3, 8, 8), {}, "images must be uint8"),
        (None, {"labels": torch.tensor([0, 1]), "classes": 2}, r"labels must be int64 \(3,\)"),
        (None, {"labels": torch.tensor([0.0, 1, 1]), "classes": 2}, r"labels must be int64 \(3,\)"),
        (
            None,
            {"labels": torch.tensor([0, 1, 2]), "classes": 2},
            r"labels are 0 to 2, .*\[0, 2\)",
        ),
        (None, {"labels": torch.tensor([0, -1, 1]), "classes": 2}, r"labels are -1 to 1"),
        (None, {"classes": 2, "class_names": ["a"]}, "1 names for 2 classes"),
    ],
)
def test_images_that_do_not_fit_their_labels_are_refused(images, more, told):
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8) if images is None else images
    with pytest.raises(dp.UserError, match=told):
        load("mine", images, **more)


def test_a_network_of_other_channels_is_refused_by_its_shapes():
    class Flat(torch.nn.Module):
        def forward(self, x, c_noise, **condition):
            return x[:, :1]

    denoiser = Denoiser(Flat(), Karras(0.5))
    with pytest.raises(dp.UserError, match=r"gives \(2, 1, 8, 8\) for images of \(2, 3, 8, 8\)"):
        denoiser(torch.zeros(2, 3, 8, 8), torch.ones(2))
