"""One writer at a time: a lock file that names its holder, taken over when the holder is dead.

The file holds one line of JSON: the holder's host, process, start time and SLURM job. Its
modification time is the holder's heartbeat. Whether a holder is alive is known

- on the same machine by its process, at once;
- by SLURM, at once: a job that was restarted has ended where it ran before;
- elsewhere by its heartbeat: it is dead after `DEAD_AFTER` seconds without one.

A holder that comes back after its lock was taken over finds another name in the file and must stop
writing: see `Lock.check`. Clocks of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import open_lock, unwritable
from diffusion_pl.names import shown
from diffusion_pl.processes import began_at, is_running, place

NAME = ".lock"  # of a run's folder
BEAT = 10.0  # seconds between two heartbeats
DEAD_AFTER = 60.0  # seconds without one, from the first look

_GUARD_SECONDS = 5.0  # to wait for the file while another process reads it
_SETTLE_SECONDS = 1.0  # without flock: time for two processes that take it to see each other
_MOST_BYTES = 4096


class LockLostError(Exception):
    """Another process has taken the lock over."""


@dataclass(frozen=True)
class Holder:
    """The holder of a lock.

    Args:
        host: name of the machine, for messages.
        process: id on that machine.
        began: start time of the process in ticks since boot; 0 if not known.
        place: machine and container, as of `processes.place`.
        job: SLURM's job id, "" outside SLURM.
        restart: how often SLURM has restarted the job.
        doing: purpose, for messages.
        token: unique to this lock.
        path: absolute, of the lock file; "" if not known.
    """

    host: str
    process: int
    began: int
    place: str
    job: str
    restart: int
    doing: str
    token: str
    path: str = ""

    def __str__(self) -> str:
        job = f", job {shown(self.job)}" if self.job else ""
        return f"process {self.process} on {shown(self.host)}{job}"

    def is_dead(self, mine: Holder) -> bool | None:
        """Whether this holder has ended, as seen from `mine`; None: only its heartbeat can tell."""
        if self.job and self.job == mine.job and self.restart < mine.restart:
            return True
        if self.place == mine.place:
            return not is_running(self.process, self.began) or self._is_copied(mine)
        return None

    def _is_copied(self, mine: Holder) -> bool:
        """Whether this lock file is a copy: the holder's own exists at another path."""
        if not self.path or not mine.path or self.path == mine.path:
            return False
        try:
            if os.path.samefile(self.path, mine.path):
                return False
        except (OSError, ValueError):  # moved, with its holder
            return False
        own = read(Path(self.path))
        return own is not None and own.token == self.token


def this_process(doing: str, path: Path | None = None) -> Holder:
    """This process as the holder of a new lock."""
    restart = os.environ.get("SLURM_RESTART_COUNT", "")
    return Holder(
        host=socket.gethostname(),
        process=os.getpid(),
        began=began_at(os.getpid()) or 0,
        place=place(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=int(restart) if restart.isdecimal() else 0,
        doing=doing,
        token=uuid.uuid4().hex,
        path="" if path is None else os.path.realpath(path),
    )


class Lock:
    """A lock that this process holds.

    Args:
        path: the lock file.
        holder: this process.
        where: what is locked, for error messages.
    """

    def __init__(self, path: Path, holder: Holder, where: Path) -> None:
        self.path, self.holder, self.where = path, holder, where
        self._ended = threading.Event()

    def check(self) -> None:
        """Check that this process may still write; a lock file that was removed is made again.

        Raises:
            LockLostError: another has taken the lock over.
        """
        other = read(self.path)
        if other is None:
            with contextlib.suppress(OSError, ValueError):
                _take(self.path, self.holder, self.where)
            other = read(self.path)
        if other is not None and other.token != self.holder.token:
            raise LockLostError(
                f"{self.where}: {other} has taken it over from this process ({self.holder}), which "
                "writes no more"
            )

    def beat(self) -> None:
        """Touch the lock file until the lock is released; runs in a thread."""
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                other = read(self.path)
                if other is not None and other.token == self.holder.token:
                    os.utime(self.path)

    def release(self) -> None:
        """Remove the lock file, unless another process has taken it over."""
        self._ended.set()
        if os.getpid() != self.holder.process or read(self.path) is None:  # a fork, or gone
            return
        with contextlib.suppress(OSError, ValueError), _guarded(self.path) as file:
            other = _read(file)
            if other is not None and other.token == self.holder.token:
                self.path.unlink()


@contextlib.contextmanager
def hold(path: Path, doing: str, where: Path | None = None) -> Iterator[Lock]:
    """Hold a lock while the `with` lasts.

    Args:
        path: the lock file; folders above it are made.
        doing: purpose, such as "training".
        where: what is locked, for error messages; the file's folder when not given.

    Raises:
        UserError: a live process holds it, or the file cannot be written.
    """
    where, made = where or path.parent, not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(path, _take(path, this_process(doing, path), where), where)
    except OSError as error:
        raise unwritable(path, error) from error
    threading.Thread(target=lock.beat, name="lock", daemon=True).start()
    try:
        yield lock
    finally:
        lock.release()
        if made:  # and nothing came of it
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _take(path: Path, mine: Holder, where: Path) -> Holder:
    """Write this process into a lock file, once its holder has ended."""
    seen: tuple[str, int] | None = None  # a holder elsewhere, and its last heartbeat
    since = time.monotonic()
    while True:
        with _guarded(path) as file:
            other = _read(file)
            dead = other is None or other.token == mine.token or other.is_dead(mine)
            if dead is None:
                assert other is not None
                now = (other.token, os.fstat(file).st_mtime_ns)
                if seen is None:
                    said = f"{where}: {other} holds it ({other.doing}); waiting up to "
                    said += f"{DEAD_AFTER:.0f} s for a sign of life"
                    print(shown(said), file=sys.stderr)
                    seen, since = now, time.monotonic()
                elif now != seen:
                    dead = False
                elif time.monotonic() - since > DEAD_AFTER:
                    dead = True
            if dead:
                _write(file, mine)
        if dead and _is_kept(path, mine):
            return mine
        if dead is False:
            raise UserError(
                f"{where}: {other} holds it ({shown(other.doing) if other else ''}); wait for it, "
                "or end it, then run again"
            )
        time.sleep(min(1.0, DEAD_AFTER / 20))


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[int]:
    """Open the lock file, flocked where the file system can; yields its descriptor."""
    until = time.monotonic() + _GUARD_SECONDS
    while True:
        file = open_lock(path)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.01)
                    continue
            except OSError:  # a file system without locks
                pass
            try:
                there = os.stat(path).st_ino == os.fstat(file).st_ino
            except FileNotFoundError:
                there = False
            if there:  # not what its holder has just removed
                yield file
                return
        finally:
            os.close(file)


def read(path: Path) -> Holder | None:
    """The holder of a lock, alive or not; None if it is free."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _read(file)
    finally:
        os.close(file)


def live_holder(path: Path, doing: str = "") -> Holder | None:
    """The holder of a lock, if it may be alive; does not wait."""
    other = read(path)
    return None if other is None or other.is_dead(this_process(doing, path)) else other


def _read(file: int) -> Holder | None:
    """The holder in a lock file; None where it died before it had written its name."""
    try:
        tree = json.loads(os.pread(file, _MOST_BYTES, 0))
        values = {each.name: tree.get(each.name, each.default) for each in fields(Holder)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    numbers = ("process", "began", "restart")
    if any(type(values[name]) is not (int if name in numbers else str) for name in values):
        return None
    return Holder(**values)


def _write(file: int, mine: Holder) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, (json.dumps(asdict(mine)) + "\n").encode(), 0)
    os.fsync(file)


def _is_kept(path: Path, mine: Holder) -> bool:
    """Whether a lock just taken belongs to this process, and not to one that took it as well."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    except OSError:  # a file system without locks, or a file that is gone
        time.sleep(_SETTLE_SECONDS)
    other = read(path)
    return other is not None and other.token == mine.token
