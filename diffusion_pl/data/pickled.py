"""Read old pickles of plain data without running anything they ask for.

A pickle is a program. This reader knows only the few callables that numpy arrays and byte strings
are made of, and gives each a stand-in of its own, so that not even numpy's C code sees what the
file says before it is checked. Everything else is refused by name.
"""

import io
import math
import pickle
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusion_pl.data.pickle_program import look_through
from diffusion_pl.errors import UserError


class _Dtype:
    """Stands in for numpy.dtype: only bytes (u1) are admitted."""

    def __init__(self, code: object, *flags: object) -> None:
        if code not in ("u1", b"u1"):
            raise UserError(f"an array of type {code!r} (expected u1)")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment: without meaning for single bytes."""


class _Array:
    """Stands in for numpy.ndarray, until `value` has checked what the pickle put into it."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def value(self) -> npt.NDArray[np.uint8]:
        """The array.

        Raises:
            UserError: the shape is none, or is not that of the data.
        """
        if not (isinstance(self.state, tuple) and len(self.state) == 5):
            raise UserError("an array without contents")
        _, shape, dtype, by_columns, data = self.state
        if not (isinstance(dtype, _Dtype) and isinstance(data, bytes) and isinstance(shape, tuple)):
            raise UserError("an array whose contents are not bytes")
        if not all(type(side) is int and side >= 0 for side in shape):
            raise UserError(f"an array of shape {shape}")
        if math.prod(shape) != len(data):
            raise UserError(f"an array of shape {shape} with {len(data):,} bytes")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    return _Array()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise UserError(f"text encoded as {encoding!r} (expected latin1)")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How the empty byte string is written; bytes(n) would allocate what the file says."""
    return b""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        # numpy 2 renamed numpy.core to numpy._core.
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return None  # an argument of _reconstruct, never called
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if (module, name) == ("__builtin__", "bytes"):
            return _no_bytes
        raise UserError(f"it asks for {module}.{name}, which is refused")


def read_pickle(data: bytes, *, where: str) -> Any:
    """The lists, dicts, numbers, strings and uint8 arrays of a pickle.

    Args:
        data: the pickle; strings of Python 2 become bytes.
        where: names the file in a complaint.

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
                key: entry.value() if isinstance(entry, _Array) else entry
                for key, entry in value.items()
            }
    except Exception as error:
        # A broken pickle raises nearly any exception; all of them mean the same to the user.
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: not a pickle of plain data: {reason}") from error
    return value
