"""The learning rate over a run: factors by images, torch's schedulers, bad input, old keys."""

from __future__ import annotations

import logging
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from homes import SMALLEST, experiments
from test_run_folder import assert_equal

import diffusion_pl as dp
from diffusion_pl import config
from diffusion_pl.cli import main
from diffusion_pl.config import renaming
from diffusion_pl.interop import weights
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import lr_schedule
from diffusion_pl.training.history import History
from diffusion_pl.training.lr_schedule import Cosine, WarmupDecay

TINY = (
    "# A tiny run for tests (no published number)\n"
    + SMALLEST
    + """\
data: {_target_: diffusion_pl.data.synthetic.Synthetic, count: 20, resolution: 8, batch_size: 4}
optimizer: {lr: 0.01}
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20}
sampler: {steps: 2}
features: {name: pixels}
evaluation: {every: 10_000, count: 4, batch_size: 4, grid: 4, metrics: []}
trainer:
  total_images: 32
  checkpoint_every: 16
  log_every: 4
  accelerator: cpu
  devices: 1
  precision: fp32
  loggers: []
"""
)
STEP = "lr_schedule={_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 3}"
TORCH_S = "lr_schedule={_target_: torch.optim.lr_scheduler.%s, _partial_: true, %s}"
COSINE = "lr_schedule._target_=diffusion_pl.training.lr_schedule.Cosine"


def torch_s(name, **arguments):
    return TORCH_S % (name, ", ".join(f"{key}: {value}" for key, value in arguments.items()))


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Train `tiny` to a run's folder; the exit code and stderr."""
    experiments(tmp_path, TINY)
    monkeypatch.chdir(tmp_path)

    def call(*words, run="a"):
        code = main(["train", "tiny", "--run", f"runs/{run}", *words])
        return code, capsys.readouterr().err

    return call


def rates(run="a"):
    rows = History(Path(f"runs/{run}/metrics.jsonl")).rows()
    return [row["learning_rate"] for row in rows if "loss" in row]


def state(run):
    loaded = checkpoints.load(checkpoints.latest(Path(f"runs/{run}/checkpoints")))
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    return {name: loaded[name] for name in names}


def test_the_cosine_is_torch_s():
    """CosineAnnealingLR with as many steps, after a linear warm-up."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=0.1)
    ours = Cosine(warmup=20, final=0.1)
    assert [ours(images, 100) for images in (0, 10, 15)] == [0.0, 0.5, 0.75]
    for step in range(9):
        assert ours(20 + 10 * step, 100) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_a_schedule_of_torch_s_counts_steps_and_resumes_to_the_same_bits(train):
    for run, words in {"a": ["trainer.total_images=16"], "whole": []}.items():
        assert train(STEP, *words, run=run)[0] == 0
    assert train(STEP)[0] == 0  # on from step 4, in the middle of a level
    expected = [0.01] * 3 + [0.001] * 3 + [0.0001] * 2  # a tenth after every three
    assert rates("a") == rates("whole") == pytest.approx(expected)
    assert_equal(state("a"), state("whole"))
    assert state("a")["lr_schedulers"][0]["last_epoch"] == 8
    code, err = train(STEP.replace("3}", "4}"))
    assert code == 2 and "  lr_schedule.step_size: 3 -> 4" in err


def test_a_factor_of_one_s_own_is_called_with_the_images(train, tmp_path, monkeypatch):
    (tmp_path / "myrates.py").write_text(
        "def halves(images, total_images, after):\n"
        "    return 0.5 ** (images // after) * (total_images == 32)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "myrates", None)
    del sys.modules["myrates"]
    node = "{_target_: myrates.halves, _partial_: true, after: 8}"
    assert train(f"lr_schedule={node}")[0] == 0
    assert rates() == pytest.approx([0.01 * 0.5 ** (images // 8) for images in range(0, 32, 4)])
    # Opened again, where it is trusted by name.
    assert main(["sample", "runs/a", "--count", "1"]) == 2
    assert main(["sample", "runs/a", "--count", "1", "--allow", "myrates"]) == 0


def test_what_changes_no_rate_so_far_is_free(train):
    assert train(COSINE, "trainer.total_images=16")[0] == 0
    code, err = train(COSINE)  # half a cosine to another end
    assert code == 2 and "  trainer.total_images: 16 -> 32" in err and "lr_schedule" not in err
    assert train("lr_schedule.warmup=8", "trainer.total_images=16", run="b")[0] == 0
    assert train("lr_schedule.warmup=8", "lr_schedule.cooldown=8", run="b")[0] == 0
    assert rates("b")[-2:] == pytest.approx([0.01, 0.005])  # 8 and 4 images before the end
    code, err = train("lr_schedule.warmup=4", "lr_schedule.cooldown=8", run="b")
    assert code == 2 and "  lr_schedule.warmup: 8 -> 4" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lr_schedule.warmup=-1"], "lr_schedule: warmup must not be negative (got -1)"),
        (["lr_schedule.warm_up=1"], "lr_schedule.warm_up: unknown argument"),
        ([COSINE, "lr_schedule.final=2"], "final in [0, 1] (got 0, 2.0)"),
        ([STEP.replace("true", "false")], "add `_partial_: true`"),
        ([STEP.replace("step_size", "stepsize")], "lr_schedule.stepsize: unknown argument"),
        ([STEP.replace("StepLR, _partial_: true, step_size: 3", "SequentialLR, _partial_: true")],
         "SequentialLR fails with these settings; correct them (TypeError: SequentialLR.__init__"),
        ([STEP.replace("StepLR, _partial_: true, step_size: 3",
                       "ReduceLROnPlateau, _partial_: true")], "lr_schedule: ReduceLROnPlateau"),
        (["lr_schedule={_target_: math.sqrt, _partial_: true}"], "is called with (images, total_"),
        (["lr_schedule={_target_: operator.sub, _partial_: true}"], "must give a factor from 0 on"),
        (["lr_schedule=3"], "lr_schedule: must be null or a node"),
        (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        ([torch_s("ExponentialLR", gamma=-1)],
         "lr_schedule: ExponentialLR must give rates from 0 on (got -0.01 at step 1)"),
        ([torch_s("ExponentialLR", gamma=1e300)], "must give rates from 0 on (got inf at step 2)"),
        ([torch_s("StepLR", step_size=7, gamma=-1)], "(got -0.01 at step 7)"),
        ([torch_s("StepLR", step_size=0)],
         "StepLR fails with these settings; correct them (ZeroDivisionError: "),
        ([torch_s("CosineAnnealingLR", T_max=0)],
         "CosineAnnealingLR fails with these settings; correct them (ZeroDivisionError: "),
        ([torch_s("OneCycleLR", max_lr=0.1, total_steps=7)],
         "OneCycleLR ends after 7 of the training's 8 steps; set total_steps to 8"),
        ([torch_s("MultiStepLR", milestones="[2, a]")],
         "lr_schedule: milestones must be whole numbers of steps (got 'a')"),
        ([torch_s("MultiStepLR", milestones="[2.5]")], "whole numbers of steps (got 2.5)"),
        (["lr_schedule={_target_: torch.nn.Linear, in_features: 1, out_features: 1}"],
         "lr_schedule: fails at 0 of 32 images (TypeError: "),
        (["lr_schedule={_target_: builtins.max, _partial_: true}"], "is called with (images, tot"),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_is_a_line_before_training(words, says, train):
    code, err = train(*words)
    assert code == 2 and says in err and "Traceback" not in err
    assert not Path("runs/a/checkpoints").exists()


def test_a_schedule_that_lasts_as_long_as_the_training_trains(train):
    assert train(torch_s("OneCycleLR", max_lr=0.1, total_steps=8))[0] == 0
    assert train(torch_s("MultiStepLR", milestones="[2, 4.0]"), run="b")[0] == 0
    expected = [0.01] * 2 + [0.001] * 2 + [0.0001] * 4
    assert rates("b") == pytest.approx(expected)


def trial():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("bad", [4, 12, 28])
def test_the_factor_of_every_step_is_tried(bad):
    asked = []

    def factor(images, total_images):
        asked.append((images, total_images))
        return 1.0

    lr_schedule.check(factor, trial(), 8, 4)
    assert asked == [(images, 32) for images in range(0, 32, 4)]
    with pytest.raises(dp.UserError, match=rf"from 0 on \(got -1 at {bad} images\)"):
        lr_schedule.check(lambda images, _: -1 if images == bad else 1, trial(), 8, 4)
    with pytest.raises(dp.UserError, match=rf"got nan at {bad} images"):
        lr_schedule.check(lambda images, _: math.nan if images == bad else 1, trial(), 8, 4)
    with pytest.raises(dp.UserError, match=rf"fails at {bad} of 32 images \(ZeroDivisionError: "):
        lr_schedule.check(lambda images, _: 1 / abs(images - bad), trial(), 8, 4)
    with pytest.raises(KeyError):  # a bug in a schedule of one's own keeps its traceback
        lr_schedule.check(lambda images, _: {}[images], trial(), 8, 4)


def test_a_scheduler_that_waits_for_a_number_is_refused():
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=3)
    with pytest.raises(dp.UserError, match="ReduceLROnPlateau waits for a measured number"):
        lr_schedule.check(plateau, trial(), 8, 4)


def test_a_long_training_is_checked_at_some_steps():
    asked = []
    lr_schedule.check(lambda images, _: asked.append(images) or 1, trial(), 2_500_000, 2)
    assert asked == [*range(0, 5_000_000, 5_000), 4_999_998]
    made = []

    class Counts(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            made.append(self.last_epoch)
            return [1.0]

    lr_schedule.check(partial(Counts), trial(), 2_500_000, 2)
    assert made == list(range(1001))
    once = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, cycle_momentum=False)
    with pytest.raises(dp.UserError, match="ends after 2,000 of the training's 3,000 steps"):
        lr_schedule.check(partial(once, total_steps=2_000), trial(), 3_000, 2)


def test_the_rate_of_every_group_is_looked_at():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    rates = [lambda step: 1.0, lambda step: 1.0 - step]
    made = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=rates)
    with pytest.raises(dp.UserError, match=r"LambdaLR must give .* \(got -1 at step 2\)"):
        lr_schedule.check(made, optimizer, 8, 4)


def test_keys_of_earlier_versions_are_read_under_the_new_names(train, tmp_path, caplog):
    renaming.warn_once.cache_clear()
    old = TINY.replace("trainer:\n", "trainer:\n  warmup: 8\n  decay_from: 16\n")
    with caplog.at_level(logging.WARNING, "diffusion_pl"):
        dp.experiment(old)
        read = dp.experiment(old, {"trainer.cooldown": 12}).config
    assert read.tree["lr_schedule"] == {
        "_target_": "diffusion_pl.training.lr_schedule.WarmupDecay",
        "warmup": 8, "decay_from": 16, "cooldown": 12,
    }  # fmt: skip
    assert not {"warmup", "decay_from", "cooldown"} & read.tree["trainer"].keys()
    said = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert [line for line in said if line.startswith("trainer.")] == [
        "trainer.warmup is now called lr_schedule.warmup; rename it there",
        "trainer.decay_from is now called lr_schedule.decay_from; rename it there",
        "trainer.cooldown is now called lr_schedule.cooldown; rename it there",
    ]
    assert config.build(read, "lr_schedule") == WarmupDecay(8, 16, 12)
    assert dp.experiment(TINY).replace(trainer={"warmup": 5}).config.get("lr_schedule.warmup") == 5


def test_an_earlier_section_beside_the_later_one_is_refused_from_python():
    """Whichever of the two comes first, none is set over the other in silence."""
    old, new = {"trainer": {"warmup": 5}}, {"lr_schedule": {"warmup": 6}}
    for changes in ({**old, **new}, {**new, **old}):
        with pytest.raises(dp.UserError, match=r"trainer\.warmup: is the former name of"):
            dp.experiment(TINY).replace(changes)


def test_weights_of_an_earlier_version_are_imported_with_a_schedule(train, capsys):
    """An export of a run that had no section lr_schedule; --set is over the run's config."""
    assert train("trainer.total_images=4")[0] == 0
    assert main(["export", "runs/a", "a.safetensors"]) == 0
    known, state = weights.read(Path("a.safetensors"))
    del known["config"]["lr_schedule"]
    weights.write(Path("a.safetensors"), state, known)
    words = ["--set", "lr_schedule.warmup=8"]
    assert main(["import", "safetensors", "a.safetensors", "runs/b", *words]) == 0
    assert config.build(config.load("runs/b/config.yaml"), "lr_schedule") == WarmupDecay(warmup=8)


def test_a_run_of_an_earlier_version_goes_on_under_either_name(train):
    """Its config.yaml and checkpoints say trainer.warmup, or have no schedule at all."""
    for run, words in {"a": ["lr_schedule.warmup=8"], "level": []}.items():
        assert train("trainer.total_images=16", *words, run=run)[0] == 0
        path = checkpoints.latest(Path(f"runs/{run}/checkpoints"))
        loaded = checkpoints.load(path)
        tree = loaded["diffusion_pl"]["config"]
        moved = tree.pop("lr_schedule")
        tree["trainer"] |= {key: value for key, value in moved.items() if key != "_target_"}
        checkpoints.save(loaded, path)
        kept = Path(f"runs/{run}/config.yaml")
        kept.write_text(config.dump(config.Config("x", "x", tree)))
        assert "lr_schedule" not in kept.read_text()
        for new in ([], ["trainer.total_images=24"]) if run == "level" else ([],):
            assert train(*words, *new, run=run)[0] == (2 if "24" in str(new) else 0)
    for run, words in {"b": ["trainer.warmup=8"], "plain": []}.items():
        assert train(*words, run=run)[0] == 0
    assert_equal(state("a"), state("b"))
    assert_equal(state("level"), state("plain"))
    assert rates("a")[:2] == pytest.approx([0, 0.005])
    changed = Path("runs/level/changes.jsonl").read_text()
    assert "lr_schedule" not in changed and "trainer.total_images: 16 -> 32" in changed


def test_a_schedule_that_counts_steps_is_built_on_the_run_s_optimizer():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made = partial(torch.optim.lr_scheduler.StepLR, step_size=2)
    assert lr_schedule.scheduler_of(made, optimizer).optimizer is optimizer
    assert lr_schedule.scheduler_of(WarmupDecay(), optimizer) is None


def test_the_rate_never_falls_below_zero_when_a_trainer_goes_beyond_the_budget():
    for schedule in (WarmupDecay(cooldown=100), Cosine()):
        assert schedule(1000, 1000) == pytest.approx(0) == schedule(1200, 1000)
