"""What a checkpoint may be made of, so that what others have made costs no more than its size.

Entries of the zip are stored as they are, each once, and together no larger than the file; in
them are plain containers and dense tensors.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion_pl.data.pickle_program import DEEPEST, look_through

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def unfit_entries(archive: zipfile.ZipFile, size: int, *, digested: bool) -> str | None:
    """What is wrong with the entries of a checkpoint's zip archive, None when nothing is.

    Args:
        archive: the checkpoint, opened.
        size: of the file, bytes.
        digested: whether the file was held against a digest; the entries' own check sums are
            looked at where it was not.
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
            if b"bytearray" in program:  # which torch would make as long as the file says
                return "holds a bytearray, which no checkpoint does"
            # Looking through takes as long as reading: only where there can be so many tuples.
            if sum(program.count(code) for code in (b"t", b"\x85", b"\x86", b"\x87")) > DEEPEST:
                look_through(program)
    return None


def unfit_content(tree: Any) -> str | None:
    """What in a checkpoint is neither a plain container nor a dense tensor, None when nothing."""
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
    # Strides of 0 make a terabyte of one number.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"holds a tensor of shape {tuple(value.shape)} in less memory than it takes"
    return None
