"""Refuses environment variables that disable safe loading, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion_pl.errors import UserError

# With it torch and Lightning unpickle checkpoints, which executes code in them.
UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# Lightning reads a number from each while it is imported.
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def refuse_unsafe(environment: Mapping[str, str]) -> None:
    """Refuse a variable that disables safe loading, or ranks that Lightning cannot parse.

    Raises:
        UserError: names the variable.
    """
    for name in RANKS:
        rank = environment.get(name, "0")
        if not (rank.isascii() and rank.isdecimal()):
            raise UserError(f"{name}: must be a whole number (got {rank[:40]!r}); unset it")
    value = environment.get(UNSAFE, "")
    if value.lower() not in ("", "0", "false", "no", "n"):
        raise UserError(
            f"{UNSAFE}: is set (got {value!r}), so any checkpoint could run what it holds; unset it"
        )
