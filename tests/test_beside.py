"""What lies beside the checkpoint: whole after a crash, mended on the next start, never the end."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from faults import assert_equal, left
from homes import trained
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image
from test_cli import TINY

from diffusion_pl import processes
from diffusion_pl.cli import main
from diffusion_pl.images import save_png
from diffusion_pl.io.files import machine_problem
from diffusion_pl.training.history import History
from diffusion_pl.training.loggers import Unfailing

EXPERIMENT = TINY.replace("half_life: 20", "half_life: 20, posthoc_every: 8")


@contextmanager
def room_for(bytes):
    """No file of this process grows beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def history(tmp_path):
    made = History(tmp_path / "metrics.jsonl")
    made.append({"images": 8, "loss": 0.5})
    return made


@pytest.mark.parametrize(
    "tail", [b'{"images": 16, "lo', b"\0" * 700, b"\xff", b'{"images": 16}\0\0']
)
def test_a_torn_last_line_is_not_joined_with_the_next_row(history, tail):
    with history.path.open("ab") as file:
        file.write(tail)
    history.append({"images": 24})
    assert history.rows() == [{"images": 8, "loss": 0.5}, {"images": 24}]
    with history.path.open("ab") as file:
        file.write(tail)
    history.append({"images": 32}, {"images": 32, "name": "fd"})
    assert [row["images"] for row in history.rows()] == [8, 24, 32, 32]


def test_a_row_that_lacks_its_end_alone_is_a_row(history):
    with history.path.open("ab") as file:
        file.write(b'{"images": 16}')
    assert [row["images"] for row in history.rows()] == [8, 16]
    history.append({"images": 24})
    assert [row["images"] for row in history.rows()] == [8, 16, 24]


@pytest.mark.parametrize("room", range(0, 60, 7))
def test_rows_on_a_full_disk_leave_the_file_as_it_was(history, room):
    before = history.path.read_bytes()
    for rows in (
        [{"images": 16, "text": "x" * 80}],
        [{"images": 16}, {"images": 16, "y": "x" * 80}],
    ):
        with (
            room_for(len(before) + room),
            pytest.raises(ValueError, match="metrics.jsonl: cannot be"),
        ):
            history.append(*rows)
        assert history.path.read_bytes() == before
        assert os.listdir(history.path.parent) == ["metrics.jsonl"]


def test_rows_of_one_evaluation_are_there_together_or_not(history, monkeypatch):
    """Killed at any moment: an evaluation of which a row is there is not made up."""

    def killed(*words):
        raise KeyboardInterrupt

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, killed)
            with pytest.raises(KeyboardInterrupt):
                history.append({"images": 16, "name": "fd"}, {"images": 16, "name": "is"})
        assert not history.measured(16)


def test_rows_are_on_the_disk_when_they_are_written(history, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}"))
    )
    history.append({"images": 16})
    assert synced == [str(history.path)]


def test_lines_that_are_none_are_dropped_with_a_warning_and_kept_aside(history, caplog):
    sound = history.path.read_bytes()
    history.mend()
    assert os.listdir(history.path.parent) == ["metrics.jsonl"]  # nothing to mend
    spoilt = sound + b"\0" * 300 + b"\n" + b'{"images": 16}\n' + b'{"images'
    history.path.write_bytes(spoilt)
    with pytest.raises(ValueError, match="line 2 is no row"):
        history.rows()
    history.mend()
    assert [row["images"] for row in history.rows()] == [8, 16]
    assert history.path.with_name("metrics.jsonl.damaged").read_bytes() == spoilt
    assert "1 lines are no rows of measurements" in caplog.text


def test_a_picture_on_a_full_disk_leaves_the_one_before(tmp_path):
    path = tmp_path / "samples" / "grid.png"
    save_png(torch.zeros(3, 8, 8, dtype=torch.uint8), path)
    before = path.read_bytes()
    noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with (
        room_for(2000),
        pytest.raises(ValueError, match=r"grid.png: cannot be written.*free space"),
    ):
        save_png(noise, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["grid.png"]


def test_an_error_of_the_disk_is_one_line_and_any_other_is_not():
    full = OSError(errno.ENOSPC, "No space left on device")
    named = PermissionError(errno.EACCES, "Permission denied", "/some/where")
    assert "a file: cannot be read or written (No space left on device)" in machine_problem(full)
    assert machine_problem(named).startswith("/some/where: cannot be read or written (Permission")
    assert machine_problem(ConnectionResetError(errno.ECONNRESET, "reset")) is None


class Failing(Logger):
    """A logger that fails at one of its calls."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, []

    def _note(self, call):
        self.calls.append(call)
        if call == self.at:
            raise RuntimeError("the server\nis down")

    @property
    def name(self):
        return "x"

    @property
    def version(self):
        return 0

    @property
    def experiment(self):
        self._note("experiment")

    def log_metrics(self, metrics, step=None):
        self._note("metrics")

    def log_hyperparams(self, params, *args, **kwargs):
        self._note("hyperparams")

    def finalize(self, status):
        self._note("finalize")


@pytest.mark.parametrize("at", ["experiment", "metrics", "hyperparams", "finalize"])
def test_a_logger_that_fails_is_given_up_in_one_line(at, caplog):
    failing = Failing(at)
    safe = Unfailing(failing)
    for _ in range(2):
        assert safe.experiment is None
        safe.log_metrics({"loss": 1.0}, step=1)
        safe.log_hyperparams({})
        safe.save()
        safe.finalize("success")
    assert failing.calls.count(at) == 1 and failing.calls[-1] == at
    assert len(caplog.records) == 1
    assert "Failing fails (the server is down); the run goes on without it" in caplog.text


def test_a_logger_whose_folder_cannot_be_written_does_not_end_a_run(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    safe = Unfailing(TensorBoardLogger(tmp_path, name="", version="tensorboard"))
    safe.log_metrics({"loss": 1.0}, step=1)
    safe.finalize("success")
    assert len(caplog.records) == 1


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run of five snapshots."""
    return trained(tmp_path_factory.mktemp("home"), EXPERIMENT)


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "tiny"


def to_before_the_end(run):
    """Have the run stand where it stood before its last steps."""
    checkpoints = sorted((run / "checkpoints").glob("*.ckpt"))
    checkpoints[-1].unlink()
    (run / "checkpoints" / "latest").write_text(checkpoints[-2].name)
    return int(checkpoints[-2].stem)


def test_a_start_mends_what_lies_beside_and_ends_as_before(run, home, tmp_path, capsys, caplog):
    stands = to_before_the_end(run)
    snapshots = sorted((run / "posthoc").iterdir())
    torn = next(path for path in snapshots if int(path.name[:12]) == stands)
    torn.write_bytes(torn.read_bytes()[:1000])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 100)
    # Of a process that has ended: their numbers are below 2^22.
    half = processes.temporary(run / "samples" / "000000000016.png")
    half.with_name(half.name.replace(f"-{os.getpid()}-", f"-{2**22}-")).write_bytes(b"half")
    (run / "tensorboard").exists() and shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("in the way")
    assert main(["train", "tiny"]) == 0
    assert_equal(left(home, "tiny"), left_of(tmp_path, torn))
    assert f"{torn.name}: is damaged" in caplog.text
    assert "TensorBoard fails" in caplog.text
    assert not list(run.rglob("*.tmp"))
    for grid in (run / "samples").glob("*.png"):
        Image.open(grid).load()
    assert "Traceback" not in capsys.readouterr().err


def left_of(place, torn):
    """What the run leaves, without what was set aside."""
    torn.with_name(f"{torn.name}.damaged").unlink()
    return left(place, "tiny")


def test_a_torn_history_of_a_finished_run_is_mended_by_the_next_start(run, capsys):
    whole = (run / "metrics.jsonl").read_bytes()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"images": 40, "na')
    assert main(["train", "tiny"]) == 0
    assert (run / "metrics.jsonl").read_bytes() == whole
    assert [json.loads(line) for line in whole.splitlines()]


def test_a_grid_that_was_cut_off_is_drawn_again_and_no_row_is_doubled(run):
    grid = max((run / "samples").glob("*.png"))
    whole, rows = grid.read_bytes(), History(run / "metrics.jsonl").rows()
    grid.write_bytes(whole[:-20])
    assert main(["train", "tiny"]) == 0
    assert grid.read_bytes() == whole
    again = History(run / "metrics.jsonl").rows()
    assert [(row["images"], row.get("name"), row.get("value")) for row in again] == [
        (row["images"], row.get("name"), row.get("value")) for row in rows
    ]


def test_a_folder_that_may_not_be_written_is_one_line(run, capsys):
    stands = to_before_the_end(run)
    assert stands
    shutil.rmtree(run / "samples")
    (run / "samples").write_text("a file where the folder would be")
    capsys.readouterr()
    assert main(["train", "tiny"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: ") and "samples" in told[-1]
    assert not [line for line in told if "Traceback" in line]
