"""Read the pickles of others, torch's files and EDM's networks, and run nothing that they hold.

A pickle is a program that may call whatever it names, and EDM's even carry the source of their
classes. This reader knows the few names such a file needs and gives each a stand-in of its own:
tensors are rebuilt, arrays and scalars of numpy are numbers, modules are their attributes, and the
source is never looked at. Any other name is refused. No call takes more memory than its own bytes
in the file: storages are cut out of it, once each, nothing is copied that the file may name again,
and its own word on sizes is held against it.
"""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.errors import UserError
from diffusion_pl.io.files import regular
from diffusion_pl.io.unpickle import (
    Array,
    Dtype,
    Function,
    look_through,
    reason_of,
    refused,
    unfit_entries,
)

# Modules within modules, and modules in all: far more than any network has.
DEEPEST, MOST = 100, 100_000
# Weights that are tied are one storage in the file, and two tensors once they are read.
TIED = 2
ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch's files begin
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip


class Persistent:
    """An object of EDM's persistent classes: its class's name and its attributes.

    Attributes:
        name: such as `EDMPrecond`.
        state: what the object held, names to values.
    """

    def __init__(self, meta: Any) -> None:
        name, state = meta.get("class_name"), meta.get("state")
        if meta.get("type") != "class" or not isinstance(name, str) or not isinstance(state, dict):
            raise UserError("a persistent object without class_name and state")
        self.name: str = name
        self.state: dict[str, Any] = state

    def __setstate__(self, state: Any) -> None:
        """All of it came with the call; pickle itself would copy what is here."""


class Standin:
    """Any other object, such as a torch.nn.ModuleDict: only its attributes are kept."""

    state: dict[str, Any]

    def __new__(cls, *arguments: object) -> Standin:
        made = super().__new__(cls)
        made.state = {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Dict(dict[str, Any]):
    """EasyDict: a dictionary whose keys are its attributes."""

    def __setstate__(self, state: Any) -> None:
        """Its attributes are its keys; there is nothing else."""


class _Ordered(OrderedDict[Any, Any]):
    """OrderedDict, filled by what follows."""

    def __init__(self, *arguments: object) -> None:
        if arguments:
            raise UserError("an ordered dictionary made of another")
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """What torch notes beside a state dict; not needed."""


class _Set:
    """A set, as the list that it is made of."""

    def __init__(self, items: Any = ()) -> None:
        self.items = items

    def __setstate__(self, state: Any) -> None:
        """Sets have no attributes."""

    def __contains__(self, item: object) -> bool:
        return isinstance(self.items, list) and item in self.items


def _scalar(dtype: Any, data: object) -> Any:
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes):
        raise UserError("a numpy scalar without bytes")
    return struct.unpack(f"<{dtype.code}", data)[0]


class _Storage:
    """Numbers of one type in a row, as torch keeps them."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat


def _flat(data: bytes, dtype: torch.dtype) -> Tensor:
    """Bytes of the file as numbers; they are read, never written."""
    if not data:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of bytes that cannot be written
        return torch.frombuffer(data, dtype=dtype)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: object) -> Tensor:
    """A strided view of a storage, refused if it reaches beyond it."""
    if not isinstance(storage, _Storage):
        raise UserError("a tensor without a storage")
    flat = storage.flat
    whole = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(one) is int and one >= 0 for one in whole):
        raise UserError("a tensor whose size or stride is none")
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(flat):
        raise UserError(f"a tensor of size {size} in a storage of {len(flat):,} elements")
    return flat.as_strided(size, stride, offset)


def _parameter(data: Any, *rest: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise UserError("a parameter that is no tensor")
    return data


def _size(sides: object = ()) -> object:
    """torch.Size: the tuple that it is made of."""
    return sides


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """How old protocols write the few bytes of a number."""
    if not isinstance(text, str) or len(text) > 64 or encoding != "latin1":
        raise UserError("bytes as text that are no number")
    return text.encode("latin1")


def _default_dict(factory: object = None) -> dict[Any, Any]:
    """collections.defaultdict, as optimizers keep their state: a plain one."""
    return {}


def _legacy_object(kind: Any, base: object, state: object) -> Any:
    """copyreg's way to make an object of a class in old protocols."""
    if not isinstance(kind, type) or not issubclass(kind, Standin | _Dict | _Ordered):
        raise UserError(f"an object of {kind}")
    return kind()


def _old_storage(data: object) -> Any:
    """The storage that torch.save has written, as bytes within the pickle."""
    if not isinstance(data, bytes):
        raise UserError("a storage without bytes")
    return _legacy(data)


KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Persistent,
    ("dnnlib.util", "EasyDict"): _Dict,
    ("collections", "OrderedDict"): _Ordered,
    ("collections", "Counter"): Standin,
    ("collections", "defaultdict"): Function(_default_dict),
    ("builtins", "set"): _Set,
    ("__builtin__", "set"): _Set,
    ("builtins", "object"): Standin,
    ("__builtin__", "object"): Standin,
    ("copyreg", "_reconstructor"): Function(_legacy_object),
    ("copy_reg", "_reconstructor"): Function(_legacy_object),
    ("_codecs", "encode"): Function(_encode),
    ("torch", "Size"): Function(_size),
    ("torch._utils", "_rebuild_tensor_v2"): Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): Function(_parameter),
    ("torch.storage", "_load_from_bytes"): Function(_old_storage),
    ("torch", "device"): Standin,
    ("argparse", "Namespace"): Standin,
    ("numpy", "dtype"): Dtype,
    ("numpy", "ndarray"): Array,
    ("numpy.core.multiarray", "scalar"): Function(_scalar),
    ("numpy._core.multiarray", "scalar"): Function(_scalar),
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy._core.multiarray", "_reconstruct"): Array,
}


Persist = Callable[[torch.dtype, str, int], Tensor]


class _Reader(pickle.Unpickler):
    """Reads a pickle by the names that are known.

    Args:
        program: the pickle.
        persist: the numbers of a storage, by its type, its key in the file and its length.
    """

    def __init__(self, program: bytes, persist: Persist | None = None) -> None:
        super().__init__(io.BytesIO(program))
        self.persist = persist
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        # A layer by its plain name; a dotted one would reach into other modules.
        if module.startswith("torch.nn.modules.") and name.isidentifier():
            return Standin
        raise refused(module, name)

    def persistent_load(self, pid: Any, /) -> Any:
        if isinstance(pid, tuple) and pid[:2] == ("module", Standin) and len(pid) == 4:
            return Standin  # a layer's class, with its source beside it
        if self.persist is None or not isinstance(pid, tuple) or len(pid) not in (5, 6):
            raise UserError("a reference to what is not in the file")
        kind, dtype, key, _, length = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise UserError("a reference that is no storage")
        if type(length) is not int or length < 0 or any(pid[5:]):
            raise UserError("a storage without a length, or a view of one")
        if key not in self.storages:
            self.storages[key] = _Storage(self.persist(dtype, key, length))
        return self.storages[key]


def read_pickle(path: Path) -> Any:
    """The content of a pickle or of a file of torch's, objects as `Persistent` and `Standin`.

    Raises:
        UserError: unreadable, broken, or asking for a name that such a file does not need.
    """
    try:
        return _content(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path}: not a pickle of a network: {reason_of(error)}") from error


def read_state(path: Path) -> Any:
    """The content of a file of torch's that should be plain containers of tensors.

    Raises:
        UserError: unreadable, or holding anything else.
    """
    try:
        content = _content(path)
    except Exception as error:  # a broken pickle raises nearly anything
        reason = reason_of(error)
        what = "holds more than tensors; refused"
        if "which is refused" not in reason:
            what = "cannot be read as a checkpoint"
        raise UserError(f"{path}: {what} ({reason})") from error
    return content


def state_dict(found: Any, where: str) -> dict[str, Tensor]:
    """Weights of others, as float32.

    Args:
        found: what should be names to tensors.
        where: for messages.

    Raises:
        UserError: it is something else, or holds what is no number.
    """
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{where}: must be a state dict, names to tensors")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{where}: must be a state dict, names to tensors{_others(found)}")
    _bounded(found.values(), where)
    state = {}
    for key, value in found.items():
        if not value.is_floating_point():
            state[key] = value
            continue
        state[key] = value.to(torch.float32)
        if not bool(torch.isfinite(state[key]).all()):
            raise UserError(f"{where}: {key} holds values that are not finite")
    return state


def _others(found: Mapping[Any, Any]) -> str:
    """What a file is that holds no state dict at its top, as the end of a line."""
    keys = {key for key in found if isinstance(key, str)}
    held = ", ".join(sorted(key[:40] for key in keys)[:8])
    if {"step", "model", "opt"} <= keys:
        kind = "a milestone of denoising_diffusion_pytorch; import it as lucidrains"
    elif "pytorch-lightning_version" in keys:
        kind = "a checkpoint of Lightning; save its state_dict alone"
    elif "state_dict" in keys or "model" in keys:
        kind = "a training checkpoint; save the weights in it alone"
    else:
        return f" (it holds {held})" if held else ""
    return f" (it holds {held}: {kind})"


def _bounded(values: Any, where: str) -> None:
    """Refuse tensors that are many views of few numbers: each would be copied."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in values}
    held = sum(storage.nbytes() for storage in storages.values())
    taken = sum(value.numel() * value.element_size() for value in values)
    if taken > TIED * held:
        raise UserError(
            f"{where}: its tensors take {taken:,} bytes, of which the file holds {held:,}; refused"
        )


def _content(path: Path) -> Any:
    if path.exists() and not path.is_file():
        raise UserError("it is no regular file")
    with regular(path).open("rb") as file:
        first = file.read(len(LEGACY))
        if not first.startswith(ZIP):
            whole = first + file.read()
    if first.startswith(ZIP):
        return _zipped(path)
    if first == LEGACY:
        return _legacy(whole)
    look_through(whole)
    return _Reader(whole).load()


def _zipped(path: Path) -> Any:
    """A file of torch.save: a zip archive of a pickle and the storages that it names."""
    with zipfile.ZipFile(regular(path)) as archive:
        if problem := unfit_entries(archive, path.stat().st_size, digested=False):
            raise UserError(problem)
        names = {entry.filename: entry for entry in archive.infolist()}
        programs = [name for name in names if name.endswith("data.pkl")]
        if len(programs) != 1:
            raise UserError("it is an archive, but not one that torch.save makes")
        [program] = programs
        folder = program.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in names and archive.read(order) != b"little":
            raise UserError("its numbers are those of a big-endian machine")

        def persist(dtype: torch.dtype, key: str, length: int) -> Tensor:
            data = archive.read(f"{folder}data/{key}")
            if len(data) != length * dtype.itemsize:
                raise UserError(f"a storage of {length:,} numbers in {len(data):,} bytes")
            return _flat(data, dtype)

        text = archive.read(program)
        look_through(text)
        return _Reader(text, persist).load()


def _legacy(whole: bytes) -> Any:
    """A file of torch.save before 1.6: five pickles, then the storages that the last one lists."""
    stream, programs = io.BytesIO(whole), []
    for _ in range(5):
        start = stream.tell()
        look_through(stream)
        programs.append(whole[start : stream.tell()])
    magic, _, _, program, listed = programs
    if magic != LEGACY:
        raise UserError("it does not begin as torch's files do")
    claimed: dict[str, tuple[torch.dtype, int]] = {}

    def claim(dtype: torch.dtype, key: str, length: int) -> Tensor:
        claimed[key] = dtype, length
        return torch.empty(length, dtype=dtype, device="meta")

    # The types of the storages stand in the program, their bytes behind it.
    _Reader(program, claim).load()
    found: dict[str, Tensor] = {}
    for key in _Reader(listed).load():
        dtype, length = claimed[key]
        size = length * dtype.itemsize
        if stream.read(8) != struct.pack("<q", length) or size > len(whole) - stream.tell():
            raise UserError(f"a storage of {length:,} numbers that the file does not hold")
        found[key] = _flat(stream.read(size), dtype)
    return _Reader(program, lambda dtype, key, length: found[key]).load()


def tensors(module: Any) -> dict[str, Tensor]:
    """The state dict of a module that was read: parameters, persistent buffers, its children's.

    Raises:
        UserError: the object is no module, or one within itself.
    """
    found: dict[str, Tensor] = {}
    for number, (prefix, state) in enumerate(_modules(module, "", 0)):
        if number > MOST:
            raise UserError(f"more than {MOST:,} modules")
        passing = state.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, set | _Set) else ()
        for group in ("_parameters", "_buffers"):
            own = state.get(group)
            for name, value in own.items() if isinstance(own, dict) else ():
                if isinstance(value, Tensor) and not (
                    isinstance(passing, set | _Set) and name in passing
                ):
                    found[f"{prefix}{name}"] = value
    return found


def _modules(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The attributes of a module and of those in it, each with the prefix of its names."""
    state = module.state if isinstance(module, Persistent | Standin) else None
    if state is None or not isinstance(state.get("_modules"), dict):
        raise UserError(f"{prefix or 'the network'}: is no module")
    if depth > DEEPEST:
        raise UserError(f"modules more than {DEEPEST} deep")
    yield prefix, state
    for name, child in state["_modules"].items():
        if child is not None:
            yield from _modules(child, f"{prefix}{name}.", depth + 1)
