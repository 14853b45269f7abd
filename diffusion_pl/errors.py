"""Errors of the user, as opposed to bugs."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can correct, one line each: where it is, what is wrong, what to do.

    The command line prints it and exits with 2. Any other exception is a bug, ours or in a class of
    the user, and keeps its traceback.
    """
