"""What `plan` counts: FLOPs and memory by hand and by real steps, samplers, names, the command."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from homes import experiments
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusion_pl import cli, config
from diffusion_pl.commands import parts
from diffusion_pl.commands.hints import command
from diffusion_pl.commands.plan import NO_PROMPTS
from diffusion_pl.commands.planned import Planned, size_of, usable
from diffusion_pl.errors import UserError
from diffusion_pl.networks.jit import JiT
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.objectives.improved_ddpm import ImprovedDDPMBound
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training.ema import EMA
from diffusion_pl.training.hardware import GPUS, RESERVED, gpu_named
from diffusion_pl.training.meter import BATCH, Meter
from diffusion_pl.training.optimizers import Group, Grouped
from diffusion_pl.training.step_cost import (
    Step,
    conditions,
    count_step,
    state_of,
    without_contents,
    without_numbers,
)

TINY = """defaults: base
network: {_target_: test_plan.Plain}
objective: {_target_: diffusion_pl.objectives.edm.EDM}
data:
  dataset: {_target_: diffusion_pl.data.synthetic.Synthetic, count: 40, resolution: 8}
  batch_size: 16
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20}
features: {name: shapes}
evaluation: {every: 32, count: 20, batch_size: 10}
trainer: {total_images: 80, checkpoint_every: 16, log_every: 16, accelerator: cpu,
  devices: 1, precision: fp32, keep: 2}
"""


class Plain(nn.Module):
    """A user's own network, which no formula knows.

    Args:
        classes: number of labels.
    """

    channels, resolution = 3, 8

    def __init__(self, classes: int = 0, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.classes = classes
        self.activation_checkpointing = activation_checkpointing
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.level = nn.Linear(1, 16)
        self.head = nn.Conv2d(16, 3, 1)

    def check_resolution(self, height: int, width: int) -> None:
        """Any."""

    def forward(self, x, c_noise, **condition):
        h = self.stem(x) + self.level(c_noise[:, None])[..., None, None]
        if self.activation_checkpointing and torch.is_grad_enabled():
            return self.head(h + checkpoint(self.block, h, use_reentrant=False))
        return self.head(h + self.block(h))


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """The tiny experiment as `plan` sees it, with overrides."""
    experiments(tmp_path, TINY)
    monkeypatch.chdir(tmp_path)

    def planned(*words, cuda=False):
        return Planned(parts.read("tiny", words), cuda=cuda)

    return planned


def adam(parameters):
    return torch.optim.Adam(parameters, fused=True)


def metered(call, *shapes):
    """What `call` does with tensors of BATCH images without numbers."""
    with without_numbers():
        given = [torch.zeros(BATCH, *shape, requires_grad=True) for shape in shapes]
        with Meter() as meter:
            call(*given)
    return meter


def test_a_linear_layer_has_two_operations_a_weight_and_training_three_times_as_many():
    with without_numbers():
        layer = nn.Linear(30, 50)
    assert metered(layer, (30,)).flops == BATCH * 2 * 30 * 50
    trained = metered(lambda x: layer(x).sum().backward(), (30,))
    assert trained.flops == BATCH * 3 * 2 * 30 * 50


def test_a_convolution_has_two_operations_a_weight_and_pixel():
    with without_numbers():
        layer = nn.Conv2d(6, 10, 3, stride=2, padding=1)
    forward = BATCH * 2 * 9 * 6 * 10 * 8 * 4
    assert metered(layer, (6, 16, 8)).flops == forward
    assert metered(lambda x: layer(x).sum().backward(), (6, 16, 8)).flops == 3 * forward


def test_attention_has_two_products_and_five_backward():
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    shapes = (4, 64, 16), (4, 48, 16), (4, 48, 16)
    product = BATCH * 2 * 4 * 64 * 48 * 16
    assert metered(attend, *shapes).flops == 2 * product
    assert metered(lambda *qkv: attend(*qkv).sum().backward(), *shapes).flops == 7 * product


def flops(network, side):
    with without_numbers():
        built = network()
        with Meter() as meter, torch.no_grad():
            built(torch.zeros(BATCH, 3, side, side), torch.zeros(BATCH))
    return meter.flops / BATCH


def test_published_counts():
    """Li & He 2025, Table 1: JiT-B/16, 25 G multiply-adds; DDPM++ as torch's counter has it for
    NVlabs' own (42.4 G; arXiv:2206.00364's network)."""
    assert flops(lambda: JiT(256, classes=1000), 256) / 2e9 == pytest.approx(25.2, abs=0.05)
    ddpmpp = {"model_channels": 128, "channel_mult": [2, 2, 2], "blocks": 4, "attention": [16]}
    assert flops(lambda: SongUNet(32, augment=9, **ddpmpp), 32) / 1e9 == pytest.approx(42.4, 0.005)


def most(meter):
    """Bytes of an image at the peak."""
    return max(per_image for per_image, _ in meter.curve)


def chain(x):
    return x.exp().exp().exp().exp()


def test_what_autograd_keeps_and_what_lives_for_a_moment_is_counted():
    """Each exp keeps its result: three beside the last, and the gradient of the last product."""
    assert most(metered(chain, (100,))) == 4 * 400
    # Backward: four results, less the last once it is used, and the two gradients about it.
    assert most(metered(lambda x: chain(x).sum().backward(), (100,))) == 5 * 400


def test_checkpointing_keeps_only_what_passes_between_blocks():
    def blocks(x):
        for _ in range(4):
            x = checkpoint(chain, x, use_reentrant=False)
        return x.sum().backward()

    def plain(x):
        for _ in range(4):
            x = chain(x)
        return x.sum().backward()

    # 16 results and two gradients; the ends of 4 blocks, the inside of one and two gradients.
    assert most(metered(plain, (100,))) == 18 * 400
    assert most(metered(blocks, (100,))) <= 9 * 400


def test_numbers_that_a_network_asks_for_do_not_stop_the_counting():
    def asking(x):
        return x * 2 if x.mean().item() > 0 else x

    assert most(metered(asking, (100,))) == 400


NETWORKS = {
    "SongUNet": lambda: SongUNet(8, model_channels=8, channel_mult=[1], blocks=1, dropout=0.1),
    "JiT": lambda: JiT(
        16, patch_size=4, width=32, depth=2, heads=2, bottleneck=8, class_tokens=0,
        activation_checkpointing=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_count_of_any_batch_is_what_a_step_of_that_batch_holds(name):
    """Real tensors of several images, every storage counted."""
    side = 8 if name == "SongUNet" else 16
    size, shape = (side, side), (3, side, side)
    with without_numbers():
        step = Step(NETWORKS[name](), without_contents(EDM()), adam, EMA(1.0), shape)
        state_of(step)
        cost = count_step(step, size, channels=3, precision=None, cuda=False)
    real = Step(NETWORKS[name](), EDM(), adam, EMA(1.0), shape)
    for images in (2, 7):
        real.optimizer.zero_grad()
        with Meter() as meter:
            hooks = [p.register_post_accumulate_grad_hook(meter.gradient) for p in real.trained]
            real.begin(images, "cpu")
            given = conditions(real.network, images, size, augmented=False, positioned=False)
            image = torch.zeros(images, *shape, dtype=torch.uint8)
            real.loss(image, given).backward()
        for hook in hooks:
            hook.remove()
        held = max(fixed + gradients for (_, gradients), fixed in meter.curve.items())
        assert cost.peak(images) == pytest.approx(held, rel=1e-3)  # scalars of few bytes


def test_a_gpu_keeps_normalised_images_in_float32():
    """CUDA's autocast computes group norms in float32: their inputs are kept at 4 bytes."""

    def kept(cuda):
        with without_numbers():
            step = Step(Plain(), EDM(), adam, EMA(1.0), (3, 8, 8))
            state_of(step)
            half = {"channels": 3, "precision": torch.bfloat16}
            return count_step(step, (8, 8), cuda=cuda, **half).per_image(64)

    assert kept(cuda=True) > 1.3 * kept(cuda=False)


def test_state_is_weights_moments_and_averages():
    def state(optimizer, ema):
        with without_numbers():
            return state_of(Step(Plain(), EDM(), optimizer, ema, (3, 8, 8)))

    found = state(adam, EMA(1.0))
    assert found.gradients == found.weights == found.averages
    assert found.moments == pytest.approx(2 * found.weights, rel=0.01)  # and the steps' counts
    assert state(adam, EMA(1.0, posthoc_every=1)).averages == 3 * found.averages
    muon = Group(["*.weight"], ndim=2, optimizer=lambda groups: torch.optim.Muon(groups))
    mixed = state(Grouped(adam, [muon]), EMA(1.0))
    matrices = sum(4 * p.numel() for n, p in Plain().named_parameters() if p.ndim == 2)
    # One moment instead of two, and no count of steps.
    assert found.moments - mixed.moments == matrices + 4
    assert found.sum(8) - found.rows == (found.weights + found.moments + found.averages) // 8


def test_the_largest_micro_batch_fits_and_one_more_does_not(planned):
    plan = planned("data.batch_size=4096")
    memory = int(plan.memory(1000, False, False) / (1 - RESERVED)) + 10_000
    largest = plan.largest(memory, False, False)
    assert plan.memory(largest, False, False) <= usable(memory)
    assert plan.memory(largest + 1, False, False) > usable(memory)
    assert 900 < largest <= 1100
    assert plan.largest(10**12, False, False) == 4096
    assert plan.largest(10**3, False, False) == 0


def test_accumulated_gradients_stay_beside_a_pass_and_shards_hold_a_part(planned):
    plan = planned()
    cost = plan.cost(False, False, plan.image_sizes[0])
    # At one image the peak is at the gradients' end, at many before there is a gradient.
    assert cost.peak(10_000, accumulating=True) - cost.peak(10_000) == cost.gradients
    assert cost.peak(1, shards=1000) < cost.peak(1)
    alone, pair = plan.resident(), planned("trainer.devices=2").resident()
    assert pair - alone == plan.state.gradients  # DDP's buckets
    assert planned("trainer.devices=2", "trainer.strategy=fsdp").resident() < alone


def test_smaller_images_take_micro_batches_of_as_many_pixels(planned):
    plan = planned("data.resolution_weights={4: 3, 8: 1}", "trainer.device_batch_size=2")
    small, whole = sorted(plan.image_sizes, key=lambda size: size.side)
    assert (small.share, whole.share) == (0.75, 0.25)
    assert plan.micro_batch == 2
    assert (plan.scaled(2, small), plan.scaled(2, whole)) == (8, 2)


@pytest.mark.parametrize(
    ("words", "evaluations"),
    [
        ((), {8: 35}),  # Heun, 18 steps, the last one Euler's
        (("sampler.steps=5",), {8: 9}),
        (
            ("network.classes=4", "evaluation.guidance=2", "trainer.dropout={label: 0.1}"),
            {8: 70},
        ),
        (
            ("network.classes=4", "evaluation.guidance=2", "trainer.dropout={label: 0.1}",
             "evaluation.guidance_interval=[100, 1000]"),
            {8: 35},
        ),
    ],
)  # fmt: skip
def test_network_evaluations_are_those_that_the_sampler_makes(planned, words, evaluations):
    assert dict(planned(*words).calls) == evaluations


def test_evaluations_and_checkpoints_are_counted_to_the_end(planned):
    plan = planned("evaluation.metrics=[]")
    assert plan.images == 80
    assert plan.evaluations == 3  # at 32, 64 and at the end
    assert plan.kept() == 2
    assert planned("trainer.keep_every=32").kept() == 4  # those of 32 and 64 stay
    assert planned("trainer.keep=9").kept() == 5
    assert plan.evaluation_flops(False) == 20 * 35 * plan.forward(8, False).flops
    assert plan.feature_flops == 0.0
    whole = planned("ema.posthoc_every=32")
    assert whole.snapshot_bytes() == 3 * 2 * plan.state.averages


def test_time_is_work_over_the_share_of_the_peak(planned):
    plan = planned("data.batch_size=65536", "trainer.total_images=131072000")
    gpu = GPUS["H200"]
    speed = plan.speed(gpu, False, 0.25)
    cost = plan.cost(False, False, plan.image_sizes[0])
    # The backward pass is twice the forward's work, less the gradient of the first input.
    assert 2.5 < cost.flops / plan.forward(8, False).flops <= 3
    # Beside what is computed, Adam's and the average's 40 bytes of a parameter.
    update = 40 * plan.state.gradients / 4 / gpu.bandwidth
    seconds = 65536 * cost.flops / (0.25 * gpu.fp32) + update
    assert speed.training == pytest.approx(2000 * seconds)
    assert speed.images_per_second == pytest.approx(65536 / seconds)
    assert not speed.launching
    few = planned().speed(gpu, False, 0.25)  # 16 images of 8 pixels
    assert few.launching
    assert few.training == pytest.approx(5 * (cost.kernels * 5e-6 + update), rel=0.01)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("h200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("a100-40", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("4090", "RTX 4090"), ("Tesla T4", "T4"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"),
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_names_that_people_and_drivers_give(said, meant):
    assert gpu_named(said).name == meant


def test_an_unknown_gpu_is_told_the_nearest_and_how_to_measure():
    with pytest.raises(UserError, match=r"did you mean 'H200'.*--measure"):
        gpu_named("H20")
    with pytest.raises(UserError, match="A100 40GB or A100 80GB"):
        gpu_named("A100")
    with pytest.raises(UserError, match=r"it has T4, .*--measure"):
        gpu_named("potato")


def test_a_gpu_without_bf16_computes_it_as_float32():
    assert GPUS["V100 32GB"].peak("bf16") == GPUS["V100 32GB"].fp32
    assert GPUS["V100 32GB"].peak("fp16") == 125e12
    assert GPUS["H100"].peak("bf16") == 989.5e12
    assert all(gpu.half > gpu.fp32 and gpu.memory > 14 * 2**30 for gpu in GPUS.values())


@pytest.fixture
def run(planned, capsys):
    """Run a command beside the tiny experiment: exit code, stdout, stderr."""

    def run(*words):
        code = cli.main(["plan", "tiny", *words])
        return code, *capsys.readouterr()

    return run


def test_the_plan_fits_the_screen_and_ends_with_what_to_type_next(run):
    code, out, err = run("--gpu", "h200", "--nodes", "2", "--gpus", "4", "optimizer.lr=1e-4")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    words = "launch", "tiny", "optimizer.lr=1e-4", "trainer.accelerator=gpu", "--nodes", 2
    assert err == f"next     {command(*words, '--gpus', 4)}\n"
    rows = [line.split() for line in out.splitlines()]
    assert ["in", "all", "2,883"] in rows
    assert any(row[:3] == ["8", "x", "H200"] for row in rows)
    assert ["35", "network", "evaluations", "an", "image"] in rows


def test_an_objective_that_looks_at_its_numbers_is_counted(planned):
    plan = planned(
        "objective={_target_: diffusion_pl.objectives.ddpm.DDPM}", "sampler.schedule.sigma_max=10"
    )
    assert plan.cost(False, False, plan.image_sizes[0]).flops > 0


def test_an_objective_that_remembers_its_losses_is_counted():
    objective = ImprovedDDPMBound(T=10)
    with without_numbers():
        network = SongUNet(
            8, model_channels=8, channel_mult=[1], blocks=1, attention=[], learned_variance=True
        )
        step = Step(network, without_contents(objective), adam, EMA(1.0), (3, 8, 8))
        state_of(step)
        cost = count_step(step, (8, 8), channels=3, precision=None, cuda=False)
    assert cost.flops > 0


def test_the_plan_as_json_has_what_the_lines_have(run, planned):
    code, out, _ = run("--gpu", "V100 16GB", "--json", "trainer.precision=auto")
    assert code == 0
    found = json.loads(out)
    assert found["precision"] == "fp32"  # it has no bf16
    plan = planned("trainer.accelerator=gpu", cuda=True)
    assert found["flops"]["training"] == plan.cost(False, False, plan.image_sizes[0]).flops
    assert found["checkpoint_bytes"] == plan.checkpoint_bytes()
    assert sum(found["parameters"].values()) * 4 == plan.state.gradients
    assert found["speeds"]["V100 16GB"]["largest"] == 16
    assert {each["checkpointing"] for each in found["activations"]} == {True, False}


def test_a_micro_batch_that_does_not_fit_is_made_smaller_in_the_next_command(run):
    _, out, err = run("--gpu", "T4", "data.batch_size=1048576")
    plan = Planned(
        parts.read("tiny", ["data.batch_size=1048576", "trainer.accelerator=gpu",
                            "trainer.devices=1"]), cuda=True,
    )  # fmt: skip
    largest = plan.largest(GPUS["T4"].memory, False, False)
    assert 0 < largest < 1048576
    assert f"trainer.device_batch_size={largest}\n" in err
    assert f"{largest:,}" in out


def test_ten_steps_are_timed_here(run):
    code, out, _ = run("--measure", "--json")
    assert code == 0
    found = json.loads(out)["measured"]
    assert found["images"] == 16
    assert 0 < found["seconds"] < 10
    code, _, err = run("--measure", "--gpu", "H200")
    assert (code, err.count("\n")) == (2, 1)
    assert "H200" in err


def test_an_efficiency_beyond_the_peak_is_refused(run):
    code, _, err = run("--efficiency", "35")
    assert (code, err) == (
        2,
        "error: --efficiency: is a share of the peak, in (0, 1] (got 35)\n",
    )


def test_sizes_are_told_in_powers_of_1000():
    assert [size_of(n) for n in (999, 1000, 1.5e9)] == ["999 bytes", "1 kB", "1.5 GB"]


@pytest.mark.slow
def test_a_checkpoint_holds_the_bytes_that_were_planned(planned, capsys):
    assert cli.main(["train", "tiny"]) == 0
    plan = planned()
    files = checkpoints.found(parts.RUNS / "tiny" / "checkpoints")
    assert len(files) == plan.kept()
    content = checkpoints.load(files[-1])
    held = list(content["state_dict"].values())
    for state in content["optimizer_states"]:
        held += [value for own in state["state"].values() for value in own.values()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert held == plan.checkpoint_bytes()


@pytest.mark.slow
def test_every_experiment_can_be_planned():
    for name in config.experiments():
        plan = Planned(parts.read(name, [NO_PROMPTS]), cuda=True)
        for half in (False, True):
            cost = plan.cost(half, plan.checkpointing, plan.image_sizes[-1])
            assert math.isfinite(cost.flops), name
            assert cost.flops > 2.5 * plan.forward(plan.image_sizes[-1].side, half).flops, name
        assert sum(plan.calls.values()) >= plan.experiment.get("sampler").get("steps", 1), name
        assert plan.data_line(), name
