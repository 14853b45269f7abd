"""Look through a pickle before it is read: three bombs that no reader's list of names keeps out.

A pickle numbers what it wants to remember, and the reader in C makes a table as long as the largest
number: seven bytes take 16 GiB. Tuples within tuples, one byte each, exhaust the stack when the
outermost is made a key: the process is gone without a word. And a byte makes an object of sixty and
more, so that their number is bounded.
"""

from __future__ import annotations

import pickletools
import re
from typing import IO, Any

from diffusion_pl.errors import UserError

# The stack of a thread ends between 100,000 and 200,000 (measured, Python 3.11).
DEEPEST = 10_000
# The networks and optimizers that are published make some 100,000; these take 2 s and 0.5 GB.
MOST = 2_000_000
LONGEST = 300  # characters of a reason

_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


def reason_of(error: Exception) -> str:
    """Why a pickle was not read, as one plain line.

    torch's own message advises to read it freely, in bold; only what it says of the file is kept.
    """
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(text.split("\n\n")[0].split()))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def look_through(program: bytes | IO[bytes]) -> None:
    """Follow a pickle's memory and the depth of its tuples, without doing what it says.

    Args:
        program: the pickle, or a file that is read to the end of the pickle that begins there.

    Raises:
        UserError: a bomb, or no pickle.
    """
    stack: list[int] = []  # the depth of each value as a tuple
    marks: list[int] = []
    memory: dict[Any, int] = {}
    for number, (code, argument, _) in enumerate(pickletools.genops(program)):
        name = code.name
        if number > MOST:
            raise UserError(f"it makes more than {MOST:,} values; refused")
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memory) if name == "MEMOIZE" else int(argument or 0)
            if place > max(number, 255):
                raise UserError(f"it remembers a value as number {place:,}; refused")
            memory[place] = stack[-1] if stack else 0
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memory.get(argument, 0))
        elif name == "DUP":
            stack += stack[-1:]
        else:
            taken = _taken(code, stack, marks)
            depth = 1 + max(taken, default=0) if name in _TUPLES else 0
            if depth > DEEPEST:
                raise UserError(f"tuples more than {DEEPEST:,} deep; refused")
            stack += [depth] * len(code.stack_after)


def _taken(code: Any, stack: list[int], marks: list[int]) -> list[int]:
    """What an operation takes off the stack."""
    below = len(code.stack_before)
    if pickletools.markobject in code.stack_before:
        # What lies above the mark counts as one in the table, and so does the mark.
        below = code.stack_before.index(pickletools.markobject)
        start = max(0, (marks.pop() if marks else 0) - below)
    else:
        start = max(0, len(stack) - below)
    taken = stack[start:]
    del stack[start:]
    return taken
