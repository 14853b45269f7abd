"""Training: what one run does to weights, average, history and files, on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_pl.data.crops import Crop
from diffusion_pl.data.loader import DataConfig
from diffusion_pl.data.synthetic import Synthetic
from diffusion_pl.diffusion.schedules import Rho
from diffusion_pl.diffusion.timesteps import LinearBetas
from diffusion_pl.evaluation import Evaluation
from diffusion_pl.io.files import write_atomically
from diffusion_pl.metrics import shapes
from diffusion_pl.metrics.fid import Frechet
from diffusion_pl.networks.song_unet import SongUNet
from diffusion_pl.objectives.ddpm import DDPM
from diffusion_pl.objectives.edm import EDM
from diffusion_pl.objectives.improved_ddpm import ImportanceSampled
from diffusion_pl.samplers.ancestral import ancestral
from diffusion_pl.samplers.heun import heun
from diffusion_pl.samplers.sampler import Sampler
from diffusion_pl.signals import StopRequest
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import ema as averaging
from diffusion_pl.training.history import History
from diffusion_pl.training.lr_schedule import WarmupDecay
from diffusion_pl.training.module import DiffusionModule
from diffusion_pl.training.run import Experiment, fit
from diffusion_pl.training.sanity import NonFiniteError
from diffusion_pl.training.settings import TrainerConfig

BATCH = 8


def network(dropout=0.2, seed=0, **options):
    torch.manual_seed(seed)
    return SongUNet(
        16, model_channels=8, channel_mult=(1, 2), blocks=1, attention=(8,), dropout=dropout,
        **options,
    )  # fmt: skip


def experiment(images=48, *, objective=None, sampler=None, settings=None, **parts):
    defaults = {
        "total_images": images,
        "checkpoint_every": 16,
        "log_every": 16,
        "precision": "fp32",
        "accelerator": "cpu",
        "dropout": {"label": 0.3},
        "loggers": (),
    }
    return Experiment(
        name="tiny",
        config={"experiment": "tiny"},
        seed=3,
        settings=TrainerConfig(**(defaults | (settings or {}))),
        data=parts.get("data", DataConfig(Synthetic(40, 16), batch_size=BATCH, hflip=True)),
        network=parts.get("network") or network(classes=8),
        objective=objective or EDM(),
        optimizer=parts.get("optimizer", partial(torch.optim.Adam, lr=2e-3, fused=True)),
        lr_schedule=parts.get("lr_schedule", WarmupDecay(warmup=16)),
        ema=averaging.EMA(half_life=20, ramp_up=0.5),
        sampler=sampler or Sampler(heun, Rho(), 3),
        extractor=shapes.load(),
        evaluation=Evaluation(
            every=images if images > 100 else 32,
            count=12,
            metrics=(Frechet(),),
            batch_size=5,
            grid=4,
        ),
    )


@pytest.fixture
def go(tmp_path):
    """Trains in a folder of the test's and reads the newest checkpoint."""

    def run(made, name="run"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        fit(made, folder, tmp_path / "references", StopRequest())
        return folder, checkpoints.load(checkpoints.latest(folder / "checkpoints"))

    return run


def same(first, second):
    """Bitwise equality of everything that goes on into the next step."""
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    old, new = first["optimizer_states"][0], second["optimizer_states"][0]
    assert old["param_groups"] == new["param_groups"]
    for index, state in old["state"].items():
        for key, value in state.items():
            assert torch.equal(value, new["state"][index][key]), (index, key)


def measurements(folder):
    skip = ("seconds", "images_per_second", "time", "data_wait", "memory_gb")
    rows = History(folder / "metrics.jsonl").rows()
    return [{key: value for key, value in row.items() if key not in skip} for row in rows]


def test_a_run_leaves_rows_grids_and_checkpoints(go):
    folder, checkpoint = go(experiment())
    said = checkpoint["diffusion_pl"]
    assert {key: said[key] for key in ("format", "config", "images")} == {
        "format": 2,
        "config": {"experiment": "tiny"},
        "images": 48,
    }
    # Whether it goes on with the same images by the same code is seen from these.
    assert said["data"]["count"] == 40 and list(said["data"]["fingerprints"]) == ["16"]
    assert said["code"].startswith("diffusion_pl ") and torch.__version__ in said["code"]
    rows = History(folder / "metrics.jsonl").rows()
    assert [row["images"] for row in rows if "loss" in row] == [16, 32, 48]
    measured = [row for row in rows if "name" in row]
    assert [row["images"] for row in measured] == [32, 48]
    assert {row["name"] for row in measured} == {"fd@12/synthetic-16/shapes"}
    assert all(math.isfinite(row["value"]) and row["evaluations"] == 5 for row in measured)
    assert [file.name for file in sorted((folder / "samples").iterdir())] == [
        "000000000032.png",
        "000000000048.png",
    ]
    names = sorted(file.name for file in (folder / "checkpoints").iterdir())
    assert names == ["000000000032.ckpt", "000000000048.ckpt", "latest"]


@pytest.mark.parametrize("stop", [16, 32])
def test_a_stopped_run_goes_on_to_the_same_bits(go, stop):
    straight, whole = go(experiment(), "straight")
    folder, _ = go(experiment(), "stopped")
    # As a kill between two checkpoints leaves it: rows beyond the checkpoint, no later files.
    for file in (folder / "checkpoints").glob("*.ckpt"):
        file.unlink()
    part = go(experiment(images=stop), "short")[1]
    checkpoints.save(part, folder / "checkpoints" / f"{stop:012d}.ckpt")
    checkpoints.point_to(folder / "checkpoints" / f"{stop:012d}.ckpt")
    _, resumed = go(experiment(), "stopped")
    same(whole, resumed)
    assert measurements(folder) == measurements(straight)


@pytest.mark.parametrize("limit", [2, 3])
def test_accumulation_takes_the_same_images_and_the_same_steps(go, limit):
    # With dropout, whose masks belong to the images.
    _, whole = go(experiment(network=network(classes=8)), "whole")
    settings = {"device_batch_size": limit}
    _, parts = go(experiment(network=network(classes=8), settings=settings), "parts")
    assert parts["global_step"] == whole["global_step"] == 6
    for key, value in whole["state_dict"].items():
        # Sums in another order: a few roundings of float32, magnified by Adam's normalisation.
        torch.testing.assert_close(parts["state_dict"][key], value, rtol=1e-3, atol=2e-4)


def test_an_objective_with_a_memory_draws_the_same_timesteps_however_a_step_is_cut(go):
    def made(**settings):
        table = LinearBetas(8, beta_T=0.4)
        # Unweighted: the losses differ by the timestep, and with them how often it is drawn.
        inner = dataclasses.replace(DDPM(T=8, beta_T=0.4), weight=torch.ones_like)
        objective = ImportanceSampled(inner, table, keep=1)
        sampler = Sampler(ancestral, table, 2, unit_start=True)
        return experiment(objective=objective, sampler=sampler, settings=settings)

    _, whole = go(made(), "whole")
    _, parts = go(made(device_batch_size=1), "parts")
    assert whole["state_dict"]["objective.seen"].sum() == 48
    for key in ("objective.seen", "objective.history"):
        torch.testing.assert_close(
            parts["state_dict"][key], whole["state_dict"][key], rtol=1e-3, atol=0
        )


def test_passes_of_unlike_sizes_add_up_to_the_mean_loss():
    images = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    batch = {"image": images, "index": torch.arange(7)}
    whole, parts = (module(7, device_batch_size=limit) for limit in (None, 3))
    losses = [loss.item() for loss in parts.losses(batch)]
    assert len(losses) == 3
    assert sum(losses) == pytest.approx(next(whole.losses(batch)).item(), rel=1e-5)


def test_the_gradient_is_clipped_to_its_norm(go):
    norms = []

    class Steps(torch.optim.SGD):
        def step(self, closure=None):
            closure()  # Lightning's hooks before the step are in it
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            return super().step()

    for clip in (None, 0.01):
        parts = {"optimizer": partial(Steps, lr=1e-3), "lr_schedule": None}
        go(experiment(8, settings={"grad_clip": clip}, **parts), f"clip {clip}")
    free, clipped = norms
    assert free > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_several_resolutions_train_one_network_and_resume_to_the_same_bits(go):
    def made(images):
        return experiment(
            images,
            data=DataConfig(
                Synthetic(40, 16),
                batch_size=BATCH,
                hflip=True,
                resolution_weights={8: 1.0, 16: 1.0},
                crop=Crop(12),
            ),
            network=network(classes=8, position_frequencies=2),
            settings={"device_batch_size": 3},
        )

    _, whole = go(made(48), "whole")
    go(made(32), "part")
    # A longer budget is another config only to the command; here it is the same run, gone on.
    _, resumed = go(made(48), "part")
    same(whole, resumed)


def test_a_share_above_the_resolution_is_refused(go):
    weights = {32: 1.0, 16: 1.0}
    data = DataConfig(Synthetic(40, 16), batch_size=BATCH, resolution_weights=weights)
    with pytest.raises(ValueError, match="32 is more than data.dataset.resolution, 16"):
        go(experiment(data=data))


def test_the_seed_decides_the_run(go):
    made = experiment()
    _, first = go(made, "first")
    _, again = go(experiment(), "again")
    same(first, again)
    _, other = go(experiment(data=DataConfig(Synthetic(40, 16, seed=1), batch_size=BATCH)), "other")
    key = "denoiser.network.stem.weight"
    assert not torch.equal(first["state_dict"][key], other["state_dict"][key])


def test_bf16_trains_and_keeps_float32_weights(go):
    _, checkpoint = go(experiment(images=16, settings={"precision": "bf16"}))
    assert {value.dtype for value in checkpoint["state_dict"].values()} == {torch.float32}


def test_any_objective_trains_and_is_sampled_by_any_sampler(go):
    schedule = LinearBetas(T=20)
    sampler = Sampler(ancestral, schedule, 4, clip_denoised=True, unit_start=True)
    folder, _ = go(experiment(images=16, objective=DDPM(T=20), sampler=sampler))
    rows = History(folder / "metrics.jsonl").rows()
    assert [row["evaluations"] for row in rows if "name" in row] == [4]


def test_the_loss_falls(go):
    optimizer = partial(torch.optim.Adam, lr=1e-2, fused=True)
    settings = {"log_every": 400, "checkpoint_every": 1600}
    made = experiment(1600, network=network(0.0, classes=8), optimizer=optimizer, settings=settings)
    folder, _ = go(made)
    losses = [row["loss"] for row in History(folder / "metrics.jsonl").rows() if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_the_newest_checkpoints_stay_and_one_in_every_so_many_for_good(go):
    settings = {"checkpoint_every": 8, "keep": 2, "keep_every": 16}
    folder, _ = go(experiment(56, settings=settings))
    images = [int(path.stem) for path in checkpoints.found(folder / "checkpoints")]
    assert images == [16, 32, 48, 56]
    with pytest.raises(ValueError, match="keep_every must be a multiple of checkpoint_every, 8"):
        TrainerConfig(total_images=56, checkpoint_every=8, keep_every=12)


def test_the_rate_falls_to_zero_over_the_cooldown():
    rate = WarmupDecay(warmup=20, cooldown=50)
    rates = [rate(images, 100) for images in range(0, 101, 10)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])
    # The last step is whole, so the budget's end is that of the last step.
    settings = TrainerConfig(total_images=100, checkpoint_every=100)
    assert rate(100, settings.rounded_images(30)) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="cooldown must not be negative"):
        WarmupDecay(cooldown=-1)


def test_the_rate_falls_with_the_root_of_the_images_from_where_it_is_told():
    rate = WarmupDecay(warmup=20, decay_from=40)
    # Karras 2024: 1 / sqrt(max(t / t_ref, 1)), times the warm-up.
    rates = [rate(images, 1000) for images in (0, 10, 20, 40, 90, 160, 640)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 2 / 3, 0.5, 0.25])
    both = WarmupDecay(decay_from=40, cooldown=500)
    assert both(750, 1000) == pytest.approx(0.5 * math.sqrt(40 / 750))
    with pytest.raises(ValueError, match="decay_from must not be negative"):
        WarmupDecay(decay_from=-1)


def test_the_rate_rises_from_zero_over_the_warm_up(go):
    made = experiment(settings={"log_every": 8}, lr_schedule=WarmupDecay(warmup=32))
    folder, _ = go(made)
    rates = [r["learning_rate"] for r in History(folder / "metrics.jsonl").rows() if "loss" in r]
    # Images before the step: 0, 8, 16, ... of 32.
    assert rates == pytest.approx([0, 0.5e-3, 1e-3, 1.5e-3, 2e-3, 2e-3])


class Exploding(torch.nn.Module):
    """A network whose output is infinite from the third step on."""

    classes, channels = 0, 3

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls = 0

    def check_resolution(self, height, width):
        pass

    def forward(self, x, c_noise):
        self.calls += self.training
        return x * self.weight / (1.0 if self.calls < 3 else 0.0)


def test_a_non_finite_loss_stops_the_run_before_the_weights(go, tmp_path):
    made = experiment(network=Exploding(), settings={"dropout": {"label": 0.0}})
    with pytest.raises(
        NonFiniteError,
        match=r"loss is (inf|nan) at step 2, 16 images; images 16 to 23 of the run, of 16 px; "
        r"noise levels of the batch: \d",
    ):
        go(made)
    kept = checkpoints.load(checkpoints.latest(tmp_path / "run" / "checkpoints"))
    assert kept["diffusion_pl"]["images"] == 16
    assert all(torch.isfinite(value).all() for value in kept["state_dict"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": network(classes=5)}, "set network.classes=8"),
        ({"network": network(channels=1)}, "network.channels is 1, synthetic-16 has 3"),
        ({"data": DataConfig(Synthetic(40, 15), batch_size=BATCH)}, "must be multiples of 2"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_training(go, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        go(experiment(**change))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_average_forgets_half_in_a_half_life():
    profile = averaging.EMA(half_life=512)
    assert profile.decay(0, 512) == pytest.approx(0.5)
    # Karras 2022 at batch 512: 0.99929047; Ho 2020 at batch 128: 0.9999.
    assert averaging.EMA(500_000, 0.05).decay(10**8, 512) == pytest.approx(0.99929047, abs=1e-8)
    assert averaging.EMA(887_183).decay(0, 128) == pytest.approx(0.9999, abs=1e-9)
    # Ramp-up: after 1,000 images the half-life is 50.
    assert averaging.EMA(500_000, 0.05).decay(1000, 50) == pytest.approx(0.5)
    assert averaging.EMA(500_000, 0.05).decay(0, 50) == 0


def test_an_average_moves_by_its_decay_and_copies_buffers():
    current = torch.nn.BatchNorm1d(2)
    average = averaging.averaged_copy(current)
    with torch.no_grad():
        current.weight.fill_(3.0)
        current.running_mean.fill_(7.0)
    averaging.Updates(average, current)(0.75)
    assert average.weight.tolist() == [1.5, 1.5]
    assert average.running_mean.tolist() == [7.0, 7.0]
    assert not average.training
    assert not average.weight.requires_grad


def module(batch_size, **settings):
    return DiffusionModule(
        network(),
        EDM(),
        partial(torch.optim.Adam, lr=1e-3),
        averaging.EMA(10),
        TrainerConfig(total_images=1, checkpoint_every=1, **settings),
        batch_size=batch_size,
        resolution=16,
    )


def test_noise_levels_are_stratified_over_the_global_batch():
    made = module(batch_size=64)
    image = torch.zeros(16, 3, 16, 16)
    u = [made.draw(image, torch.arange(first, first + 16), {})[1] for first in range(0, 64, 16)]
    assert sorted((torch.cat(u) * 64).floor().tolist()) == list(range(64))


def test_what_is_drawn_for_an_image_does_not_depend_on_the_cut():
    made = module(batch_size=8, dropout={"label": 0.5})
    image, label = torch.zeros(8, 3, 16, 16), torch.arange(8)
    whole = made.draw(image, torch.arange(16, 24), {"label": label})
    part = made.draw(image[4:], torch.arange(20, 24), {"label": label[4:]})
    assert torch.equal(whole[1][4:], part[1])
    assert torch.equal(whole[2][4:], part[2])
    assert torch.equal(whole[3]["label"][4:], part[3]["label"])
    next_step = made.draw(image, torch.arange(24, 32), {"label": label})
    assert not torch.equal(whole[2], next_step[2])


def test_labels_are_dropped_at_the_stated_rate():
    made = module(batch_size=4096, dropout={"label": 0.25})
    image, label = torch.zeros(4096, 1, 1, 1), torch.ones(4096, dtype=torch.long)
    dropped = made.draw(image, torch.arange(4096), {"label": label})[3]["label"]
    assert set(dropped.tolist()) == {-1, 1}
    # A standard deviation of the share is 0.007.
    assert (dropped == -1).float().mean() == pytest.approx(0.25, abs=0.03)


def test_training_noise_is_standard_normal():
    made = module(batch_size=64)
    noise = made.draw(torch.zeros(64, 3, 16, 16), torch.arange(64), {})[2]
    assert noise.mean() == pytest.approx(0, abs=0.02)  # 49,152 values: 0.0045
    assert noise.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("size", "limit", "fraction", "passes"),
    [
        (64, None, 1.0, 1),
        (64, 64, 1.0, 1),
        (64, 100, 1.0, 1),
        (512, 64, 1.0, 8),
        (8, 3, 1.0, 3),
        # A quarter of the pixels: four times the images in the same memory.
        (64, 4, 1 / 4, 4),
        (64, 4, 1 / 16, 1),
        (3, 1, 4.0, 3),
    ],
)
def test_passes_follow_from_the_pixels_that_fit(size, limit, fraction, passes):
    made = TrainerConfig(total_images=1, checkpoint_every=1, device_batch_size=limit)
    assert made.micro_batches(size, fraction) == passes


def test_a_batch_that_does_not_divide_is_refused_with_what_would():
    made = TrainerConfig(total_images=1, checkpoint_every=1)
    with pytest.raises(
        ValueError, match="data.batch_size: 100 does not divide over 8.*use 96 or 104"
    ):
        made.per_device_batch(100, 8)


@pytest.mark.parametrize(
    "change", [{"total_images": 0}, {"log_every": 0}, {"grad_clip": 0.0}, {"checkpoint_every": 0}]
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainerConfig(**({"total_images": 8, "checkpoint_every": 8} | change))


def test_history_forgets_what_a_resumed_run_measures_again(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    for images in (8, 16, 24):
        history.append({"images": images})
    with history.path.open("a") as file:
        file.write('{"images": 3')  # cut off by a crash
    assert [row["images"] for row in history.rows()] == [8, 16, 24]
    history.rewind(16)
    assert [json.loads(line) for line in history.path.read_text().splitlines()] == [
        {"images": 8},
        {"images": 16},
    ]


def test_checkpoints_survive_a_full_disk(tmp_path):
    path = tmp_path / "one.ckpt"
    good = {"state_dict": {"a": torch.ones(2)}, "diffusion_pl": {"format": 2}}
    checkpoints.save(good, path)

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="cannot be written.*No space left"):
        write_atomically(path, fail)
    assert torch.equal(checkpoints.load(path)["state_dict"]["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


def test_a_checkpoint_that_calls_something_is_refused_and_not_run(tmp_path):
    path, proof = tmp_path / "bad.ckpt", tmp_path / "owned"
    torch.save({"diffusion_pl": {"format": 1}, "evil": Evil(proof)}, path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        checkpoints.load(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [({"state_dict": {}}, "none"), ({"diffusion_pl": {"format": 99}}, "99"), ([1, 2], "none")],
)
def test_checkpoints_of_another_format_are_refused(tmp_path, content, found):
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"format 2 \(format: {found}\)"):
        checkpoints.load(path)


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_checkpoints_are_one_clear_error(tmp_path, damage):
    path = tmp_path / "bad.ckpt"
    torch.save({"diffusion_pl": {"format": 1}, "w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500] if damage is None else damage)
    with pytest.raises(ValueError, match=r"bad\.ckpt: "):
        checkpoints.load(path)


def saved(folder, images, value=0.0):
    path = folder / f"{images:012d}.ckpt"
    section = {"format": checkpoints.FORMAT, "images": images}
    checkpoints.save({"diffusion_pl": section, "w": torch.full((300,), value)}, path)
    checkpoints.point_to(path)
    return path


def test_every_changed_byte_of_a_checkpoint_is_noticed(tmp_path):
    path = saved(tmp_path, 8)
    content = path.read_bytes()
    assert torch.equal(checkpoints.load(path)["w"], torch.zeros(300))
    rng = np.random.default_rng(0)
    for position in [*rng.integers(0, len(content), 400), *range(-100, 0)]:
        changed = bytearray(content)
        changed[position] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        with pytest.raises(checkpoints.DamagedError):
            checkpoints.load(path)
    for cut in rng.integers(0, len(content), 20):
        path.write_bytes(content[:cut])
        with pytest.raises(checkpoints.DamagedError):
            checkpoints.load(path)


def test_checkpoints_from_before_the_digest_are_still_read(tmp_path):
    torch.save({"diffusion_pl": {"format": 1}, "w": torch.ones(3)}, tmp_path / "old.ckpt")
    assert torch.equal(checkpoints.load(tmp_path / "old.ckpt")["w"], torch.ones(3))
    torch.save({"diffusion_pl": {"format": 2}}, tmp_path / "new.ckpt")
    with pytest.raises(checkpoints.DamagedError, match="its digest is missing"):
        checkpoints.load(tmp_path / "new.ckpt")


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    first, second, third = (saved(tmp_path, images) for images in (8, 16, 24))
    assert checkpoints.newest_sound(tmp_path) == third
    assert not caplog.records
    for path in (third, second):
        path.write_bytes(path.read_bytes()[:-30])
    assert checkpoints.newest_sound(tmp_path) == first
    assert len(caplog.records) == 2
    assert "24.ckpt: is damaged" in caplog.records[0].message
    assert checkpoints.latest(tmp_path) == first
    assert {path.name for path in tmp_path.iterdir()} == {
        "latest", first.name, f"{second.name}.damaged", f"{third.name}.damaged",
    }  # fmt: skip
    first.write_bytes(b"")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        checkpoints.newest_sound(tmp_path)
    assert checkpoints.newest_sound(tmp_path / "empty") is None


def test_weights_that_do_not_fit_name_the_first_key():
    denoiser = EDM().denoiser(network())
    state = {f"ema.{key}": value for key, value in denoiser.state_dict().items()}
    path = Path("x.ckpt")
    checkpoints.match_weights(denoiser, {"state_dict": state}, "ema", path)
    broken = dict(state)
    del broken["ema.network.stem.bias"]
    with pytest.raises(ValueError, match=r"ema\.network\.stem\.bias is missing"):
        checkpoints.match_weights(denoiser, {"state_dict": broken}, "ema", path)
    broken = state | {"ema.network.stem.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"stem\.bias has shape \(3,\), the network \(8,\)"):
        checkpoints.match_weights(denoiser, {"state_dict": broken}, "ema", path)


def test_a_pointer_to_nothing_is_an_error(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    (tmp_path / "latest").write_text("gone.ckpt")
    with pytest.raises(ValueError, match=r"names 'gone\.ckpt', which is not there"):
        checkpoints.latest(tmp_path)


def test_a_run_moves_the_average_towards_the_weights(go):
    before = network(classes=8).state_dict()
    _, checkpoint = go(experiment(images=24))
    state = checkpoint["state_dict"]
    key = "network.stem.weight"
    start, average, end = before["stem.weight"], state[f"ema.{key}"], state[f"denoiser.{key}"]
    assert not torch.equal(average, start)
    assert (average - end).norm() < (start - end).norm()
    assert not torch.equal(average, end)


def test_dropout_restarts_from_the_position_in_the_run():
    made = module(batch_size=8)
    image = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)

    def mask(first):
        next(made.losses({"image": image, "index": torch.arange(first, first + 4)}))
        return torch.rand(8)

    assert torch.equal(mask(4), mask(4))
    assert not torch.equal(mask(4), mask(0))
    assert not torch.equal(mask(4), mask(12))
