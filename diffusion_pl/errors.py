"""What a user did wrong, told apart from what is wrong with the program."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that its reader can mend: where it is, what is wrong, what to do; one line each.

    The command line ends with it in a line and code 2. Every other exception is a bug, ours or one
    in a class of the user's own, and keeps its traceback.
    """
