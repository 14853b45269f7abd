"""`verify`: check prepared data or checkpoints against their digests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_pl.commands.results import Result
from diffusion_pl.data.shard_format import MANIFEST
from diffusion_pl.errors import UserError


def command(path: Path, /) -> Result:
    """Check every byte of prepared data or of a run's checkpoints against their digests.

    Example: diffusion_pl verify runs/mine

    Args:
        path: prepared data, a run's folder, or a checkpoint.
    """
    found = prepared(path) if (path / MANIFEST).exists() else kept(path)
    return Result({"path": str(path), **found})


def prepared(folder: Path) -> dict[str, Any]:
    """Check a prepared data set.

    Raises:
        UserError: a line for each file that is not.
    """
    from diffusion_pl.data.verify import verify

    manifest = verify(folder)
    return {
        "images": manifest.count,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "fingerprint": manifest.fingerprint,
    }


def kept(run: Path) -> dict[str, Any]:
    """Check a checkpoint, or all of a run's.

    Raises:
        UserError: a line for each that is damaged; or there are none.
    """
    from diffusion_pl.training import checkpoint as checkpoints

    files = [run] if run.is_file() else sorted((run / "checkpoints").glob("*.ckpt"))
    if not files:
        raise UserError(
            f"{run}: neither prepared data ({MANIFEST}) nor a run with checkpoints, nor one of them"
        )
    formats, problems = [], []
    for file in files:
        try:
            formats.append(checkpoints.load(file)[checkpoints.SECTION]["format"])
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return {
        "checkpoints": [str(file) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "without_digest": formats.count(1),
    }
