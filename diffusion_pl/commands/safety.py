"""What of the environment would undo the safety of the readers; refused before anything is read."""

from __future__ import annotations

from collections.abc import Mapping

from diffusion_pl.errors import UserError

# torch and Lightning run what a checkpoint asks for where this is set.
UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# Lightning reads a number from each while it is imported.
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def refuse_unsafe(environment: Mapping[str, str]) -> None:
    """See that nothing is set that makes checkpoints run what they hold, or ends what is imported.

    Raises:
        UserError: it is.
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
