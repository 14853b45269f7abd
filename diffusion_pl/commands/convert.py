"""`convert`: a run's settings and checkpoints of earlier versions, written again as today's.

What was renamed has the names of today. Earlier versions kept the credentials of addresses; what is
written again has *** for them.
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
    """Write a run's checkpoints of earlier formats in today's, in place.

    Example: diffusion_pl convert runs/mine

    Args:
        run: a run's folder, or a checkpoint.
    """
    files = [run] if run.is_file() else sorted((run / "checkpoints").glob("*.ckpt"))
    if not files:
        raise UserError(f"{run}: neither a run with checkpoints nor one of them")
    with locks.hold(files[0].parent.parent / locks.NAME, "converting"):
        converted = [str(file) for file in files if convert(file)]
        settings = run / RESOLVED
        if settings.is_file() and (_mask(settings) | _rename(settings)):
            converted.append(str(settings))
    return Result({"format": checkpoints.FORMAT, "files": len(files), "converted": converted})


def convert(file: Path) -> bool:
    """Write a checkpoint again in today's format, whole or not at all.

    Returns:
        Whether it was of an earlier one, held credentials, or names that were given up.

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
    # Format 1 held the same and had no digest, which `save` puts behind.
    now = {**loaded, checkpoints.SECTION: {**kept, "format": checkpoints.FORMAT}}
    checkpoints.save(now, file)
    return True


def _mask(settings: Path) -> bool:
    """Write a run's settings again without the credentials in it; whether there were some.

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
    """Write a run's settings again in the names of today; whether some had been given up.

    Raises:
        UserError: they cannot be read or written; they are then as before.
    """
    today = config.dump(config.load(settings)).encode()  # bounded, and refused where it is no YAML
    before = yaml.safe_load(read_small(settings))
    if renamed(before) == before:
        return False
    write_atomically(settings, lambda file: file.write(today))
    return True
