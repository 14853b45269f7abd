"""Parameter groups: which optimizer moves what, one step of all, bit-exact resume, bad input."""

from __future__ import annotations

import copy
import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from started import train as train_ranks
from test_lr_schedule import TINY, state, train  # noqa: F401 - a fixture
from test_routing import ROUTED
from test_run_folder import assert_equal
from test_training import experiment, go, network  # noqa: F401 - a fixture
from torch import nn

import diffusion_pl as dp
from diffusion_pl import config
from diffusion_pl.commands import parts
from diffusion_pl.errors import UserError
from diffusion_pl.networks.jit import JiT
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import muon
from diffusion_pl.training.lr_schedule import WarmupDecay
from diffusion_pl.training.optimizers import Group, Grouped, Together, optimizer_of

AdamW, Muon, SGD = torch.optim.AdamW, torch.optim.Muon, torch.optim.SGD
GROUPED = """\
optimizer:
  _target_: diffusion_pl.training.optimizers.Grouped
  rest: {_target_: torch.optim.AdamW, _partial_: true, lr: 0.01, weight_decay: 0.1}
  groups:
    - _target_: diffusion_pl.training.optimizers.Group
      ndim: 2
      optimizer: {_target_: diffusion_pl.training.muon.Muon, _partial_: true, lr: 0.05}
    - {_target_: diffusion_pl.training.optimizers.Group, names: ["*.bias"], weight_decay: 0.0}
    - {_target_: diffusion_pl.training.optimizers.Group, names: ["stem.*"], lr: 0.003}
"""
MUON = TINY.replace("optimizer: {lr: 0.01}\n", GROUPED) + "  grad_clip: 0.5\n"


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def whole(small):
    """As a run's module has a network: `denoiser.network`."""
    module = nn.Module()
    module.denoiser = nn.Module()
    module.denoiser.network = small
    return module


def descend(model, optimizers, steps=3):
    for step in range(steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        model(x).square().sum().backward()
        for each in optimizers:
            each.step()


def test_groups_are_the_optimizers_that_one_would_write_out():
    """The same bits as torch's own optimizers, each over its parameters by hand."""
    ours, theirs = Small(), Small()
    made = Grouped(
        rest=partial(AdamW, lr=0.01, weight_decay=0.1),
        groups=[
            Group(names=["first.*"], ndim=2, optimizer=partial(Muon, lr=0.05)),
            Group(names=["*.bias", "norm.?eight"], weight_decay=0.0),
            Group(names=["last.*"], lr=0.003),
        ],
    )
    descend(ours, [optimizer_of(made, whole(ours))])
    exempt = [theirs.first.bias, theirs.norm.weight, theirs.norm.bias, theirs.last.bias]
    by_hand = [
        AdamW(
            [
                {"params": exempt, "weight_decay": 0.0},
                {"params": [theirs.last.weight], "lr": 0.003},
            ],
            lr=0.01,
            weight_decay=0.1,
        ),
        Muon([theirs.first.weight], lr=0.05),
    ]
    descend(theirs, by_hand)
    assert_equal(ours.state_dict(), theirs.state_dict())
    assert not torch.equal(ours.first.weight, Small().first.weight)


def test_each_of_three_optimizers_keeps_its_own_groups():
    """Their rates, which a schedule changes from outside, are those by which they step."""
    ours, theirs = Small(), Small()
    groups = [
        Group(names=["first.weight"], optimizer=partial(Muon, lr=0.05)),
        Group(names=["last.*"], optimizer=partial(AdamW, lr=0.02)),
    ]
    together = optimizer_of(Grouped(partial(SGD, lr=0.01), groups), whole(ours))
    by_hand = [
        SGD([theirs.first.bias, theirs.norm.weight, theirs.norm.bias], lr=0.01),
        Muon([theirs.first.weight], lr=0.05),
        AdamW([theirs.last.weight, theirs.last.bias], lr=0.02),
    ]
    for each in (together, *by_hand):
        for group in each.param_groups:
            group["lr"] *= 0.5
    descend(ours, [together])
    descend(theirs, by_hand)
    assert_equal(ours.state_dict(), theirs.state_dict())


def test_frozen_parameters_are_in_no_group():
    small = Small()
    small.norm.requires_grad_(False)
    [group] = optimizer_of(partial(SGD, lr=0.1), whole(small)).param_groups
    trained = {id(each) for layer in (small.first, small.last) for each in layer.parameters()}
    assert {id(each) for each in group["params"]} == trained
    with pytest.raises(UserError, match=r"groups\.0: no parameter is called norm\.\*"):
        optimizer_of(Grouped(partial(SGD, lr=0.1), [Group(names=["norm.*"])]), whole(small))


def test_several_optimizers_are_saved_as_one_and_go_on_to_the_same_bits():
    made = Grouped(
        partial(SGD, lr=0.01, momentum=0.9), [Group(ndim=2, optimizer=partial(Muon, lr=0.05))]
    )
    straight = Small()
    descend(straight, [optimizer_of(made, whole(straight))], steps=4)
    first = Small()
    optimizer = optimizer_of(made, whole(first))
    assert isinstance(optimizer, Together) and len(optimizer.param_groups) == 2
    descend(first, [optimizer], steps=4)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(first.state_dict())
    assert {len(each) for each in saved["state"].values()} == {1} and len(saved["state"]) == 6
    second = Small()
    second.load_state_dict(weights)
    after = optimizer_of(made, whole(second))
    after.load_state_dict(saved)
    for model, each in ((first, optimizer), (second, after)):
        for group in each.param_groups:
            group["lr"] *= 0.5  # as a schedule does
        descend(model, [each], steps=2)
    assert_equal(first.state_dict(), second.state_dict())
    descend(straight, [optimizer_of(made, whole(straight))], steps=2)  # forgot its momentum
    assert not torch.equal(first.last.weight, straight.last.weight)


def test_a_run_with_muon_and_adam_resumes_to_the_same_bits(train, tmp_path):  # noqa: F811
    (tmp_path / "experiments" / "tiny.yaml").write_text(MUON)
    warm = "lr_schedule.warmup=24"
    for run, words in {"a": ["trainer.total_images=16"], "whole": []}.items():
        assert train(warm, *words, run=run)[0] == 0
    assert train(warm)[0] == 0
    assert_equal(state("a"), state("whole"))
    [saved] = state("a")["optimizer_states"]
    groups = saved["param_groups"]
    assert [group["base_lr"] for group in groups] == [0.01, 0.01, 0.003, 0.05]
    # The step that followed 28 of the 24 images that the rate rose over.
    assert [group["lr"] for group in groups] == [group["base_lr"] for group in groups]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    assert state("a")["global_step"] == 8  # a step of both counts once


@pytest.fixture
def muon_for_jit():
    """The node of docs/python.md."""
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    [node] = re.findall(r"```yaml\n(optimizer:\n.*?)```", text, re.DOTALL)
    return ROUTED.replace("optimizer: {lr: 0.01}\n", node)


def test_the_documented_patterns_give_muon_the_matrices_of_the_blocks(muon_for_jit):
    made = config.build(dp.experiment(muon_for_jit).config, "optimizer")
    sizes = {"patch_size": 2, "width": 16, "depth": 4, "heads": 2, "bottleneck": 4}
    network = JiT(8, classes=8, class_tokens=2, class_tokens_from=2, **sizes)
    optimizer = optimizer_of(made, whole(network))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = [{names[id(each)] for each in group["params"]} for group in optimizer.param_groups]
    matrices = ("affine", "attention.qkv", "attention.proj", "mlp.w12", "mlp.w3")
    expected = {f"blocks.{n}.{each}.weight" for n in range(4) for each in matrices}
    assert groups[2] == expected
    assert [type(each) for each in optimizer.optimizers] == [AdamW, muon.Muon]
    assert optimizer.param_groups[2]["weight_decay"] == 0.0
    assert groups[1] == {name for name in names.values() if name.endswith(".bias")}
    assert groups[0] == set(names.values()) - groups[1] - groups[2]
    assert {"label.weight", "class_positions", "patches.weight", "stem.weight", "time0.weight",
            "head.weight", "affine.weight", "norm.weight",
            "blocks.0.norm0.weight", "blocks.0.attention.norm_q.weight"} <= groups[0]  # fmt: skip


def test_a_jit_with_muon_and_adam_resumes_to_the_same_bits(train, tmp_path, muon_for_jit):  # noqa: F811
    (tmp_path / "experiments" / "tiny.yaml").write_text(muon_for_jit)
    for run, words in {"a": ["trainer.total_images=16"], "whole": []}.items():
        assert train(*words, run=run)[0] == 0
    assert train()[0] == 0
    assert_equal(state("a"), state("whole"))
    [saved] = state("a")["optimizer_states"]
    kinds = [set(each) for each in saved["state"].values()]
    assert kinds.count({"momentum_buffer"}) == 20  # five matrices of four blocks
    assert kinds.count({"step", "exp_avg", "exp_avg_sq"}) == len(kinds) - 20


def test_the_gradient_of_all_groups_is_clipped_together(go):  # noqa: F811
    """Plain descent in two optimizers: the whole update has the clip's length."""
    groups = [Group(names=["*.weight"], optimizer=partial(SGD, lr=0.5))]
    made = experiment(
        8,
        network=network(dropout=0.0, classes=8),
        optimizer=Grouped(partial(SGD, lr=0.5), groups),
        lr_schedule=None,
        settings={"grad_clip": 1e-3, "dropout": {"label": 0.0}},
    )
    before = {name: value.clone() for name, value in made.network.state_dict().items()}
    _, after = go(made)
    moved = [after["state_dict"][f"denoiser.network.{name}"] - was for name, was in before.items()]
    length = torch.cat([step.flatten() for step in moved]).norm()
    assert float(length) == pytest.approx(0.5 * 1e-3, rel=1e-3)


def test_an_overflow_of_fp16_leaves_the_step_of_all_out(go):  # noqa: F811
    groups = [Group(names=["*.weight"], optimizer=partial(SGD, lr=0.5))]

    def made(optimizer):
        return experiment(
            8,
            network=network(dropout=0.0, classes=8),
            optimizer=optimizer,
            settings={"precision": "fp16", "dropout": {"label": 0.0}},
            lr_schedule=WarmupDecay(),
        )

    weights = made(None).network.state_dict()
    _, after = go(made(Grouped(partial(SGD, lr=0.5), groups)))
    # EDM's loss, a sum over pixels times fp16's first scale of 65,536, overflows.
    for name, value in weights.items():
        assert torch.equal(after["state_dict"][f"denoiser.network.{name}"], value), name


def test_an_objective_s_own_weights_are_named_by_it():
    exp = dp.experiment(
        MUON.replace(
            "objective: {_target_: diffusion_pl.objectives.edm.EDM}",
            "objective:\n  _target_: diffusion_pl.diffusion.uncertainty.LearnedUncertainty\n"
            "  objective: {_target_: diffusion_pl.objectives.edm.EDM}",
        )
    )
    names = parts._dimensions(exp.config)
    assert any(name.startswith("objective.") for name in names)
    assert any(name.startswith("denoiser.network.stem") for name in names)


TARGET = "optimizer._target_=torch.optim"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optimizer.groups.1.names=['*.bais']"], "optimizer: groups.1: no parameter is called "
         "*.bais that an earlier group does not take; the names are such as "),
        (["optimizer.groups.2.names=['*']", "optimizer.groups.2.ndim=5"],
         "groups.2: no parameter with 5 dimensions"),
        (["optimizer.groups.0.ndim=4", "optimizer.groups.2.names=['*']"],
         "optimizer: Muon only supports 2D parameters"),
        (["optimizer.groups.0.names='*'"], "optimizer.groups.0.names: must be"),
        (["optimizer.groups.0.nmaes=['*']"], "optimizer.groups.0.nmaes: unknown argument"),
        (["optimizer.groups.0.optimizer.lr=-1"], "Muon needs lr and weight_decay of at least 0"),
        (["optimizer.groups.1.lr=-1"], "optimizer.groups.1: lr must not be negative (got -1.0)"),
        (["optimizer.rest={_target_: torch.optim.Rprop, _partial_: true}"],
         "optimizer: Rprop has no weight_decay; leave it out"),
        (["optimizer={_target_: torch.optim.Muon, _partial_: true}"],
         "diffusion_pl.training.optimizers.Grouped gives it these alone"),
        (["optimizer={_target_: torch.optim.LBFGS, _partial_: true}"],
         "optimizer: LBFGS cannot make a step of this training"),
        (["optimizer={_target_: torch.optim.SparseAdam, _partial_: true}"],
         "optimizer: SparseAdam cannot make a step of this training"),
        (["optimizer={_target_: torch.optim.lr_scheduler.StepLR, _partial_: true}"],
         "optimizer._target_: torch.optim.lr_scheduler.StepLR is no optimizer"),
        (["optimizer={_target_: builtins.list, _partial_: true}"],
         "optimizer: must make an optimizer of torch's (got a list)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_line_before_training(words, says, train, tmp_path):  # noqa: F811
    (tmp_path / "experiments" / "tiny.yaml").write_text(MUON)
    code, err = train(*words)
    assert code == 2 and says in err and "Traceback" not in err, err
    assert not Path("runs/a").exists()


def test_a_group_that_others_have_emptied_is_refused():
    made = Grouped(partial(SGD, lr=0.1), [Group(), Group(names=["*.bias"])])
    with pytest.raises(UserError, match=r"groups\.1: no parameter is called \*\.bias"):
        optimizer_of(made, whole(Small()))
    everything = Grouped(partial(SGD, lr=0.1), [Group(lr=0.2)])
    [group] = optimizer_of(everything, whole(Small())).param_groups
    assert group["lr"] == 0.2 and len(group["params"]) == 6


def test_from_python_a_run_keeps_its_groups(train):  # noqa: F811
    exp = dp.experiment(TINY).replace(
        optimizer=Grouped(partial(AdamW, lr=0.01), [Group(ndim=2, optimizer=partial(Muon, lr=0.1))])
    )
    run = dp.train(exp, "runs/python")
    assert run.images_seen == 32
    kept = config.build(config.load_resolved(exp.config.tree, "x.ckpt"), "optimizer")
    assert kept.groups[0].optimizer.func is Muon
    assert dataclasses.asdict(kept)["groups"][0]["ndim"] == 2


# With this rate and eps rounding is not blown up; see test_exact.py.
GENTLE = ["optimizer.rest.lr=1e-4", "optimizer.rest.eps=1e-3", "optimizer.groups.2.lr=1e-4"]
GENTLE += ["optimizer.groups.0.optimizer.lr=1e-3"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The run of one device, and of two that hold it whole or each a part."""
    from homes import experiments

    place = tmp_path_factory.mktemp("ranks")
    experiments(place, MUON, "tried")
    for name, words in {"one": [], "ddp": [], "fsdp": ["trainer.strategy=fsdp"]}.items():
        count = 1 if name == "one" else 2
        codes = train_ranks(place, name, *words, *GENTLE, ranks=count).codes
        assert codes == [0] * count
    files = {name: f"{name}/checkpoints/{32:012d}.ckpt" for name in ("one", "ddp", "fsdp")}
    files["half"] = f"one/checkpoints/{16:012d}.ckpt"
    return {name: checkpoints.load(place / "runs" / file) for name, file in files.items()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_make_the_run_of_one(kind, ranks):
    one, two = ranks["one"], ranks[kind]
    assert two["global_step"] == one["global_step"] == 8
    assert_same_form(one["optimizer_states"], two["optimizer_states"])
    for name, value in one["state_dict"].items():
        other = two["state_dict"][name]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4)


def assert_same_form(one, other):
    assert [s["param_groups"] for s in one] == [s["param_groups"] for s in other]
    for mine, theirs in zip(one, other, strict=True):
        shapes = [
            {n: {k: v.shape for k, v in each.items()} for n, each in s["state"].items()}
            for s in (mine, theirs)
        ]
        assert shapes[0] == shapes[1]
