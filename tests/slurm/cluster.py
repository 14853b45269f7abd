"""A real SLURM on this machine alone: a controller and a daemon for each of two nodes.

Six packages of Debian are unpacked into a folder; nothing is installed, no root is needed. The
nodes are called 127.0.0.1 and 127.0.0.2: the first one's name is an address that all can reach.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = (
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "libhwloc15",
    "libmunge2",
)
NODES = 2

# Without munge and accounting. A requeued job is looked at again after a second (60 as it comes),
# and starts once the old credential has expired, in 5 seconds (120 as it comes).
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.[1-2] Port=[{ports[1]}-{ports[2]}] \
CPUs=8 RealMemory=8000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Absent(Exception):
    """SLURM cannot be had here; says why."""


class Cluster:
    """A SLURM that runs while the `with` lasts.

    Args:
        folder: an empty one; everything is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = dict(os.environ)
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        root = _unpacked(self.folder)
        plugins = next(root.glob("usr/lib/*/slurm-wlm"))
        libraries = f"{plugins}:{plugins.parent}"
        if more := os.environ.get("LD_LIBRARY_PATH"):
            libraries += f":{more}"
        config = self.folder / "slurm.conf"
        config.write_text(
            CONFIG.format(
                host=socket.gethostname(),
                user=_user(),
                ports=_ports(),
                plugins=plugins,
                folder=self.folder,
            )
        )
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir()
        self.env |= {
            "SLURM_CONF": str(config),
            "PATH": f"{root / 'usr/bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": libraries,
        }
        programs = root / "usr/sbin"
        self._daemon(programs / "slurmctld-wlm", "-D", "-c")
        for node in range(1, NODES + 1):
            step = programs / "slurmstepd-wlm"
            self._daemon(programs / "slurmd-wlm", "-D", "-d", step, "-N", f"127.0.0.{node}")
        try:
            self.until(lambda: self.said("sinfo", "-h", "-t", "idle", "-o", "%D") == str(NODES), 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """End every job, then the daemons; nothing stays."""
        self.said("scancel", "--user", _user())
        try:
            self.until(lambda: not self.said("squeue", "-h"), 20)
        finally:
            for daemon in reversed(self.daemons):
                daemon.terminate()
            for daemon in self.daemons:
                try:
                    daemon.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def said(self, *words: object) -> str:
        """What one of SLURM's commands prints; nothing when it fails."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    def state(self, job: str) -> str:
        """A job's state, as SLURM calls it."""
        words = dict(
            word.split("=", 1)
            for word in self.said("scontrol", "-o", "show", "job", job).split()
            if "=" in word
        )
        return words.get("JobState", "")

    def pretend_gpus(self, count: int) -> None:
        """Have every node seem to have GPUs, until it is lost, so that a job that asks is taken."""
        self.said("scontrol", "update", "nodename=127.0.0.[1-2]", f"gres=gpu:{count}")

    def until(self, condition: Callable[[], object], seconds: float) -> float:
        """Wait until something holds, with a limit; gives the seconds it took."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"not within {seconds} s: {self.said('squeue') or self.logs()}")
            time.sleep(0.05)
        return time.monotonic() - began

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-1500:]}" for file in files)

    def _daemon(self, *words: object) -> None:
        quiet = subprocess.DEVNULL
        command = [str(word) for word in words]
        self.daemons.append(
            subprocess.Popen(command, env=self.env, stdin=quiet, stdout=quiet, stderr=quiet)
        )


def _unpacked(folder: Path) -> Path:
    """Fetch and unpack SLURM; gives the folder that stands for /."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise Absent(f"there is no {tool}, which fetches and unpacks SLURM from Debian")
    packages, root = folder / "packages", folder / "root"
    packages.mkdir()
    fetched = subprocess.run(
        ["apt-get", "-qq", "download", *PACKAGES],
        cwd=packages,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    files = sorted(packages.glob("*.deb"))
    if fetched.returncode or len(files) < len(PACKAGES):
        reason = " ".join(fetched.stderr.split()) or "nothing was fetched"
        raise Absent(f"Debian's packages of SLURM cannot be had ({reason})")
    for file in files:
        subprocess.run(["dpkg", "-x", file, root], check=True, timeout=60)
    if not list(root.glob("usr/lib/*/slurm-wlm")) or not (root / "usr/sbin/slurmd-wlm").exists():
        raise Absent("the packages of SLURM here are laid out otherwise than Debian 12's")
    return root


def _ports() -> list[int]:
    """Three free ones in a row, the controller's and the nodes'."""
    for first in range(20_000 + os.getpid() % 10_000, 60_000, 7):
        ports = [first, first + 1, first + 2]
        try:
            for port in ports:
                with socket.socket() as one:
                    one.bind(("", port))
        except OSError:
            continue
        return ports
    raise Absent("no three free ports in a row")


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
