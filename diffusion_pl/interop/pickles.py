"""Read the pickles of EDM's networks without running anything in them.

A pickle is a program that may call whatever it names, and these even carry the source of their
classes. This reader knows the few names such a file needs and gives each a stand-in of its own:
tensors are rebuilt, arrays and scalars of numpy are numbers, modules are their attributes, and the
source is never looked at. Any other name is refused.
"""

from __future__ import annotations

import io
import pickle
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.data.pickle_program import look_through, reason_of

# Modules within modules, and modules in all: far more than any network has.
DEEPEST, MOST = 100, 100_000


class Persistent:
    """An object of EDM's persistent classes: its class's name and its attributes.

    Attributes:
        name: such as `EDMPrecond`.
        state: what the object held, names to values.
    """

    def __init__(self, meta: Any) -> None:
        name, state = meta.get("class_name"), meta.get("state")
        if meta.get("type") != "class" or not isinstance(name, str) or not isinstance(state, dict):
            raise ValueError("a persistent object without class_name and state")
        self.name: str = name
        self.state: dict[str, Any] = state


class Standin:
    """Any other object, such as a torch.nn.ModuleDict: only its attributes are kept."""

    state: dict[str, Any]

    def __init__(self, *arguments: object) -> None:
        self.state = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Dict(dict[str, Any]):
    """EasyDict: a dictionary whose keys are its attributes."""

    def __setstate__(self, state: Any) -> None:
        """Its attributes are its keys; there is nothing else."""


FORMATS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "u1": "B", "b1": "?"}


class _Dtype:
    """numpy.dtype: the format of a number."""

    def __init__(self, code: object, *flags: object) -> None:
        if code not in FORMATS:
            raise ValueError(f"a number of type {code!r}")
        self.code = FORMATS[str(code)]

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment; the files are of little-endian machines."""


def _scalar(dtype: Any, data: object) -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise ValueError("a numpy scalar without bytes")
    return struct.unpack(f"<{dtype.code}", data)[0]


class _Array:
    """numpy.ndarray: a flat list of its numbers in `values`, its sides in `shape`."""

    def __init__(self, *arguments: object) -> None:
        self.shape: tuple[int, ...] = ()
        self.values: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise ValueError("a numpy array without bytes")
        self.shape = shape
        self.values = [one for (one,) in struct.iter_unpack(f"<{dtype.code}", data)]


def _storage(data: object) -> Any:
    """The storage that torch.save has written, as bytes within the pickle."""
    if not isinstance(data, bytes):
        raise ValueError("a storage without bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # typed storages are old, as these files are
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: object) -> Tensor:
    """A strided view of a storage, refused if it reaches beyond it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage)
    whole = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(one) is int and one >= 0 for one in whole):
        raise ValueError(f"a tensor of size {size} and stride {stride}")
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(flat):
        raise ValueError(f"a tensor of size {size} in a storage of {len(flat):,} elements")
    return flat.as_strided(size, stride, offset)


def _parameter(data: Any, *rest: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter that is no tensor")
    return data


def _legacy_object(kind: Any, base: object, state: object) -> Any:
    """copyreg's way to make an object of a class in old protocols."""
    if not isinstance(kind, type) or not issubclass(kind, Standin | _Dict):
        raise ValueError(f"an object of {kind}")
    return kind()


KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Persistent,
    ("dnnlib.util", "EasyDict"): _Dict,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "object"): Standin,
    ("__builtin__", "object"): Standin,
    ("copyreg", "_reconstructor"): _legacy_object,
    ("copy_reg", "_reconstructor"): _legacy_object,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch", "device"): Standin,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        # A layer by its plain name; a dotted one would reach into other modules.
        if module.startswith("torch.nn.modules.") and name.isidentifier():
            return Standin
        raise ValueError(f"it asks for {module}.{name}, which is refused")


def read_pickle(path: Path) -> Any:
    """The content of a network pickle, its objects as `Persistent` and `Standin`.

    Raises:
        ValueError: unreadable, broken, or asking for a name that such a file does not need.
    """
    try:
        program = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        look_through(program)
        return _Reader(io.BytesIO(program)).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"{path}: not a pickle of a network: {reason_of(error)}") from error


def tensors(module: Any) -> dict[str, Tensor]:
    """The state dict of a module that was read: parameters, persistent buffers, its children's.

    Raises:
        ValueError: the object is no module, or one within itself.
    """
    found: dict[str, Tensor] = {}
    for number, (prefix, state) in enumerate(_modules(module, "", 0)):
        if number > MOST:
            raise ValueError(f"more than {MOST:,} modules")
        passing = state.get("_non_persistent_buffers_set")
        for group in ("_parameters", "_buffers"):
            own = state.get(group)
            for name, value in own.items() if isinstance(own, dict) else ():
                if isinstance(value, Tensor) and not (isinstance(passing, set) and name in passing):
                    found[f"{prefix}{name}"] = value
    return found


def _modules(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The attributes of a module and of those in it, each with the prefix of its names."""
    state = module.state if isinstance(module, Persistent | Standin) else None
    if state is None or not isinstance(state.get("_modules"), dict):
        raise ValueError(f"{prefix or 'the network'}: is no module")
    if depth > DEEPEST:
        raise ValueError(f"modules more than {DEEPEST} deep")
    yield prefix, state
    for name, child in state["_modules"].items():
        if child is not None:
            yield from _modules(child, f"{prefix}{name}.", depth + 1)
