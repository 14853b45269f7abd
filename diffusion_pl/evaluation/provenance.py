"""What is recorded with a number beside its images: code, libraries and hardware."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "torchvision", "torchmetrics", "torch-fidelity", "lightning", "numpy")


def now() -> str:
    """The time in UTC, to the second, as ISO 8601 writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def surroundings(device: torch.device) -> dict[str, Any]:
    """Versions, commit and hardware of this process."""
    versions = {"python": platform.python_version()}
    for library in ("diffusion_pl", *LIBRARIES):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "commit": commit(), "hardware": hardware(device)}


def commit() -> str | None:
    """The commit of the checkout that runs, with "+changes" where files differ; None without."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        revision = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(
            folder, "status", "--porcelain", "--untracked-files=no", "--", "diffusion_pl"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+changes" if changed else "")


def hardware(device: torch.device) -> str:
    """The name of the GPU, or of the CPU and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def described(part: Any) -> str:
    """A part of an experiment as text: its name and arguments.

    Args:
        part: a dataclass, a function, a partial of one, or a plain value.
    """
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = [field for field in dataclasses.fields(part) if _is_set(part, field)]
        settings = {field.name: getattr(part, field.name) for field in fields}
        return f"{type(part).__name__}({_listed(settings)})"
    if isinstance(part, functools.partial):
        name = described(part.func)
        return f"{name}({_listed(part.keywords)})" if part.keywords else name
    if isinstance(part, torch.Tensor):  # too long to print
        values = part.flatten().tolist()
        ends = f"{values[0]:.6g} to {values[-1]:.6g}" if values else ""
        return f"[{len(values)} values, {ends}]"
    if isinstance(part, torch.dtype):
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(part, str(part))
    if isinstance(part, Sequence) and not isinstance(part, str):
        return f"[{', '.join(map(described, part))}]"
    if isinstance(part, Mapping):
        return f"{{{_listed(part)}}}"
    return getattr(part, "__name__", None) or str(part)


def _is_set(part: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether a setting is not its default."""
    return field.default is dataclasses.MISSING or getattr(part, field.name) != field.default


def _listed(settings: Mapping[Any, Any]) -> str:
    return ", ".join(f"{key}={described(value)}" for key, value in settings.items())


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
