"""What a run's folder keeps: its checkpoints, its claim, and what may change between starts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from homes import SMALLEST, experiments
from PIL import Image

from diffusion_pl import locks, processes
from diffusion_pl.cli import main
from diffusion_pl.commands import parts, run_dir
from diffusion_pl.images import Images
from diffusion_pl.signals import MARKER
from diffusion_pl.training import checkpoint as checkpoints
from diffusion_pl.training import sameness
from diffusion_pl.training.history import History
from diffusion_pl.training.module import DiffusionModule

RUN = (
    "# Photographs of one colour each (no published number)\n"
    + SMALLEST
    + """\
data:
  dataset: {_target_: diffusion_pl.data.folder.ImageFolder, path: photographs, resolution: 8}
  batch_size: 8
ema: {_target_: diffusion_pl.training.ema.EMA, half_life: 20}
sampler: {steps: 2}
features: {name: pixels}
evaluation: {every: 10_000, count: 4, batch_size: 4, grid: 4, metrics: []}
trainer:
  total_images: 16
  checkpoint_every: 8
  log_every: 8
  keep: 9
  accelerator: cpu
  devices: 1
  precision: fp32
  loggers: []
"""
)


def photograph(path, grey):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with photographs, the experiment, a run of 16 images and one of 32."""
    folder = tmp_path_factory.mktemp("begun")
    experiments(folder, RUN)
    for number in range(12):
        photograph(folder / "photographs" / f"{number:02}.png", 20 * number)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "tiny", "--run", "runs/a"]) == 0
        assert main(["train", "tiny", "--run", "runs/straight", "trainer.total_images=32"]) == 0
    return folder


@pytest.fixture
def place(begun, tmp_path, monkeypatch):
    """A copy of it, where commands run."""
    monkeypatch.chdir(shutil.copytree(begun, tmp_path / "place"))
    return tmp_path / "place"


@pytest.fixture
def train(place, capsys):
    """Train to a run's folder; the exit code and stderr."""

    def call(*words, run="a"):
        code = main(["train", "tiny", "--run", f"runs/{run}", *words])
        return code, capsys.readouterr().err

    return call


def kept(run="a"):
    return sorted(path.name for path in Path(f"runs/{run}/checkpoints").iterdir())


def file_of(images, run="a"):
    return Path(f"runs/{run}/checkpoints/{images:012d}.ckpt")


def state(images, run="a"):
    loaded = checkpoints.load(file_of(images, run))
    return {
        "weights": loaded["state_dict"],
        "moments": loaded["optimizer_states"],
        "step": loaded["global_step"],
    }


def assert_equal(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


def changes(run="a"):
    return [
        (row["images"], row["change"]) for row in History(Path(f"runs/{run}/changes.jsonl")).rows()
    ]


def logged(run="a"):
    return [row["images"] for row in History(Path(f"runs/{run}/metrics.jsonl")).rows()]


# A claim


@pytest.mark.parametrize(
    "wrong",
    [
        ["data.dataset.path=fotos"],
        ["network.classes=3"],
        ["--from", "runs/gone"],
        ["sampler.steps=0"],
    ],
)
def test_a_start_that_failed_claims_nothing(wrong, place, train):
    code, err = train(*wrong, "optimizer.lr=0.5", run="new")
    assert code == 2, err
    folder = place / "runs/new"
    assert not folder.exists() or {path.name for path in folder.iterdir()} <= {"samples"}


def test_what_was_to_be_trained_is_no_claim_but_the_first_step_is(place, train):
    folder = place / "runs/new"
    folder.mkdir()
    shutil.copy(place / "runs/a/config.yaml", folder)  # as `launch` leaves it
    (folder / "from").write_text("elsewhere.ckpt\n")
    assert train("optimizer.lr=0.01", "trainer.total_images=8", run="new")[0] == 0
    assert "lr: 0.01" in (folder / "config.yaml").read_text()
    assert not (folder / "from").exists()
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.jsonl").write_text('{"images": 4, "loss": 1.0}\n')
    code, err = train("trainer.total_images=8", run="new")
    assert code == 2 and "optimizer.lr: 0.01 -> 0.001" in err
    # It had no checkpoint yet: from the beginning.
    assert train("optimizer.lr=0.01", "trainer.total_images=8", run="new")[0] == 0
    assert logged("new") == [8]


def test_a_run_without_its_config_is_refused(place, train):
    (place / "runs/a/config.yaml").unlink()
    code, err = train()
    assert code == 2 and "no config.yaml; restore it" in err


def test_a_start_from_other_weights_is_said_again_until_there_is_a_checkpoint(place, train):
    assert train("--from", "runs/a", "trainer.total_images=8", run="new")[0] == 0
    shutil.rmtree(place / "runs/new/checkpoints")
    (place / "runs/new/metrics.jsonl").write_text('{"images": 4, "loss": 1.0}\n')
    code, err = train("trainer.total_images=8", run="new")
    assert code == 2 and "say so again: --from runs/a/checkpoints/000000000016.ckpt" in err
    assert train("--from", "runs/straight", "trainer.total_images=8", run="new")[0] == 2


# What may change


def test_a_run_is_extended_to_the_bits_of_one_that_was_longer_from_the_start(place, train):
    words = ("trainer.total_images=32", "trainer.log_every=16", "trainer.checkpoint_every=16")
    code, err = train(*words)
    assert code == 0, err
    assert "going on from 16 of 32 images" in err and "trainer.total_images: 16 -> 32" in err
    assert_equal(state(32), state(32, "straight"))
    noted = [
        (16, "trainer.total_images: 16 -> 32"),
        (16, "trainer.checkpoint_every: 8 -> 16"),
        (16, "trainer.log_every: 8 -> 16"),
    ]
    assert changes() == noted
    assert logged() == [8, 16, 32]
    assert checkpoints.load(file_of(32))["diffusion_pl"]["config"]["trainer"]["total_images"] == 32
    assert train(*words)[0] == 0  # finished: nothing is changed
    assert changes() == noted


def test_a_run_goes_on_with_its_data_moved_and_measured_in_another_way(place, train):
    shutil.move(place / "photographs", place / "elsewhere")
    words = (
        "data.dataset.path=elsewhere", "evaluation.count=6", "evaluation.every=16",
        "sampler.steps=3",
        "features={name: shapes}", "trainer.keep_every=16", "trainer.total_images=24",
    )  # fmt: skip
    code, err = train(*words)
    assert code == 0, err
    assert (16, 'data.dataset.path: "photographs" -> "elsewhere"') in changes()
    assert (16, 'features.name: "pixels" -> "shapes"') in changes()
    assert {images for images, _ in changes()} == {16} and len(changes()) == 7
    for images in (8, 16):
        assert_equal(state(images), state(images, "straight"))


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("data.hflip=true", "data.hflip: false -> true"),
        ("data.batch_size=4", "data.batch_size: 8 -> 4"),
        ("ema.half_life=30", "ema.half_life: 20 -> 30"),
        ("ema.posthoc_every=8", "ema.posthoc_every: absent -> 8"),
        ("lr_schedule.warmup=8", "lr_schedule.warmup: absent -> 8"),
        ("trainer.precision=bf16", 'trainer.precision: "fp32" -> "bf16"'),
        ("seed=1", "seed: 0 -> 1"),
    ],
)
def test_what_changes_the_numbers_is_refused_by_its_key(word, line, place, train):
    code, err = train("trainer.total_images=32", "trainer.log_every=16", word)
    assert code == 2 and f"  {line}\n" in err
    assert "trainer.total_images" not in err and not Path("runs/a/changes.jsonl").exists()


def test_the_budget_is_free_until_the_learning_rate_falls_towards_its_end(place, train):
    cool = "lr_schedule.cooldown=12"
    # The step after 24 images is made at 8/12 of the rate, the one after 16 at all of it.
    assert train(cool, "trainer.total_images=32", run="cool")[0] == 0
    code, err = train(cool, "trainer.total_images=48", run="cool")
    assert code == 2 and "  trainer.total_images: 32 -> 48" in err
    code, err = train("trainer.total_images=48", run="cool")
    assert code == 2 and "  lr_schedule.cooldown: 12 -> absent" in err
    # From where it had not begun to fall the run goes on as one without.
    checkpoints.point_to(file_of(24, "cool"))
    assert train("trainer.total_images=32", run="cool")[0] == 0
    assert_equal(state(32, "cool"), state(32, "straight"))


def test_a_longer_budget_and_cooldown_are_free_together_where_no_past_rate_differs(place, train):
    """Neither end of 20 images at the full rate is near, though one setting alone would be."""
    assert train("lr_schedule.cooldown=12", "trainer.total_images=32", run="cool")[0] == 0
    checkpoints.point_to(
        file_of(24, "cool")
    )  # steps after 0, 8 and 16 images, all at the full rate
    # Of 32 images a cooldown over 28 begins after 4, of 48 after 20.
    assert train("lr_schedule.cooldown=28", "trainer.total_images=32", run="cool")[0] == 2
    code, err = train("lr_schedule.cooldown=28", "trainer.total_images=48", run="cool")
    assert code == 0, err
    assert changes("cool") == [
        (24, "lr_schedule.cooldown: 12 -> 28"),
        (24, "trainer.total_images: 32 -> 48"),
    ]


def test_a_budget_below_what_was_seen_is_refused(place, train):
    code, err = train("trainer.total_images=8")
    assert code == 2
    assert (
        "has seen 16 images, more than trainer.total_images=8; name a budget of at least 16" in err
    )


@pytest.mark.parametrize(
    ("before", "now", "free"),
    [("8", "16", True), ("8", "null", False), ("null", "8", False)],
)
def test_the_interval_of_averages_is_free_where_they_were_taken(before, now, free, place):
    experiment = [parts.read("tiny", [f"ema.posthoc_every={value}"]) for value in (before, now)]
    run_dir.record(experiment[0], Path("runs/a"), None, 16, [])
    if free:
        assert len(run_dir.compare(experiment[1], Path("runs/a"), None, file_of(16))) == 1
    else:
        with pytest.raises(ValueError, match="posthoc_every"):
            run_dir.compare(experiment[1], Path("runs/a"), None, file_of(16))


# Checkpoints


def test_pruning_touches_only_what_the_run_has_written(place, train):
    folder = place / "runs/a/checkpoints"
    own = ("best.ckpt", "9.ckpt", "00000000008.ckpt", "000000000008-copy.ckpt")
    for name in own:
        shutil.copy(file_of(16), folder / name)
    shutil.copy(file_of(16), file_of(900))  # newer than the run itself: another has been here
    assert train("trainer.total_images=24", "trainer.keep=1")[0] == 0
    assert kept() == sorted(["000000000024.ckpt", "000000000900.ckpt", "latest", *own])
    assert checkpoints.latest(folder) == file_of(24).absolute()


def test_pruning_keeps_what_the_pointer_names(tmp_path):
    for images in (8, 16, 24, 32):
        (tmp_path / f"{images:012d}.ckpt").write_bytes(b"")
    checkpoints.point_to(tmp_path / "000000000008.ckpt")
    checkpoints.prune(tmp_path, 24, 1, lambda images: False)
    assert [int(path.stem) for path in checkpoints.found(tmp_path)] == [8, 24, 32]


def test_pruning_keeps_what_a_link_leads_to_and_links(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for images in (8, 16, 24, 32, 40):
        (folder / f"{images:012d}.ckpt").write_bytes(b"")
    (folder / "best.ckpt").symlink_to("000000000008.ckpt")
    (tmp_path / "paper").symlink_to("checkpoints/000000000016.ckpt")
    (folder / "loop").symlink_to("loop")
    (folder / "000000000004.ckpt").symlink_to(folder / "000000000040.ckpt")
    checkpoints.prune(folder, 40, 1, lambda images: False)
    assert [int(path.stem) for path in checkpoints.found(folder)] == [4, 8, 16, 40]


def test_a_run_goes_on_from_what_the_pointer_names_though_a_newer_one_lies_there(tmp_path):
    """As one that was written whole by a start that ended before it could point to it."""
    section = {"format": checkpoints.FORMAT}
    for images in (8, 16, 24):
        checkpoints.save({checkpoints.SECTION: section}, tmp_path / f"{images:012d}.ckpt")
    checkpoints.point_to(tmp_path / "000000000016.ckpt")
    assert checkpoints.newest_sound(tmp_path) == tmp_path / "000000000016.ckpt"
    (tmp_path / "000000000016.ckpt").write_bytes(b"")
    assert checkpoints.newest_sound(tmp_path) == tmp_path / "000000000008.ckpt"


@pytest.mark.parametrize("lost", ["pointer", "file", "both"])
def test_a_run_whose_newest_checkpoint_or_pointer_is_gone_takes_the_newest_that_is_there(
    lost, place, train, caplog
):
    pointer = place / "runs/a/checkpoints/latest"
    shutil.copy(file_of(8), file_of(8).with_name("best.ckpt"))
    if lost != "file":
        pointer.unlink()
    if lost != "pointer":
        file_of(16).unlink()
    code, err = train("trainer.total_images=24")
    seen = 16 if lost == "pointer" else 8
    assert code == 0 and f"going on from {seen} of 24 images" in err
    assert "latest: " in caplog.text and "taking the newest checkpoint" in caplog.text
    assert pointer.read_text() == "000000000024.ckpt"
    assert_equal(state(24), state(24, "straight"))


def test_a_history_without_a_checkpoint_is_refused(place, train):
    before = (place / "runs/a/metrics.jsonl").read_text()
    shutil.rmtree(place / "runs/a/checkpoints")
    code, err = train()
    assert code == 2
    assert "metrics.jsonl has rows up to 16 images, but there is no checkpoint; restore" in err
    assert (place / "runs/a/metrics.jsonl").read_text() == before
    (place / "runs/a/checkpoints").mkdir()
    (place / "runs/a/checkpoints/best.ckpt").write_bytes(b"")
    assert train()[0] == 2
    (place / "runs/a/checkpoints/latest").write_text("000000000016.ckpt")
    code, err = train()
    assert code == 2 and "names '000000000016.ckpt', which is not there" in err


@pytest.mark.parametrize(
    ("rows", "had_one"),
    [
        ([{"images": 8, "loss": 1.0}, {"images": 16, "loss": 1.0}], False),  # killed as it saved
        ([{"images": 16, "loss": 1.0}, {"images": 16, "name": "fd", "value": 1.0}], True),
        ([{"images": 16, "loss": 1.0}, {"images": 24, "loss": 1.0}], True),
    ],
)
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(rows, had_one, place):
    # Of batches of 8, the first past 12 images ends at 16.
    experiment = parts.read("tiny", ["trainer.checkpoint_every=12", "trainer.total_images=32"])
    run_dir.record(experiment, Path("runs/a"), None, 0, [])
    shutil.rmtree(place / "runs/a/checkpoints")
    (place / "runs/a/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if had_one:
        with pytest.raises(ValueError, match="but there is no checkpoint"):
            run_dir.compare(experiment, Path("runs/a"), None, None)
    else:
        assert run_dir.compare(experiment, Path("runs/a"), None, None) == []


def test_a_finished_run_keeps_no_mark_that_it_waits(place, train):
    (place / "runs/a" / MARKER).write_text("SIGTERM\n")
    code, err = train()
    assert code == 0 and "is finished" in err
    assert not (place / "runs/a" / MARKER).exists()


# The data


def test_other_data_is_refused_until_the_user_says_so(place, train):
    photograph(place / "photographs" / "more.png", 7)
    before = {path: path.read_bytes() for path in place.glob("runs/a/**/*") if path.is_file()}
    code, err = train("trainer.total_images=24")
    assert code == 2
    assert "runs/a: the training data has changed since the run was begun (12 images of " in err
    assert " -> 13 images of " in err and "go on with it: --data-changed" in err
    assert {path: path.read_bytes() for path in before} == before
    code, err = train("--data-changed", "trainer.total_images=24")
    assert code == 0, err
    (images, line), *rest = [row for row in changes() if "training data" in row[1]]
    assert (images, rest) == (16, []) and line.startswith("training data: 12 images of ")
    told = checkpoints.load(file_of(24))["diffusion_pl"]["data"]
    assert told["count"] == 13 and list(told["fingerprints"]) == ["8"]
    # From then on this is the run's data, even if the checkpoint is still one of before.
    file_of(24).unlink()
    checkpoints.point_to(file_of(16))
    assert train("trainer.total_images=24")[0] == 0
    assert len([row for row in changes() if "training data" in row[1]]) == 1


def test_classes_of_other_names_are_other_data():
    """What `sample --label cat` draws is not what it drew, though no image changed."""
    images = np.zeros((4, 3, 8, 8), np.uint8)
    cats, dogs = (
        sameness.data_of({8: Images("x", images, "0", np.arange(4) % 2, 2, class_names=names)})
        for names in (("cat", "dog"), ("dog", "cat"))
    )
    assert sameness.data_changed(cats, cats) is None
    assert "classes have other names" in sameness.data_changed(cats, dogs)
    noted_before = {key: value for key, value in cats.items() if key != "classes"}
    assert sameness.data_changed(noted_before, dogs) is None


def test_the_checkpoint_knows_its_data_where_the_run_does_not(place, train):
    (place / "runs/a/run.json").unlink()
    # As many images of the same names; one pixel of one is another.
    image = np.array(Image.open("photographs/03.png"))
    image[0, 0, 0] += 1
    Image.fromarray(image).save("photographs/03.png")
    code, err = train("trainer.total_images=24")
    assert code == 2 and "the training data has changed" in err
    assert main(["replay", "runs/a", "--step", "2"]) == 2  # nor is a step looked at with others
    assert main(["replay", "runs/a", "--step", "0"]) == 0  # which no checkpoint precedes


def test_a_run_from_before_fingerprints_goes_on_and_other_code_is_told(place, train):
    record = place / "runs/a/run.json"
    assert json.loads(record.read_text())["code"].startswith("diffusion_pl 0.")
    record.write_text(json.dumps({"code": "diffusion_pl 0.0.1, torch 2.0"}))
    old = checkpoints.load(file_of(16))
    for key in ("data", "code"):
        del old["diffusion_pl"][key]
    checkpoints.save(old, file_of(16))
    code, err = train("trainer.total_images=24")
    assert code == 0 and "code: diffusion_pl 0.0.1, torch 2.0 -> diffusion_pl 0." in err
    assert checkpoints.load(file_of(24))["diffusion_pl"]["data"]["count"] == 12
    assert changes()[-1][0] == 16 and changes()[-1][1].startswith("code: diffusion_pl 0.0.1")


def test_shards_cut_otherwise_are_other_data_where_they_are_shuffled_by_windows():
    def cut(shards, window):
        images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
        return sameness.data_of({8: Images("x", images, "f", shards=shards, window=window)})

    assert sameness.data_changed(cut((3, 3), 0), cut((2, 4), 0)) is None
    assert "in other shards" in sameness.data_changed(cut((3, 3), 1), cut((2, 4), 1))


# The lock


def test_a_run_that_is_held_is_left_alone(place, train, capsys):
    (place / "runs/a" / MARKER).write_text("SIGTERM\n")
    temporary = processes.temporary(place / "runs/a/checkpoints/x")  # of a living process
    temporary.write_bytes(b"half")
    before = {path: path.read_bytes() for path in place.glob("runs/a/**/*") if path.is_file()}
    with locks.hold(place / "runs/a" / locks.NAME, "training") as lock:
        for words in (["train", "tiny", "--run", "runs/a"], ["convert", "runs/a"]):
            assert main(words) == 2
            err = capsys.readouterr().err
            assert f"runs/a: process {lock.holder.process} on {lock.holder.host} holds it" in err
            assert len(err.splitlines()) == 1
        assert main(["verify", "runs/a"]) == 0  # who only reads needs no lock
    assert {path: path.read_bytes() for path in before} == before
    assert not (place / "runs/a" / locks.NAME).exists()


def test_what_a_killed_process_left_half_written_is_gone_at_the_next_start(place, train):
    ours = processes.temporary(place / "runs/a/checkpoints/x")
    left = ours.with_name(ours.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))  # of none
    for path in (ours, left):
        path.write_bytes(b"half")
    assert train("trainer.total_images=24")[0] == 0
    assert ours.exists() and not left.exists()


@pytest.mark.parametrize(("every", "rows"), [(8, [8, 16, 24]), (1_000, [8, 16])])
def test_a_run_that_another_has_taken_over_writes_no_more(every, rows, place, train, monkeypatch):
    step = DiffusionModule.training_step

    def taken_over(self, batch, number):
        if self.global_step == 3:  # as one that was thought lost, and comes back
            path = Path("runs/a") / locks.NAME
            text = path.read_text().replace(locks.read(path).token, "another")
            path.write_text(text)
        return step(self, batch, number)

    monkeypatch.setattr(DiffusionModule, "training_step", taken_over)
    before = kept()
    code, err = train("trainer.total_images=48", f"trainer.log_every={every}")
    assert code == 1 and "failed: runs/a: process " in err and "has taken it over" in err
    assert (kept(), logged()) == ([*before[:2], "000000000024.ckpt", "latest"], rows)
    assert locks.read(place / "runs/a" / locks.NAME).token == "another"


@pytest.mark.parametrize(
    "name", ["0000000000000002.ckpt", "2.ckpt", "20.ckpt", "000000000002 (1).ckpt"]
)
def test_pruning_leaves_names_that_it_does_not_write(name, tmp_path):
    kept = [tmp_path / checkpoints.name_of(images) for images in (4, 8, 12)]
    for path in (*kept, tmp_path / name):
        path.write_bytes(b"")
    (tmp_path / checkpoints.name_of(2)).mkdir()  # no file either
    checkpoints.prune(tmp_path, 12, 2, lambda images: False)
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        [name, checkpoints.name_of(2), *(each.name for each in kept[1:])]
    )


@pytest.mark.parametrize("said", ["", "\n\n", "x" * 5000, "0" * 2_000_000])
def test_a_pointer_that_names_nothing_is_one_line(said, tmp_path):
    (tmp_path / "latest").write_text(said)
    with pytest.raises(ValueError, match="latest: (names no checkpoint|is larger)") as error:
        checkpoints.latest(tmp_path)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "name", ["run.json", "from", "config.yaml", "metrics.jsonl", "changes.jsonl"]
)
def test_a_pipe_in_a_runs_folder_is_not_waited_for(name, place, train):
    (place / "runs/a" / name).unlink(missing_ok=True)
    os.mkfifo(place / "runs/a" / name)
    code, said = train("trainer.total_images=24")
    assert (code, name in said) == ((0, False) if name == "run.json" else (2, True)), said


def test_a_later_task_of_srun_is_no_rank_of_a_run_of_one_and_takes_the_lock(
    place, train, monkeypatch
):
    monkeypatch.setenv("SLURM_PROCID", "3")
    with locks.hold(place / "runs/a" / locks.NAME, "training"):
        code, said = train("trainer.total_images=24")
    assert code == 2 and "holds it" in said
    assert not file_of(24).exists()


def test_a_link_called_latest_is_the_checkpoint_that_it_names(tmp_path):
    """As people and other programs make it; one that leads elsewhere is refused."""
    for images in (8, 16):
        (tmp_path / checkpoints.name_of(images)).write_bytes(b"")
    pointer = tmp_path / "latest"
    pointer.symlink_to(checkpoints.name_of(8))
    assert checkpoints.latest(tmp_path) == tmp_path / checkpoints.name_of(8)
    pointer.unlink()
    pointer.symlink_to(Path("..") / checkpoints.name_of(8))
    with pytest.raises(ValueError, match="which is not there; restore it or remove the pointer"):
        checkpoints.latest(tmp_path)
