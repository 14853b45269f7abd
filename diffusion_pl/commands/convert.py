"""`convert`: rewrite a run's config and checkpoints of earlier versions in today's format.

Renamed keys get their new names. Credentials in addresses, which earlier versions kept, become ***.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from diffusion_pl import config, locks
from diffusion_pl.addresses import masked, without_credentials
from diffusion_pl.commands.results import Result
from diffusion_pl.config.renaming import renamed
from diffusion_pl.config.untrusted import RESOLVED
from diffusion_pl.errors import UserError
from diffusion_pl.io.files import read_small, write_atomically
from diffusion_pl.training import checkpoint as checkpoints


def command(run: Path, /) -> Result:
    """Rewrite a run's config and checkpoints in today's format, in place.

    Example: diffusion_pl convert runs/mine

    Args:
        run: a run's folder, or a checkpoint.
    """
    files = [run] if run.is_file() else sorted((run / "checkpoints").glob("*.ckpt"))
    if not files:
        raise UserError(f"{run}: neither a run with checkpoints nor a checkpoint")
    with locks.hold(files[0].parent.parent / locks.NAME, "converting"):
        converted = [str(file) for file in files if convert(file)]
        settings = run / RESOLVED
        if settings.is_file() and (_mask(settings) | _rename(settings)):
            converted.append(str(settings))
    return Result({"format": checkpoints.FORMAT, "files": len(files), "converted": converted})


def convert(file: Path) -> bool:
    """Rewrite a checkpoint in today's format, whole or not at all; returns whether it changed.

    Raises:
        UserError: it cannot be read or written; it is then as before.
    """
    loaded = checkpoints.load(file)
    section = loaded[checkpoints.SECTION]
    kept = without_credentials(section)
    if isinstance(kept.get("config"), dict):
        kept = {**kept, "config": renamed(kept["config"])}
    if section["format"] == checkpoints.FORMAT and kept == section:
        return False
    # Format 1 is the same without a digest, which `save` appends.
    now = {**loaded, checkpoints.SECTION: {**kept, "format": checkpoints.FORMAT}}
    checkpoints.save(now, file)
    return True


def _mask(settings: Path) -> bool:
    """Rewrite a run's config without credentials; returns whether it changed.

    Raises:
        UserError: they cannot be read or written; they are then as before.
    """
    try:
        before = read_small(settings).decode().splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{settings}: is not UTF-8 text; restore it") from error
    after = [masked(line) for line in before]
    if after != before:
        write_atomically(settings, lambda file: file.write("".join(after).encode()))
    return after != before


def _rename(settings: Path) -> bool:
    """Rewrite a run's config with today's names; returns whether it changed.

    Raises:
        UserError: they cannot be read or written; they are then as before.
    """
    today = config.dump(config.load(settings)).encode()  # bounded, and refused where it is no YAML
    before = yaml.safe_load(read_small(settings))
    if renamed(before) == before:
        return False
    write_atomically(settings, lambda file: file.write(today))
    return True
