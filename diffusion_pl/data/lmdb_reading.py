"""Read an lmdb in a process of its own (`python -m` of this file), since a damaged one may end it.

lmdb maps the file and follows the numbers in it: a few changed bytes cause a segmentation fault, a
bus error or a failed assertion. So a child process, started by `Child`, reads and answers on its
standard output.

    request   8 bytes: how many bytes of a key follow, or -1 for all keys
    answer    8 bytes: how many bytes n follow, or -1 - n for an error message of n bytes;
              all keys: for each its length, 4 bytes, and the key
"""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import regular

_SECONDS = 60.0  # for one answer; a damaged tree may go round in circles
_KEYS = -1
_NUMBER = struct.Struct("<q")
_LENGTH = struct.Struct("<I")


class Child:
    """A process that has an lmdb open.

    Args:
        path: of the file.
        largest: bytes; a larger value is refused.

    Raises:
        UserError: it cannot be opened, or opening it ended the process.
    """

    def __init__(self, path: Path, largest: int) -> None:
        self.path = path
        self._owner = os.getpid()  # a fork must not end the child
        words = [sys.executable, "-m", __name__, str(regular(path)), str(largest)]
        # The package need not be installed.
        places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
        )
        self._answer()  # once it is open

    def keys(self) -> list[bytes]:
        """All keys, in their order.

        Raises:
            UserError: reading them fails.
        """
        answer = self._ask(_NUMBER.pack(_KEYS))
        keys, place = [], 0
        while place < len(answer):
            (length,) = _LENGTH.unpack_from(answer, place)
            place += _LENGTH.size
            keys.append(answer[place : place + length])
            place += length
        return keys

    def value(self, key: bytes) -> bytes:
        """The value of a key.

        Raises:
            UserError: there is none, or reading it fails.
        """
        return self._ask(_NUMBER.pack(len(key)) + key)

    def end(self) -> None:
        """End the process; safe to call twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.kill()
        self._process.wait()

    def __del__(self) -> None:
        if hasattr(self, "_process") and self._owner == os.getpid():
            self.end()

    def _ask(self, request: bytes) -> bytes:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        return self._answer()

    def _answer(self) -> bytes:
        until = time.monotonic() + _SECONDS
        (size,) = _NUMBER.unpack(self._read(_NUMBER.size, until))
        if size >= 0:
            return self._read(size, until)
        raise UserError(self._read(-1 - size, until).decode(errors="replace"))

    def _read(self, size: int, until: float) -> bytes:
        assert self._process.stdout is not None
        found = bytearray()
        while len(found) < size:
            left = max(0.0, until - time.monotonic())
            poll = select.poll()
            poll.register(self._process.stdout, select.POLLIN)
            if not poll.poll(1000 * left):
                self.end()
                raise UserError(f"{self.path}: damaged (it is read without end); fetch it again")
            block = os.read(self._process.stdout.fileno(), min(size - len(found), 2**20))
            if not block:
                raise self._ended()
            found += block
        return bytes(found)

    def _ended(self) -> ValueError:
        self.end()
        return UserError(f"{self.path}: damaged (reading it ended the process); fetch it again")


def _listed(path: str, database: object) -> Iterator[bytes]:
    """The keys of an open database.

    Raises:
        UserError: they are more than it says, so that the tree is damaged.
    """
    count = database.stat()["entries"]  # type: ignore[attr-defined]
    with database.begin() as transaction:  # type: ignore[attr-defined]
        for number, key in enumerate(transaction.cursor().iternext(keys=True, values=False)):
            if number >= count:
                raise UserError(f"{path}: damaged (its keys go round); fetch it again")
            yield key


def _value(path: str, database: object, key: bytes, largest: int) -> bytes:
    name = key.decode("ascii", "backslashreplace")
    with database.begin(buffers=True) as transaction:  # type: ignore[attr-defined]
        data = transaction.get(key)
        if data is None or len(data) > largest:
            raise UserError(f"{path}: {name} is gone or too large for an image")
        return bytes(data)


def _open(path: str) -> object:
    """Open a database for reading.

    Raises:
        UserError: it is none, or is cut off.
    """
    import lmdb

    try:
        # Without a lock nothing is written beside the data, which may be read-only.
        database = lmdb.open(
            path, subdir=False, readonly=True, lock=False, create=False, readahead=False
        )
    except lmdb.Error as error:
        raise UserError(f"{path}: not a readable lmdb ({error})") from error
    # The file is mapped into memory: reading where it has been cut off would kill the process.
    size = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
    if os.stat(path).st_size < size:
        raise UserError(f"{path}: ends too soon, {size:,} bytes are expected; fetch it again")
    return database


def _serve(path: str, largest: int, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the requests end."""
    import lmdb

    def send(answer: bytes | ValueError) -> None:
        complaint = isinstance(answer, ValueError)
        data = str(answer).encode(errors="replace") if complaint else answer
        assert isinstance(data, bytes)
        answers.write(_NUMBER.pack(-1 - len(data) if complaint else len(data)) + data)
        answers.flush()

    try:
        database = _open(path)
    except ValueError as error:
        send(error)
        return
    send(b"")
    while asked := requests.read(_NUMBER.size):
        (size,) = _NUMBER.unpack(asked)
        try:
            if size == _KEYS:
                send(b"".join(_LENGTH.pack(len(key)) + key for key in _listed(path, database)))
            else:
                send(_value(path, database, requests.read(size), largest))
        except lmdb.Error as error:
            send(UserError(f"{path}: damaged ({error}); fetch it again"))
        except ValueError as error:
            send(error)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
