"""Nothing waits for ever: a process that stands still, ranks without a parent, lost readers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import write
from homes import ROOT
from sharded import write as write_shards


def python(code, **more):
    more["env"] = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **more,
    )


def test_a_process_that_shows_no_life_prints_its_stacks_and_ends():
    done = python(
        "import time\n"
        "from diffusion_pl.training.watchdog import Watchdog\n"
        "def stuck(): time.sleep(50)\n"
        "Watchdog(0.5).alive()\n"
        "stuck()\n"
    )
    assert done.returncode == 1
    assert "in stuck" in done.stderr


def test_signs_of_life_put_the_end_off_and_a_stop_ends_the_watch():
    done = python(
        "import time\n"
        "from diffusion_pl.training.watchdog import Watchdog\n"
        "watch = Watchdog(1.0)\n"
        "for _ in range(30):\n"
        "    watch.alive()\n"
        "    time.sleep(0.1)\n"
        "watch.stop()\n"
        "time.sleep(1.5)\n"
        "print('alive')\n"
    )
    assert (done.returncode, done.stdout) == (0, "alive\n")


def gone(pids, seconds=30.0):
    """Whether processes end within some seconds; a zombie has ended."""
    until = time.monotonic() + seconds
    while left := [pid for pid in pids if _runs(pid)]:
        if time.monotonic() > until:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a service of Linux")


@linux
def test_a_rank_that_stands_still_ends_with_the_process_that_started_it(tmp_path):
    child = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from diffusion_pl.training.watchdog import end_with_parent\n"
        "end_with_parent()\n"
        f"Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "LOCAL_RANK": "1"}
    process = subprocess.Popen([sys.executable, "-c", parent], env=environment)
    until = time.monotonic() + 30
    while not (tmp_path / "pid").exists() and time.monotonic() < until:
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    assert gone([pid], 5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bounded")
    (folder / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "base.yaml", folder / "experiments")
    write(folder)
    return folder


@linux
@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "rank"), [("KILL", 0), ("KILL", 1), ("STOP", 1), ("raise", 1), ("hang", 1)]
)
def test_of_the_ranks_that_one_command_starts_none_outlives_a_fault(fault, rank, place):
    run = f"{fault}-{rank}"
    command = [sys.executable, "-m", "diffusion_pl", "train", "tried", "--run", f"runs/{run}"]
    environment = {
        **os.environ,
        "FAULT": f"{fault}:5",
        "FAULT_RANK": str(rank),
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_NUM_THREADS": "1",
    }
    with (place / f"{run}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "trainer.devices=2"],
            cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        code = process.wait(timeout=120)
    said = (place / f"{run}.log").read_text()
    ranks = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True)
    assert gone([int(pid) for pid in ranks.stdout.split()], 10), said
    assert code == (-9 if (fault, rank) == ("KILL", 0) else code) and code not in (0, 75), said


SLOW = """
import os, signal, time
from pathlib import Path
from diffusion_pl.data.readers import ReaderLostError
from loaders import loader
from diffusion_pl.data.shard_images import ShardImages
from diffusion_pl.data.shards import Shards

read = ShardImages.read
def broken(self, indices):
    if 13 in indices.tolist():
        FAULT
    return read(self, indices)
ShardImages.read = broken

images = Shards("shapes", resolution=8).open(8)
read_ahead = loader(images, 2, 10, num_workers=1, timeout=5.0)
def in_order(first, last):
    import torch
    return torch.arange(first, last)
read_ahead.order = in_order
seen = []
try:
    for batch in read_ahead:
        seen.append(batch["index"].tolist())
except ReaderLostError as error:
    print(len(seen), error)
"""


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("time.sleep(60)", "it gave nothing for 5 s"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "it gave nothing for 5 s"),
        # As its last batch was waiting, or was just being handed over.
        ("os.kill(os.getpid(), signal.SIGKILL)", "disk or server"),
    ],
)
def test_a_reader_that_is_lost_is_named_with_its_step_and_shard(fault, problem, tmp_path):
    write_shards(tmp_path / "shapes")  # 20 images, 6 a shard: image 13 is in the third
    done = python(SLOW.replace("FAULT", fault), cwd=tmp_path)
    found, _, words = done.stdout.partition(" ")
    # The reader is ahead by two batches: those before the seventh have come, or were lost with it.
    assert 3 <= int(found) <= 6, done.stderr
    assert f"a reading process is lost at step {found}; from there it reads" in words
    assert "shapes/shards/000002.tar" in words and problem in words
