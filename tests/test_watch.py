"""The view of a run: of any size, of rows of any kind, in training and from another terminal."""

from __future__ import annotations

import datetime
import io
import json
import math
import os
import pty
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from test_compare import a_run

from diffusion_pl import locks
from diffusion_pl.cli import main
from diffusion_pl.commands.report_read import told
from diffusion_pl.commands.watch import view_of
from diffusion_pl.progress import Progress
from diffusion_pl.signals import MARKER
from diffusion_pl.training.flops import forward_flops, peak_of
from diffusion_pl.training.history import History
from diffusion_pl.view import RunView, as_ascii, braille

LEVELS = [{"sigma": 0.002 * 4**i, "error": 0.1, "standard_error": 0.01, "loss": 0.99 - i / 10}
          for i in range(8)]  # fmt: skip


def a_log(images, loss=1.0, **more):
    return {"images": images, "loss": loss, "gradient_norm": 0.4, "learning_rate": 3e-3,
            "images_per_second": 200.0, "data_wait": 0.02, "memory_gb": 1.25, "mfu": 0.41,
            **more}  # fmt: skip


def a_view(**words):
    view = RunView(**({"name": "tried", "total": 40_000, "every": 10_000} | words))
    for step in range(1, 26):
        view.note(a_log(1000 * step, 1 / step))
    for weights, value in (("ema", 0.5), ("denoiser", 0.6)):
        view.note({"images": 25_000, "name": "loss@8/test", "value": value, "weights": weights,
                   "levels": LEVELS, "held_out": True, "data": "test"})  # fmt: skip
    for images, value in ((10_000, 9.0), (20_000, 7.0)):
        name = "fd@250/test/shapes"
        view.note({"images": images, "name": name, "value": value, "seconds": 30.0})
    return view


def text_of(view, width=80, height=23):
    return "\n".join(line.plain for line in view.lines(width, height))


@pytest.mark.parametrize("width", [20, 79, 80, 119, 120, 160, 300])
@pytest.mark.parametrize("height", [1, 5, 10, 23, 47, 100])
def test_the_view_fits_any_terminal(width, height):
    for view in (a_view(), RunView("empty"), a_view(evaluation=(32, 250, 4.0), about="x" * 300)):
        lines = view.lines(width, height)
        assert 1 <= len(lines) <= height
        assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize(("width", "height"), [(80, 23), (160, 47)])
def test_the_view_says_all_there_is(width, height):
    text = text_of(a_view(), width, height)
    for words in ("62 %  25,000 of 40,000 images", "200 images/s", "norm 0.4, rate 0.003",
                  "1.25 GB, MFU 41%, data wait 2%", "training loss  1 to 0.04, 25 rows",
                  "averaged 0.5  raw 0.6",
                  "fd@250/test/shapes 7 at 20,000  9 at 10,000"):  # fmt: skip
        assert words in text, words


def test_times_to_come_are_those_of_training_and_of_evaluations():
    view = a_view()
    assert view.seconds_to_evaluation() == pytest.approx(5_000 / 200)
    # 15,000 images, and the evaluations at 30,000 and 40,000.
    assert view.seconds_left() == pytest.approx(15_000 / 200 + 2 * 30)
    view.speed = 100.0  # of this process, when it is known
    assert view.seconds_left() == pytest.approx(15_000 / 100 + 2 * 30)
    view.note(a_log(30_000))  # on it: that one is under way or done
    assert view.seconds_to_evaluation() == pytest.approx(100)
    assert view.seconds_left() == pytest.approx(100 + 30)
    view.note(a_log(40_000))
    assert view.seconds_to_evaluation() is None and view.seconds_left() == 0


def test_the_smoothed_loss_is_a_mean_that_forgets():
    view = RunView("x")
    for loss in (1.0, 2.0, 3.0):
        view.note(a_log(1, loss))
    assert view.smoothed == pytest.approx(2.0)  # at first the mean of all
    for _ in range(100):
        view.note(a_log(1, 5.0))
    assert view.smoothed == pytest.approx(5.0, abs=1e-3)


def test_a_long_run_keeps_its_curve_short():
    view = RunView("x")
    for number in range(20_000):
        view.note(a_log(number, 1.0))
    assert len(view.curve) <= 4096 and view.curve[0][0] == 0 and view.curve[-1][0] == 19_999


def test_a_curve_is_drawn_on_a_logarithmic_axis():
    points = [(float(i), math.exp(-i)) for i in range(9)]  # a line from corner to corner
    drawn = braille(points, (0, 8), 9, 9)
    cells = [[ord(sign) != 0x2800 for sign in line] for line in drawn]
    assert cells[0][0] and cells[8][8] and not cells[0][8] and not cells[8][0]
    assert all(cells[i][i] for i in range(9))
    assert braille([(0, 1.0)], (0, 0), 1, 1) == ["⡀"]
    plain = as_ascii(a_view().lines(80, 23))
    assert all(line.plain.isascii() for line in plain)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"images": "x"},
        {"images": -1},
        {"images": 10**400},
        {"images": 1, "loss": None},
        {"images": 1, "loss": math.nan, "gradient_norm": math.inf, "memory_gb": "much"},
        {"images": 1, "loss": -3.0},
        {"images": 1, "name": 3, "value": 1.0},
        {"images": 1, "name": "\x1b[2J\u202e[bold]", "value": 1.0},
        {"images": 1, "name": "x", "value": "y"},
        {"images": 1, "name": "x", "levels": [1, {"sigma": "a"}, {}], "weights": "ema"},
        {"images": 1, "name": "x", "levels": LEVELS, "weights": 7, "data": "\x1b]0;x\x07"},
        {"images": 1, "name": "x", "levels": LEVELS, "weights": "ema", "data": "\x1b]0;x\x07"},
    ],
)
def test_rows_of_any_kind_are_shown_or_passed_over(row):
    view = RunView("\x1b[31mname", about="\x1b[32m", total=100)
    for each in (row, a_log(5), row, a_log(6), row):
        view.note(each)
    view.messages.append("\x1b[33m")
    for size in ((80, 23), (160, 47)):
        text = text_of(view, *size)
        assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text


def terminal(**words):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=24, **words)
    return stream, console


def test_the_first_loss_is_shown_with_the_first_step_and_the_terminal_is_left_as_it_was():
    stream, console = terminal(color_system=None)
    progress = Progress(100, console)
    progress.start(0)
    progress.advance(8, 0.75)
    assert "0.75 in the newest steps" in stream.getvalue()
    progress.note(a_log(8, 0.5))
    progress.stop()
    progress.stop()
    text = stream.getvalue()
    assert text.rstrip().endswith("loss 0.5  0:00 left") or "training 8/100 images" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is there
    assert "\x1b[?1049h" not in text  # nor was another screen


def test_the_cursor_is_there_while_the_view_is_so_that_nothing_can_take_it_away():
    stream, console = terminal()
    Progress(100, console).start(0)
    text = stream.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")


class Loss:
    """Counts how often it is read, which waits for a device."""

    read = 0

    def __float__(self):
        self.read += 1
        return 0.5


def test_no_step_is_waited_for_but_those_that_are_shown(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for console, seconds in ((terminal()[1], 0.5), (Console(file=io.StringIO()), 15.0)):
        progress, loss = Progress(10**6, console), Loss()
        progress.start(0)
        for step in range(1000):
            now += seconds / 100
            progress.advance(step, loss)
        assert loss.read <= 12
        assert progress.view.loss == 0.5


def test_lines_where_there_is_no_terminal(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    progress = Progress(1000, Console(file=stream, soft_wrap=True))
    progress.start(0)
    for images, seconds in ((10, 2.5), (20, 0.5), (30, 16.0)):
        now += seconds
        progress.advance(images, 0.5)
    rows = [{"name": "loss@4/test", "value": 0.4, "weights": w, "levels": []}
            for w in ("ema", "denoiser")]  # fmt: skip
    progress.held_out(30, rows)
    progress.stop()
    assert stream.getvalue().splitlines() == [
        "training 10/1,000 images  loss 0.5  first step after 2.5 s",
        "training 30/1,000 images  1.6 images/s  loss 0.5  10:14 left",
        "30 images: loss@4/test = 0.4 (averaged), 0.4 (raw)",
    ]


def watched(capsys, folder, code=0):
    assert main(["watch", str(folder), "--json"]) == code
    captured = capsys.readouterr()
    found = json.loads(captured.out) if not code else captured.err
    assert main(["watch", str(folder)]) == code
    return found, capsys.readouterr().out


def test_a_run_is_watched_by_its_folder_alone(tmp_path, capsys):
    folder = a_run(tmp_path / "a", {2000: 9.0, 4000: 5.0})
    found, text = watched(capsys, folder)
    assert (found["state"], found["images"], found["budget"]) == ("finished", 4000, 4000)
    assert found["measures"] == {"fd@250/synthetic/shapes": 5.0}
    assert "100 %  4,000 of 4,000 images" in text and "fd@250/synthetic/shapes 5 at 4,000" in text


def test_every_state_is_told(tmp_path, capsys):
    half = a_run(tmp_path / "half", {2000: 8.0})
    assert watched(capsys, half)[0]["state"] == "stopped"
    (half / MARKER).write_text("SIGTERM\n")
    found, text = watched(capsys, half)
    assert "waits to go on: the same command" in found["about"]
    with locks.hold(half / locks.NAME, "training"):
        found, text = watched(capsys, half)
    assert found["state"] == "training" and "process " in text and "ends in 0:20" in text
    (half / "FAILED").write_text("the loss is nan\x1b[2J\n")
    found, text = watched(capsys, half)
    assert found["state"] == "failed" and "the loss is nan" in text and "\x1b" not in text
    new = a_run(tmp_path / "new")
    (new / "metrics.jsonl").unlink()
    found, text = watched(capsys, new)
    assert found["state"] == "begun" and "no row yet" in text
    assert "there is no run here" in watched(capsys, tmp_path / "none", code=2)[0]


def test_a_damaged_run_and_one_of_an_older_format_are_shown_as_far_as_they_go(tmp_path, capsys):
    folder = a_run(tmp_path / "a", {2000: 8.0})
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n{}\n" + json.dumps(a_log(3000)).encode() + b'\n{"images": 31')
    found, text = watched(capsys, folder)
    assert found["images"] == 3000 and "2 of 6 lines are damaged" in found["problems"][0]
    assert "lines are damaged" in text
    (folder / "config.yaml").write_text("data: [")
    found, text = watched(capsys, folder)
    assert found["state"] == "unreadable" and found["images"] == 3000 and found["budget"] == 0


def test_the_age_of_the_newest_row_is_told(tmp_path):
    folder = a_run(tmp_path / "a", {2000: 8.0})
    then = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    for row in (a_log(3000, time=then.isoformat()), a_log(3001, time="\x1b"), a_log(3002, time=3)):
        History(folder / "metrics.jsonl").append(row)
    view = view_of(told(folder, "a"), then + datetime.timedelta(minutes=3, seconds=2))
    assert view.about == "newest row 3 min ago"


def on_terminal(folder, until, rows=24, columns=80):
    """What `watch` writes on a terminal until it ends, or Ctrl-C once `until` has happened."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "LINES": str(rows), "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "diffusion_pl", "watch", str(folder)]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    text = b""
    try:
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # its end
                break
            if not piece:
                break
            text += piece
            if until is not None and until(text.decode(errors="replace")):
                process.send_signal(2)
                until = None
        return process.wait(60), text.decode(errors="replace")
    finally:
        process.kill()
        os.close(master)


@pytest.mark.slow
def test_a_run_that_goes_on_is_followed_to_ctrl_c_or_its_end(tmp_path):
    folder = a_run(tmp_path / "a", {2000: 8.0})
    stages = iter(
        [
            ("2,000 of 4,000", lambda: History(folder / "metrics.jsonl").append(a_log(3000))),
            ("3,000 of 4,000", lambda: True),
        ]
    )
    stage = [next(stages)]

    def until(text):
        if stage[0][0] not in text:
            return False
        done = stage[0][1]() is True
        stage[0] = next(stages, stage[0])
        return done

    with locks.hold(folder / locks.NAME, "training"):
        code, text = on_terminal(folder, until)
    assert code == 0 and "3,000 of 4,000" in text and "Traceback" not in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")
    History(folder / "metrics.jsonl").append(a_log(4000))
    code, text = on_terminal(folder, None)  # ends by itself
    assert code == 0 and "finished" in text


class Convolution(torch.nn.Module):
    """A raw network of one convolution of 3 x 3, and a table that nobody multiplies."""

    def __init__(self, **taken):
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 3, 3, padding=1)
        for name, value in taken.items():
            setattr(self, name, value)

    def forward(self, x, c_noise, label=None, text=None, text_mask=None, source=None, **more):
        for given in (label, text, text_mask, source):
            assert given is None or given.device.type == "meta"
        return self.mix(x)


def test_model_flops_are_two_a_multiplication():
    # 9 x 3 products for each of 3 channels of 8 x 8 pixels, each with its addition.
    for taken in ({}, {"classes": 3, "text_width": 4, "text_length": 2, "image_channels": 3}):
        assert forward_flops(Convolution(**taken), 3, 8) == 2 * 27 * 3 * 64
    assert forward_flops(Convolution(routing=object()), 3, 8) is None
    assert forward_flops(torch.nn.Identity(), 3, 8) is None


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA H200", "fp32", None),
        ("Radeon", "bf16", None),
    ],
)
def test_the_peak_is_the_maker_s(name, precision, peak):
    assert peak_of(name, precision) == peak
