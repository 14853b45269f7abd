"""What of the environment would undo the safety of the readers; refused before anything is read."""

from __future__ import annotations

from collections.abc import Mapping

# torch and Lightning run what a checkpoint asks for where this is set.
UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def refuse_unsafe(environment: Mapping[str, str]) -> None:
    """See that nothing is set that makes checkpoints run what they hold.

    Raises:
        ValueError: it is.
    """
    value = environment.get(UNSAFE, "")
    if value.lower() not in ("", "0", "false", "no", "n"):
        raise ValueError(
            f"{UNSAFE}: is set (got {value!r}), so any checkpoint could run what it holds; unset it"
        )
