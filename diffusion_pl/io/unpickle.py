"""Read untrusted pickles and checkpoints without running anything they name.

A pickle is a program that calls what it names. Our readers know a few names, each with a stand-in
here or in `interop.pickles`, so that not even numpy's C code sees unchecked values. Three attacks
pass any list of names and are looked for first: a memo index of 2^31 in seven bytes makes the C
reader allocate 16 GiB; nested tuples, one byte each, overflow the stack when they are hashed; and
one byte makes an object of sixty bytes or more, so their number is bounded.

A checkpoint is a zip archive around a pickle. Its entries must be stored uncompressed, each once,
and be no larger together than the file; they hold plain containers and dense tensors, so reading
takes no more memory than the file's size.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusion_pl.errors import UserError

# The stack of a thread ends between 100,000 and 200,000 (measured, Python 3.11).
DEEPEST = 10_000
# The networks and optimizers that are published make some 100,000; these take 2 s and 0.5 GB.
MOST = 2_000_000
LONGEST = 300  # characters of a reason

_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def reason_of(error: Exception) -> str:
    """Why a pickle was not read, in one line, without torch's advice to load it unsafely."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(text.split("\n\n")[0].split()))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def look_through(program: bytes | IO[bytes]) -> None:
    """Bound a pickle's memo, depth of tuples and number of values, without running it.

    Args:
        program: the pickle, or a file positioned at its start.

    Raises:
        UserError: beyond the bounds, or not a pickle.
    """
    stack: list[int] = []  # the depth of each value as a tuple
    marks: list[int] = []
    memory: dict[Any, int] = {}
    for number, (code, argument, _) in enumerate(pickletools.genops(program)):
        name = code.name
        if number > MOST:
            raise UserError(f"it makes more than {MOST:,} values; refused")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memory) if name == "MEMOIZE" else int(argument or 0)
            if place > max(number, 255):
                raise UserError(f"it remembers a value as number {place:,}; refused")
            memory[place] = stack[-1] if stack else 0
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memory.get(argument, 0))
        elif name == "DUP":
            stack += stack[-1:]
        else:
            taken = _taken(code, stack, marks)
            depth = 1 + max(taken, default=0) if name in _TUPLES else 0
            if depth > DEEPEST:
                raise UserError(f"tuples more than {DEEPEST:,} deep; refused")
            stack += [depth] * len(code.stack_after)


def _taken(code: Any, stack: list[int], marks: list[int]) -> list[int]:
    """Pop what an operation takes off the stack."""
    below = len(code.stack_before)
    if pickletools.markobject in code.stack_before:
        # In pickletools' table the mark, and all that lies above it, count as one each.
        below = code.stack_before.index(pickletools.markobject)
        start = max(0, (marks.pop() if marks else 0) - below)
    else:
        start = max(0, len(stack) - below)
    taken = stack[start:]
    del stack[start:]
    return taken


def unfit_entries(archive: zipfile.ZipFile, size: int, *, digested: bool) -> str | None:
    """What is wrong with the entries of a checkpoint's zip archive; None for nothing.

    Args:
        archive: the open checkpoint.
        size: of the file, bytes.
        digested: whether the digest of the file was checked; if not, the check sums of the entries
            are.
    """
    entries = archive.infolist()
    names = {entry.filename for entry in entries}
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "has compressed entries, which no checkpoint has"
    if sum(entry.file_size for entry in entries) > size:
        return "its entries are larger than the file"
    if len(names) < len(entries):
        return "has an entry twice"
    if not digested and (damaged := archive.testzip()) is not None:
        return f"is damaged; the check sum of {damaged} is wrong"
    for entry in entries:
        if entry.filename.endswith("data.pkl"):
            program = archive.read(entry)
            if b"bytearray" in program:  # which torch allocates at any length that the file states
                return "holds a bytearray, which no checkpoint does"
            # As slow as reading: only where there can be so many tuples.
            if sum(program.count(code) for code in (b"t", b"\x85", b"\x86", b"\x87")) > DEEPEST:
                look_through(program)
    return None


def unfit_content(tree: Any) -> str | None:
    """What in a checkpoint is neither a plain container nor a dense tensor; None for nothing."""
    left, seen = [tree], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if problem := _unfit_tensor(value):
                return problem
        elif isinstance(value, Mapping | list | tuple | set):
            if id(value) not in seen:
                seen.add(id(value))
                left.extend(value)
                left.extend(value.values() if isinstance(value, Mapping) else ())
        elif not isinstance(value, _PLAIN):
            return f"holds a {type(value).__name__}"
    return None


def _unfit_tensor(value: Tensor) -> str | None:
    plain = value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized or value.is_nested:
        return "holds a tensor that is not plain numbers on the CPU"
    # With strides of 0 one number can stand for a terabyte.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"holds a tensor of shape {tuple(value.shape)} in less memory than it takes"
    return None


class Function:
    """One of our functions, so that a pickle that sets attributes of it cannot."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise UserError("attributes of a function")


FORMATS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "u1": "B", "b1": "?"}


class Dtype:
    """Stands in for numpy.dtype: the format of a number, as `struct` writes it."""

    def __init__(self, code: object, *flags: object) -> None:
        name = code.decode("ascii", "replace") if isinstance(code, bytes) else code
        if name not in FORMATS:
            raise UserError(f"a number of type {code!r}")
        self.code = FORMATS[str(name)]

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment; the files are of little-endian machines."""


class Array:
    """Stands in for numpy.ndarray: shape, type and bytes as the file has them."""

    def __init__(self, *arguments: object) -> None:
        self.shape: tuple[int, ...] = ()
        self.data, self.code, self.by_columns = b"", "B", False

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, Dtype) or not isinstance(data, bytes):
            raise UserError("a numpy array without bytes")
        self.shape, self.data, self.code, self.by_columns = shape, data, dtype.code, by_columns

    def value(self) -> npt.NDArray[np.uint8]:
        """The array, of bytes.

        Raises:
            UserError: of another type, or a shape that is not that of the data.
        """
        shape = self.shape
        fine = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
        if not fine or self.code != "B" or math.prod(shape) != len(self.data):
            raise UserError(f"an array of shape {shape} with {len(self.data):,} bytes")
        flat = np.frombuffer(self.data, np.uint8)
        return flat.reshape(shape, order="F" if self.by_columns else "C")


def refused(module: str, name: str) -> UserError:
    """The error for a name that no such file needs."""
    return UserError(f"it asks for {module}.{name}, which is refused")


def _reconstruct(kind: object, shape: object, code: object) -> Array:
    return Array()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise UserError(f"text encoded as {encoding!r} (expected latin1)")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How the empty byte string is written; bytes(n) would allocate what the file says."""
    return b""


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): Function(_reconstruct),
    ("numpy._core.multiarray", "_reconstruct"): Function(_reconstruct),  # of numpy 2
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, never called
    ("numpy", "dtype"): Dtype,
    ("_codecs", "encode"): Function(_encode),
    ("__builtin__", "bytes"): Function(_no_bytes),
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _KNOWN:
            raise refused(module, name)
        return _KNOWN[module, name]


def read_plain(data: bytes, *, where: str) -> Any:
    """The lists, dicts, numbers, strings and uint8 arrays of a pickle.

    Args:
        data: the pickle; strings of Python 2 become bytes.
        where: names the file in error messages.

    Returns:
        The value; a dict's arrays are numpy arrays, deeper ones are left unread.

    Raises:
        UserError: anything but plain data, or a broken pickle.
    """
    try:
        look_through(data)
        value = _Reader(io.BytesIO(data), encoding="bytes").load()
        if isinstance(value, dict):
            return {
                key: entry.value() if isinstance(entry, Array) else entry
                for key, entry in value.items()
            }
    except Exception as error:
        # A broken pickle raises nearly any exception; all of them mean the same to the user.
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: not a pickle of plain data: {reason}") from error
    return value
